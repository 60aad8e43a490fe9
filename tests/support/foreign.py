"""CSRs and certificates as programs of devices and their manufacturers write them, element by element."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.ocsp import extension, integer, oid, sequence, tlv

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

# One request of each program, or of its kind, as they were sent.
FILES = sorted((Path(__file__).parent / "foreign_csrs").glob("*.csr"))
NULL = b"\x05\x00"
COMMON_NAME, SERIAL_NUMBER = "550403", "550405"
KEY_IDENTIFIER = "551d0e"
ALTERNATIVE_NAMES, KEY_USAGE, BASIC_CONSTRAINTS, PURPOSES = "551d11", "551d0f", "551d13", "551d25"
EXTENSION_REQUEST, CHALLENGE_PASSWORD = "2a864886f70d01090e", "2a864886f70d010907"
ECDSA_WITH_SHA256, SHA256_WITH_RSA, ED25519 = "2a8648ce3d040302", "2a864886f70d01010b", "2b6570"
RSA_ENCRYPTION = "2a864886f70d010101"
UTF8, PRINTABLE, T61, UNIVERSAL, BMP = 0x0C, 0x13, 0x14, 0x1C, 0x1E


def name(*values: tuple[str, int, bytes]) -> bytes:
    """A Name of attributes: OID in hex, tag of the string, its bytes."""
    return sequence(*(tlv(0x31, sequence(oid(kind), tlv(tag, text))) for kind, tag, text in values))


DEVICE = name((COMMON_NAME, UTF8, b"sensor-1"))


def public_key(key: Key) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def algorithm(key: Key, parameters: bytes | None = None) -> bytes:
    """The AlgorithmIdentifier of this key's signatures, with the usual parameters or others."""
    if isinstance(key, rsa.RSAPrivateKey):
        return sequence(oid(SHA256_WITH_RSA), NULL if parameters is None else parameters)
    kind = ED25519 if isinstance(key, ed25519.Ed25519PrivateKey) else ECDSA_WITH_SHA256
    return sequence(oid(kind), parameters or b"")


def signature(key: Key, content: bytes) -> bytes:
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(content, padding.PKCS1v15(), hashes.SHA256())
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(content)
    return key.sign(content, ec.ECDSA(hashes.SHA256()))


def signed(key: Key, content: bytes, signed_with: bytes | None = None) -> bytes:
    return sequence(content, signed_with or algorithm(key), tlv(3, b"\0", signature(key, content)))


@dataclass
class ForeignCsr:
    """A PKCS#10 request; each part is DER, or what stands in its place."""

    key: Key
    version: bytes = b"\x02\x01\x00"
    subject: bytes = DEVICE
    attributes: bytes = b"\xa0\x00"
    key_info: bytes | None = None
    signed_with: bytes | None = None

    def der(self) -> bytes:
        content = sequence(self.version, self.subject, self.key_info or public_key(self.key), self.attributes)
        return signed(self.key, content, self.signed_with)


def attributes(*found: tuple[str, tuple[bytes, ...]]) -> bytes:
    """Attributes: OID in hex, values in DER."""
    return tlv(0xA0, *(sequence(oid(kind), tlv(0x31, *values)) for kind, values in found))


def extension_request(*extensions: bytes) -> bytes:
    return attributes((EXTENSION_REQUEST, (sequence(*extensions),)))


@dataclass
class ForeignCertificate:
    """A certificate valid from 2020 to 2049; each part is DER, or what stands in its place."""

    key: Key
    issuer_key: Key
    issuer: bytes
    subject: bytes = DEVICE
    serial_number: bytes = field(default_factory=lambda: integer(7))
    extensions: tuple[bytes, ...] = ()
    signed_with: bytes | None = None
    inner: bytes | None = None

    def der(self) -> bytes:
        dates = sequence(*(tlv(0x17, date) for date in (b"200101000000Z", b"491231235959Z")))
        content = sequence(
            tlv(0xA0, integer(2)),
            self.serial_number,
            self.inner or self.signed_with or algorithm(self.issuer_key),
            self.issuer,
            dates,
            self.subject,
            public_key(self.key),
            tlv(0xA3, sequence(*self.extensions)) if self.extensions else b"",
        )
        return signed(self.issuer_key, content, self.signed_with)


NOT_AFTER = datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)
CA = extension(BASIC_CONSTRAINTS, sequence(tlv(1, b"\xff")), critical=True)
