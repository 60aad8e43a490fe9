"""Check the certificate and key of a TLS server that somebody else has issued, and find what its clients must trust."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from core.errors import ServerCertificateRefused
from pki.encoding import failing_as
from pki.outer_chain import named, spki

MAX_FILE_BYTES = 64 * 1024
_MAX_CERTIFICATES = 10
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL: dates are compared with the time that the caller gives.
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
_TRIES = 10  # messages of a handshake, each way


@dataclass(frozen=True, slots=True)
class ServerPair:
    """A server's chain without its root, its key (PKCS#8), and the roots that clients must trust; all in PEM."""

    chain: bytes
    key: bytes
    roots: bytes

    def __repr__(self) -> str:  # never the key
        return "ServerPair()"


def check_pair(
    chain: bytes, key: bytes, names: Sequence[str], known: Sequence[x509.Certificate], *, now: datetime
) -> ServerPair:
    """Check that clients which trust the root can verify the server, by each of ``names``.

    ``chain`` has the server's certificate first, then those of the CAs above it, in PEM; ``key`` is its private key in
    PEM, not encrypted. The root is the file's, or one of ``known``, or of those that the system trusts. Chain, purpose,
    names and strength are checked by OpenSSL as a client does, in a handshake (RFC 5280 section 6.1, RFC 9525). ``*``
    in a name stands for any label. Raise ``ServerCertificateRefused``.
    """
    certificates, private_key = _certificates(chain), _private_key(key)
    leaf = certificates[0]
    if spki(private_key.public_key()) != spki(leaf.public_key()):
        raise ServerCertificateRefused(f"the key is not that of {named(leaf)}; give the two that belong together.")
    if _is_signed_by(leaf, leaf) and not _is_ca(leaf):
        raise ServerCertificateRefused(
            f"{named(leaf)} is signed by itself and is no CA's, so clients cannot trust it; give one of a CA."
        )
    path = _path(leaf, certificates)
    roots = [one for one in certificates if _is_signed_by(one, one) and _is_ca(one)]
    path, root = _up_to_root(path, [*roots, *known])
    for certificate in dict.fromkeys((*path, root)):
        _check_dates(certificate, now)
    pair = ServerPair(
        chain=_pem(path),
        key=private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        roots=_pem(list(dict.fromkeys((root, *roots)))),
    )
    _rehearse(pair, _pem([root]).decode(), names)
    return pair


def names_shown(chain: bytes) -> tuple[str, ...]:
    """Return the DNS names, which may begin with ``*``, and addresses of a server's certificate, the first in PEM.

    Raise ``ValueError`` if it cannot be read.
    """
    certificate = x509.load_pem_x509_certificate(chain)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress))


# --- The files ----------------------------------------------------------------------------------------------------


def _certificates(content: bytes) -> list[x509.Certificate]:
    unreadable = ServerCertificateRefused(
        "it cannot be read as certificates in PEM; give the server's, followed by those of the CAs above it."
    )
    with failing_as(unreadable):
        certificates = list(dict.fromkeys(x509.load_pem_x509_certificates(content)))
        for certificate in certificates:
            certificate.public_key(), list(certificate.extensions)
            certificate.subject.rfc4514_string(), certificate.issuer.rfc4514_string()
    if len(certificates) > _MAX_CERTIFICATES:
        raise ServerCertificateRefused(f"it has more than {_MAX_CERTIFICATES} certificates; give the chain alone.")
    return certificates


def _private_key(content: bytes) -> PrivateKeyTypes:
    try:
        return load_pem_private_key(content, None)
    except TypeError:
        raise ServerCertificateRefused(
            "the key is encrypted; give it without a passphrase, in a file with mode 0600."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ServerCertificateRefused("the key cannot be read as a private key in PEM.") from None


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


# --- The chain ----------------------------------------------------------------------------------------------------


def _path(leaf: x509.Certificate, certificates: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """Return the server's certificate and those above it in the file, each signed by the next, without a root."""
    path = [leaf]
    while True:
        above = (one for one in certificates if one not in path and not _is_signed_by(one, one))
        signer = next((one for one in above if _is_signed_by(path[-1], one)), None)
        if signer is None:
            return path
        path.append(signer)


def _up_to_root(
    path: list[x509.Certificate], known: Sequence[x509.Certificate]
) -> tuple[list[x509.Certificate], x509.Certificate]:
    """Return the path up to the first certificate that a root has signed, and that root.

    Not the whole path, because the file may go on with a cross certificate of a root that clients know already.
    """
    found = _first_signed(path, known) or _first_signed(path, _roots_of_system(path))
    if found is not None:
        return path[: path.index(found[0]) + 1], found[1]
    raise ServerCertificateRefused(
        f"{named(path[-1])} is signed by {path[-1].issuer.rfc4514_string()[:200]}, whose certificate is neither in the"
        " file nor among the roots that this system trusts; append the certificates up to the root to the file."
    )


def _first_signed(
    path: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]
) -> tuple[x509.Certificate, x509.Certificate] | None:
    for certificate in path:
        for root in roots:
            if _is_signed_by(root, root) and _is_signed_by(certificate, root):
                return certificate, root
    return None


def _roots_of_system(path_up: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """Return those of the system's roots whose names are those of an issuer in the path."""
    path = ssl.get_default_verify_paths().cafile
    if not path:
        return []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(OSError):
        context.load_verify_locations(path)
    issuers = [certificate.issuer.public_bytes() for certificate in path_up]
    # Looked for in the bytes first: reading each would warn of old ones that break RFC 5280.
    named_so = (der for der in context.get_ca_certs(binary_form=True) if any(name in der for name in issuers))
    return [x509.load_der_x509_certificate(der) for der in named_so]


def _is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _check_dates(certificate: x509.Certificate, now: datetime) -> None:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        raise ServerCertificateRefused(f"{named(certificate)} is not valid before {begins:%Y-%m-%d %H:%M:%S} UTC.")
    if now >= ends:
        raise ServerCertificateRefused(f"{named(certificate)} expired at {ends:%Y-%m-%d %H:%M:%S} UTC; renew it.")


# --- As a client sees it ------------------------------------------------------------------------------------------


def _rehearse(pair: ServerPair, root: str, names: Sequence[str]) -> None:
    """Do the handshake with a client that trusts the root alone, and asks for each name."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        with _in_memory(pair.chain + pair.key) as path:
            server.load_cert_chain(path)
    except ssl.SSLError as error:
        reason = (error.reason or "UNUSABLE").replace("_", " ").lower()
        raise ServerCertificateRefused(f"TLS does not accept the certificate or its key: {reason}.") from None
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # As Python's clients check since 3.13, the commands among them.
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT | _NO_CHECK_TIME
    client.load_verify_locations(cadata=root)
    for name in names:
        try:
            _shake_hands(server, client, name.replace("*", "any"))
        except ssl.SSLCertVerificationError as error:
            raise ServerCertificateRefused(
                f"clients that ask for {name} would refuse it: {error.verify_message.rstrip('.')}."
            ) from None
        except ssl.SSLError as error:
            reason = (error.reason or "no reason given").replace("_", " ").lower()
            raise ServerCertificateRefused(f"no TLS connection can be made with it: {reason}.") from None


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(_TRIES):
        for side in tuple(sides):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                sides.remove(side)
        if not sides:
            return


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """Give a key to OpenSSL, which reads files only, without one on a disk."""
    descriptor = os.memfd_create("server", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
