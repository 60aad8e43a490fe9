"""What stands in each kind of certificate."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from cryptography import x509
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from core.errors import InputInvalid, SettingInvalid

COMMON_NAME_LIMIT = 64  # characters: ub-common-name of RFC 5280 appendix A.1

Extension = x509.Extension[x509.ExtensionType]

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DNS_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_URL = re.compile(r"https?://[!-~]+")


class Told(StrEnum):
    """Where a certificate says that its revocation is to be learnt."""

    BY_CRL_AND_OCSP = "crl and ocsp"
    BY_CRL = "crl"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class Profile:
    """The part of a certificate that depends on its purpose, neither on its key nor on its issuer."""

    subject: x509.Name
    extensions: tuple[Extension, ...]
    revocation: Told = Told.BY_CRL_AND_OCSP


def extension(value: x509.ExtensionType, *, critical: bool = False) -> Extension:
    """Wrap an extension's value."""
    return x509.Extension(value.oid, critical, value)


def _key_usage(*, digital_signature: bool = False, ca: bool = False) -> Extension:
    return extension(
        x509.KeyUsage(
            digital_signature=digital_signature,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=ca,
            crl_sign=ca,
            encipher_only=False,
            decipher_only=False,
        ),
        critical=True,
    )


_ROOT = (
    extension(x509.BasicConstraints(ca=True, path_length=1), critical=True),
    _key_usage(ca=True),
)
# digitalSignature would let the CA answer OCSP under its own name (RFC 6960 §4.2.2.2, RFC 5280 §4.2.1.3). The
# extended key usages bind what is below it to TLS; a responder's own OCSPSigning is judged in its certificate alone.
_ISSUING = (
    extension(x509.BasicConstraints(ca=True, path_length=0), critical=True),
    _key_usage(digital_signature=True, ca=True),
    extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])),
)
_END_ENTITY = (
    extension(x509.BasicConstraints(ca=False, path_length=None), critical=True),
    _key_usage(digital_signature=True),  # for RSA too: TLS with forward secrecy only signs
)
_DEVICE = (*_END_ENTITY, extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])))
_SERVER = (*_END_ENTITY, extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])))
_RESPONDER = (
    *_END_ENTITY,
    extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING])),
    extension(x509.OCSPNoCheck()),
)


def root_profile(common_name: str) -> Profile:
    """Trust anchor: signs issuing CAs, which sign no further CA."""
    return Profile(_ca_subject(common_name), _ROOT)


def issuing_profile(common_name: str) -> Profile:
    """CA that signs end entities only (pathLenConstraint 0).

    Its own revocation is told by the root's CRL alone: the root's key is meant to be away, and a URL that leads to no
    answer would keep careful clients from trusting anything.
    """
    return Profile(_ca_subject(common_name), _ISSUING, Told.BY_CRL)


def device_profile(device_id: str) -> Profile:
    """TLS client that is named by its UUID, in canonical lower-case text, as CN and as urn:uuid (RFC 9562 §4)."""
    if not _UUID.fullmatch(device_id):
        raise InputInvalid("The device id must be a UUID in lower-case text.")
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:uuid:{device_id}")])
    return Profile(_subject(device_id), (*_DEVICE, extension(san)))


def server_profile(names: Sequence[str]) -> Profile:
    """TLS server under DNS names and IP addresses (RFC 9525); raises ``SettingInvalid`` for what is neither."""
    if not names:
        raise SettingInvalid("A server certificate needs at least one DNS name or IP address.")
    fits = len(names[0]) <= COMMON_NAME_LIMIT
    subject = _subject(names[0]) if fits else x509.Name([])
    san = x509.SubjectAlternativeName([_server_name(name) for name in dict.fromkeys(names)])
    # Where the subject is empty, the names must be critical (RFC 5280 §4.1.2.6).
    return Profile(subject, (*_SERVER, extension(san, critical=not fits)))


def responder_profile(issuer_name: str) -> Profile:
    """OCSP responder of one CA, which lives shortly enough not to be checked itself (RFC 6960 §4.2.2.2.1)."""
    return Profile(_subject(f"OCSP responder of {issuer_name}"[:COMMON_NAME_LIMIT]), _RESPONDER, Told.NOWHERE)


@lru_cache(maxsize=64)
def locations(pki_url: str, issuer_name: str, revocation: Told) -> tuple[Extension, ...]:
    """Say where CRL, issuer's certificate and OCSP responder are (RFC 5280 §4.2.1.13, §4.2.2.1), below ``pki_url``."""
    if revocation is Told.NOWHERE:
        return ()
    if not _URL.fullmatch(pki_url):
        raise SettingInvalid("The base of the URLs in certificates must be an http:// URL in ASCII.")
    base = pki_url.rstrip("/")
    crl = x509.UniformResourceIdentifier(f"{base}/crl/{issuer_name}.crl")
    certificate = x509.UniformResourceIdentifier(f"{base}/ca/{issuer_name}.cer")
    point = x509.DistributionPoint(full_name=[crl], relative_name=None, reasons=None, crl_issuer=None)
    access = [x509.AccessDescription(AuthorityInformationAccessOID.CA_ISSUERS, certificate)]
    if revocation is Told.BY_CRL_AND_OCSP:
        ocsp = x509.UniformResourceIdentifier(f"{base}/ocsp")
        access.append(x509.AccessDescription(AuthorityInformationAccessOID.OCSP, ocsp))
    return extension(x509.CRLDistributionPoints([point])), extension(x509.AuthorityInformationAccess(access))


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _ca_subject(common_name: str) -> x509.Name:
    if not 1 <= len(common_name) <= COMMON_NAME_LIMIT or not common_name.isprintable():
        raise SettingInvalid(f"The name of a CA must have 1 to {COMMON_NAME_LIMIT} printable characters.")
    return _subject(common_name)


def _server_name(name: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        pass
    else:
        if "%" in name:
            raise SettingInvalid(f"{name!r} has a zone; a server certificate can only hold the address without it.")
        return x509.IPAddress(address)
    labels = name.removeprefix("*.").split(".")
    if len(name) > 253 or labels[-1].isdigit() or not all(_DNS_LABEL.fullmatch(label) for label in labels):
        raise SettingInvalid(f"{name!r} cannot stand in a server certificate; it must be a DNS name or an IP address.")
    return x509.DNSName(name)
