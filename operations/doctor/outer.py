"""Checks of what the CAs above an issuing CA publish, if these are not the portal's: CRLs, and certificates."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import ssl
from collections.abc import Callable, Iterator
from datetime import datetime
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import AuthorityInformationAccessOID

from core.server_command import server_command
from operations.doctor.base import SECONDS, Finding, Findings, Installation, combine, problem, summarize, warning
from pki.outer_chain import decode_above, named, spki

MAX_BYTES = 16 << 20  # of a CRL
_ASK = "Ask whoever runs that CA: clients that check the whole chain refuse every device then."


def outer_cas(installation: Installation) -> Finding:
    """Check CRL and certificate of each CA of somebody else above an issuing CA, at the URLs in the one below it.

    The CRL (RFC 5280 section 4.2.1.13) must be signed by the CA, current, and not list the one below; the certificate
    (section 4.2.2.1) must be that of the CA. The broker and the portal themselves need neither.
    """
    now, found, seen = installation.clock(), Findings(), list[str]()
    for record in installation.issuers():
        path = (x509.load_der_x509_certificate(record.der), *decode_above(record.above))
        for certificate, issuer in itertools.pairwise(path):
            urls = [*_crl_urls(certificate), *_issuer_urls(certificate)]
            seen += urls or [f"{named(certificate)} names no CRL"]
            for url in _crl_urls(certificate):
                found += _crl_finding(url, certificate, issuer, now)
            for url in _issuer_urls(certificate):
                found += _issuer_finding(url, issuer)
    otherwise = "No CA is above those of the portal."
    return combine(found, f"What they publish is as it should be: {summarize(seen)}." if seen else otherwise)


def _crl_urls(certificate: x509.Certificate) -> list[str]:
    return [
        name.value
        for extension in certificate.extensions
        if isinstance(extension.value, x509.CRLDistributionPoints)
        for point in extension.value
        for name in point.full_name or ()
        if isinstance(name, x509.UniformResourceIdentifier) and _can_be_fetched(name.value)
    ]


def _issuer_urls(certificate: x509.Certificate) -> list[str]:
    return [
        access.access_location.value
        for extension in certificate.extensions
        if isinstance(extension.value, x509.AuthorityInformationAccess)
        for access in extension.value
        if access.access_method == AuthorityInformationAccessOID.CA_ISSUERS
        and isinstance(access.access_location, x509.UniformResourceIdentifier)
        and _can_be_fetched(access.access_location.value)
    ]


def _can_be_fetched(url: str) -> bool:
    """Return whether it is a URL of HTTP; those of LDAP are left out."""
    return url.lower().startswith(("http://", "https://"))


def _crl_finding(url: str, certificate: x509.Certificate, issuer: x509.Certificate, now: datetime) -> Iterator[Finding]:
    try:
        content = _fetch(url)
    except (OSError, ValueError) as error:
        yield warning(f"The CRL of {named(issuer)} cannot be fetched from {url}: {_said(error)}.", _ASK)
        return
    crl, signed = None, False
    with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
        der = b"-----BEGIN" not in content
        crl = x509.load_der_x509_crl(content) if der else x509.load_pem_x509_crl(content)
        signed = crl.issuer == issuer.subject and crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
    if crl is None or not signed:
        yield problem(f"{url} does not have a CRL that {named(issuer)} has signed.", _ASK)
        return
    if crl.next_update_utc is not None and crl.next_update_utc <= now:
        yield problem(f"The CRL of {named(issuer)} at {url} expired at {crl.next_update_utc:%Y-%m-%d %H:%M} UTC.", _ASK)
    if crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
        yield problem(
            f"{named(issuer)} has revoked {named(certificate)}: {url} lists it.",
            f"Have another CA signed ({server_command('ca request')}, then ca install), and renew the devices.",
        )


def _issuer_finding(url: str, issuer: x509.Certificate) -> Iterator[Finding]:
    try:
        content = _fetch(url)
    except (OSError, ValueError) as error:
        yield warning(f"The certificate of {named(issuer)} cannot be fetched from {url}: {_said(error)}.", _ASK)
        return
    served = _certificates(content)
    if not any(one.subject == issuer.subject and spki(one.public_key()) == spki(issuer.public_key()) for one in served):
        yield problem(f"{url} does not have the certificate of {named(issuer)}.", _ASK)


def _certificates(content: bytes) -> list[x509.Certificate]:
    """Return the certificates in DER, PEM or PKCS#7, none if it is nothing of these."""
    readers: tuple[Callable[[bytes], list[x509.Certificate]], ...] = (
        lambda der: [x509.load_der_x509_certificate(der)],
        x509.load_pem_x509_certificates,
        pkcs7.load_der_pkcs7_certificates,
    )
    for read in readers:
        with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
            return read(content)
    return []


def _fetch(url: str) -> bytes:
    """Return what an URL serves; raise ``OSError``, or ``ValueError`` for a URL that is none. Follows no redirects."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    if parts.scheme.lower() == "https":
        context = ssl.create_default_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}")
        response = connection.getresponse()
        content = response.read(MAX_BYTES + 1)
    except http.client.HTTPException as error:
        raise ConnectionError(f"not an HTTP response ({type(error).__name__})") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise ConnectionError(f"status {response.status}")
    if len(content) > MAX_BYTES:
        raise ConnectionError(f"longer than {MAX_BYTES} bytes")
    return content


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
