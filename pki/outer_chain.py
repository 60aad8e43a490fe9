"""Check the chain of an issuing CA below a root of somebody else, such as a company's (RFC 5280 section 6.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from core.errors import CaChainRefused
from core.server_command import server_command
from pki.encoding import encode_sequence, failing_as, sequence_elements

MAX_CHAIN_BYTES = 64 * 1024
MAX_CHAIN = 7  # certificates from the issuing CA to the root: with the device's, what the bundle's check allows
_MIN_RSA_BITS, _MIN_CURVE_BITS = 2048, 256  # OpenSSL's security level 2, Debian's default, refuses less
_STRONG = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_NEEDED_PURPOSES = frozenset({ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH})
# Extensions that a client which checks the chain understands; any other one must not be critical (section 4.2).
_UNDERSTOOD = (
    x509.BasicConstraints,
    x509.KeyUsage,
    x509.ExtendedKeyUsage,
    x509.NameConstraints,
    x509.CertificatePolicies,
    x509.PolicyConstraints,
    x509.InhibitAnyPolicy,
    x509.SubjectAlternativeName,
    x509.CRLDistributionPoints,
)


@dataclass(frozen=True, slots=True)
class OuterChain:
    """An issuing CA of the portal, called ``name``, with the CAs ``above`` it: its issuer first, the root last."""

    name: str
    issuing: x509.Certificate
    above: tuple[x509.Certificate, ...]


def encode_above(above: Sequence[x509.Certificate]) -> bytes:
    """Encode the CAs above an issuing CA for the database: a DER SEQUENCE OF Certificate."""
    return encode_sequence(*(certificate.public_bytes(Encoding.DER) for certificate in above))


def decode_above(der: bytes | None) -> tuple[x509.Certificate, ...]:
    """Return what ``encode_above`` has encoded, nothing for ``None``."""
    return () if der is None else tuple(x509.load_der_x509_certificate(one) for one in sequence_elements(der))


def spki(key: object) -> bytes:
    """Encode a public key of whatever kind as SubjectPublicKeyInfo, by which it is compared."""
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return encoded


def read_chain(content: bytes, requested: Mapping[bytes, str], *, now: datetime) -> OuterChain:
    """Read and check a file of PEM certificates: that of an issuing CA, and of the CAs above it up to their root.

    They may be in any order, with any text around them. ``requested`` has the names of the issuing CAs that it
    may be for, by their public keys. Raise ``CaChainRefused``.
    """
    certificates = _read(content)
    own = [certificate for certificate in certificates if spki(certificate.public_key()) in requested]
    if not own:
        known = ", ".join(sorted(requested.values())) or "none"
        raise CaChainRefused(
            f"No certificate in the file is for a key that was made here ({known}): have the request signed that is"
            f" printed by {server_command('ca request')}."
        )
    if len(own) > 1:
        raise CaChainRefused("The file has several certificates for keys that were made here; give one of them.")
    path = _path(own[0], certificates)
    if extra := [named(certificate) for certificate in certificates if certificate not in path]:
        raise CaChainRefused(
            f"{extra[0]} is not above {named(own[0])}: leave in the file only that and the CAs up to its root."
        )
    for below, certificate in enumerate(path):
        _check_extensions(certificate)
        _check_dates(certificate, now)
        _check_ca(certificate, below)
        _check_strength(certificate, is_root=below == len(path) - 1)
    _check_issuing(path)
    return OuterChain(requested[spki(own[0].public_key())], path[0], tuple(path[1:]))


def named(certificate: x509.Certificate) -> str:
    """Name a certificate by its subject, for a message: printable, and not longer than 200 characters."""
    text = certificate.subject.rfc4514_string() or "the certificate without a subject"
    return "".join(character if character.isprintable() else "?" for character in text)[:200]


# --- The file -----------------------------------------------------------------------------------------------------


def _read(content: bytes) -> list[x509.Certificate]:
    if len(content) > MAX_CHAIN_BYTES:
        raise CaChainRefused(f"The file is longer than {MAX_CHAIN_BYTES} bytes; it must hold the chain alone.")
    if b"PRIVATE KEY-----" in content:
        raise CaChainRefused("The file has a private key in it; give a file with the certificates alone.")
    unreadable = CaChainRefused(
        "The file cannot be read as certificates in PEM; give that of the issuing CA with those above it, one after"
        " the other."
    )
    with failing_as(unreadable):
        loaded = x509.load_pem_x509_certificates(content)
        certificates = list(dict.fromkeys(loaded))
        for certificate in certificates:
            certificate.public_key(), list(certificate.extensions)
            certificate.subject.rfc4514_string(), certificate.issuer.rfc4514_string()
    if len(loaded) != content.count(b"-----BEGIN "):  # a block is cut off, or is something else
        raise unreadable
    if len(certificates) > MAX_CHAIN:
        raise CaChainRefused(f"The file has more than {MAX_CHAIN} certificates; give the chain alone.")
    return certificates


def _path(issuing: x509.Certificate, certificates: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """Return the certificates from the issuing CA to the root, each signed by the next."""
    path = [issuing]
    while not _is_self_issued(path[-1]):
        path.append(_signer(path[-1], path, certificates))
    if not _is_signed_by(path[-1], path[-1]):
        raise CaChainRefused(f"The root {named(path[-1])} is not signed by its own key; ask for its certificate again.")
    if len(path) == 1:
        raise CaChainRefused(
            f"{named(issuing)} is signed by its own key: have the request signed by the CA that is to be above it."
        )
    return path


def _signer(
    certificate: x509.Certificate, path: Sequence[x509.Certificate], certificates: Sequence[x509.Certificate]
) -> x509.Certificate:
    candidates = [other for other in certificates if other.subject == certificate.issuer]
    candidates.sort(key=_is_self_issued, reverse=True)  # the root itself before a cross certificate of its key
    if not candidates:
        raise CaChainRefused(
            f"{named(certificate)} is signed by {certificate.issuer.rfc4514_string()[:200]}, whose certificate is not"
            " in the file; add the certificates up to the root."
        )
    signer = next((other for other in candidates if _is_signed_by(certificate, other)), None)
    if signer is None:
        raise CaChainRefused(
            f"The signature of {named(certificate)} does not verify under {named(candidates[0])}: that certificate has"
            " another key than the CA that signed."
        )
    if signer in path:
        raise CaChainRefused(f"{named(certificate)} and {named(signer)} have signed each other: there is no root.")
    return signer


def _is_self_issued(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer


def _is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Return whether names, signature and, if both have them, key identifiers are those of the issuer."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    wanted, offered = _authority_key(certificate), _subject_key(issuer)
    return wanted is None or offered is None or wanted == offered


def _authority_key(certificate: x509.Certificate) -> bytes | None:
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.AuthorityKeyIdentifier):
            return extension.value.key_identifier
    return None


def _subject_key(certificate: x509.Certificate) -> bytes | None:
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.SubjectKeyIdentifier):
            return extension.value.digest
    return None


# --- Each certificate ---------------------------------------------------------------------------------------------


def _check_dates(certificate: x509.Certificate, now: datetime) -> None:
    if now < certificate.not_valid_before_utc:
        raise CaChainRefused(
            f"{named(certificate)} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC; wait"
            " until then, or set the clock."
        )
    if now >= certificate.not_valid_after_utc:
        raise CaChainRefused(
            f"{named(certificate)} expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC; have it made"
            " again."
        )


def _check_ca(certificate: x509.Certificate, below: int) -> None:
    """Check that it may sign certificates, with so many CAs ``below`` it (sections 4.2.1.3, 4.2.1.9, 4.2.1.12)."""
    values = {type(extension.value): extension.value for extension in certificate.extensions}
    constraints = values.get(x509.BasicConstraints)
    if not isinstance(constraints, x509.BasicConstraints) or not constraints.ca:
        raise CaChainRefused(f"{named(certificate)} is not that of a CA (basicConstraints CA:TRUE).")
    if constraints.path_length is not None and constraints.path_length < below:
        raise CaChainRefused(
            f"{named(certificate)} has the path length {constraints.path_length}, which is less than the number of CAs"
            f" below it, {below}; have it made with a longer one, or without."
        )
    usage = values.get(x509.KeyUsage)
    if isinstance(usage, x509.KeyUsage) and not usage.key_cert_sign:
        raise CaChainRefused(f"{named(certificate)} may not sign certificates (keyUsage lacks keyCertSign).")
    purposes = values.get(x509.ExtendedKeyUsage)
    if isinstance(purposes, x509.ExtendedKeyUsage):
        allowed = set(purposes)
        if ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in allowed and not allowed >= _NEEDED_PURPOSES:
            raise CaChainRefused(
                f"{named(certificate)} is limited to other purposes than TLS clients and servers (extendedKeyUsage);"
                " it needs clientAuth and serverAuth, or no such extension."
            )


def _check_extensions(certificate: x509.Certificate) -> None:
    for extension in certificate.extensions:
        if extension.critical and not isinstance(extension.value, _UNDERSTOOD):
            raise CaChainRefused(
                f"{named(certificate)} has the critical extension {extension.oid.dotted_string}, which clients do not"
                " know and so refuse."
            )
        if isinstance(extension.value, x509.PolicyConstraints) and extension.value.require_explicit_policy is not None:
            raise CaChainRefused(
                f"{named(certificate)} demands certificate policies (requireExplicitPolicy), and the portal's"
                " certificates have none."
            )


def _check_strength(certificate: x509.Certificate, *, is_root: bool) -> None:
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        strong = key.key_size >= _MIN_RSA_BITS
    elif isinstance(key, ec.EllipticCurvePublicKey):
        strong = key.curve.key_size >= _MIN_CURVE_BITS
    else:
        strong = isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey)
    if not strong:
        raise CaChainRefused(f"{named(certificate)} has a key of a kind or size that TLS does not accept any more.")
    if not is_root and _hash_of(certificate) not in _STRONG:
        raise CaChainRefused(f"{named(certificate)} is not signed with SHA-256, SHA-384, SHA-512 or Ed25519.")


def _hash_of(certificate: x509.Certificate) -> type[hashes.HashAlgorithm] | None:
    """Return the hash of a signature; Ed25519 and Ed448 count as SHA-512."""
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return None
    return hashes.SHA512 if algorithm is None else type(algorithm)


def _check_issuing(path: Sequence[x509.Certificate]) -> None:
    """Check what the portal itself needs of its CA: a name of its own, a CRL, a key identifier, and a life to spend."""
    issuing = path[0]
    if not issuing.subject.rdns:
        raise CaChainRefused("The issuing CA has no name (an empty subject); have it signed with one.")
    if any(one.subject == other.subject for one, other in _pairs(path)):
        raise CaChainRefused("Two CAs in the chain have the same name; have the issuing CA signed with one of its own.")
    usages = [extension.value for extension in issuing.extensions if isinstance(extension.value, x509.KeyUsage)]
    if not usages or not usages[0].key_cert_sign or not usages[0].crl_sign:
        raise CaChainRefused(
            f"{named(issuing)} must have a keyUsage with keyCertSign and cRLSign, since the portal signs certificates"
            " and CRLs with it."
        )
    if _subject_key(issuing) is None:
        raise CaChainRefused(f"{named(issuing)} has no subjectKeyIdentifier; have it signed with one.")


def _pairs(path: Sequence[x509.Certificate]) -> Iterator[tuple[x509.Certificate, x509.Certificate]]:
    return ((one, other) for index, one in enumerate(path) for other in path[index + 1 :])
