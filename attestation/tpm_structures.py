"""Read and name the structures of a TPM 2.0 that evidence consists of (TPM 2.0 Library, part 2: Structures)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntFlag

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from attestation.evidence import PcrBank
from attestation.refusals import EvidenceMalformed
from pki.algorithms import PublicKey
from pki.encoding import failing_as

HASHES: Mapping[int, hashes.SHA256 | hashes.SHA384 | hashes.SHA512] = {
    PcrBank.SHA256: hashes.SHA256(),
    PcrBank.SHA384: hashes.SHA384(),
    PcrBank.SHA512: hashes.SHA512(),
}
CERTIFY, QUOTE = 0x8017, 0x8018  # TPM_ST
_GENERATED = 0xFF544347  # TPM_GENERATED_VALUE: a restricted key signs no other data that begins with it
_RSA, _ECC, _NULL = 0x0001, 0x0023, 0x0010
_RSASSA, _RSAES, _RSAPSS, _ECDSA, _ECDAA = 0x0014, 0x0015, 0x0016, 0x0018, 0x001A
_CURVES: Mapping[int, ec.EllipticCurve] = {0x0003: ec.SECP256R1(), 0x0004: ec.SECP384R1()}
_MAX_SELECTIONS = 8


class Attributes(IntFlag):
    """TPMA_OBJECT: what a TPM lets a key do (part 2, §8.3)."""

    FIXED_TPM = 1 << 1
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18


NATIVE = Attributes.FIXED_TPM | Attributes.FIXED_PARENT | Attributes.SENSITIVE_DATA_ORIGIN  # made there, stays there


class Reader:
    """Takes numbers and sized buffers off a structure, big-endian; raises ``EvidenceMalformed`` where it ends early."""

    def __init__(self, content: bytes, what: str) -> None:
        self._content, self._at, self._what = content, 0, what

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        found = self._content[self._at : self._at + size]
        if len(found) != size:
            raise self.malformed()
        self._at += size
        return found

    def number(self, size: int) -> int:
        """Return the next number, of so many bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """Return the content of a TPM2B: two bytes of length, then so many."""
        return self.take(self.number(2))

    def end(self) -> None:
        """Raise ``EvidenceMalformed`` unless everything was taken."""
        if self._at != len(self._content):
            raise self.malformed()

    def malformed(self) -> EvidenceMalformed:
        """Return the refusal."""
        return EvidenceMalformed(f"{self._what} cannot be read.")


# --- Keys ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Public:
    """A TPMT_PUBLIC (part 2, §12.2.4): ``name`` is that of the object (part 1, §16)."""

    key: PublicKey
    attributes: Attributes
    name: bytes


def read_public(content: bytes, what: str) -> Public:
    """Read a TPMT_PUBLIC of an RSA or ECC key; raises ``EvidenceMalformed``."""
    reader = Reader(content, what)
    kind, name_algorithm, attributes = reader.number(2), reader.number(2), reader.number(4)
    reader.sized()  # authPolicy
    if name_algorithm not in HASHES or kind not in (_RSA, _ECC):
        raise EvidenceMalformed(f"{what} is no RSA or ECC key named by SHA-256, SHA-384 or SHA-512.")
    if reader.number(2) != _NULL:  # symmetric: of keys that protect others
        reader.take(4)
    _skip_scheme(reader)
    with failing_as(reader.malformed()):
        key: PublicKey = _rsa(reader) if kind == _RSA else _ecc(reader)
    reader.end()
    digest = hashlib.new(HASHES[name_algorithm].name, content).digest()
    return Public(key, Attributes(attributes), name_algorithm.to_bytes(2, "big") + digest)


def _skip_scheme(reader: Reader) -> None:
    scheme = reader.number(2)
    if scheme not in (_NULL, _RSAES):
        reader.number(2)  # the hash
    if scheme == _ECDAA:
        reader.number(2)


def _rsa(reader: Reader) -> rsa.RSAPublicKey:
    reader.number(2)  # bits
    exponent = reader.number(4) or 65537
    modulus = int.from_bytes(reader.sized(), "big")
    return rsa.RSAPublicNumbers(exponent, modulus).public_key()


def _ecc(reader: Reader) -> ec.EllipticCurvePublicKey:
    curve = _CURVES[reader.number(2)]
    if reader.number(2) != _NULL:  # the key derivation scheme
        reader.number(2)
    x, y = (int.from_bytes(reader.sized(), "big") for _ in range(2))
    return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()


# --- Attestations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selection:
    """The PCRs of one bank."""

    bank: PcrBank
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attested:
    """A TPMS_ATTEST (part 2, §10.12.8): that of a certification has a name, that of a quote selections and digest."""

    kind: int
    extra_data: bytes
    name: bytes = b""
    selections: tuple[Selection, ...] = ()
    digest: bytes = field(default=b"")


def read_attested(content: bytes, kind: int, what: str) -> Attested:
    """Read a TPMS_ATTEST of this kind; raises ``EvidenceMalformed``."""
    reader = Reader(content, what)
    if (reader.number(4), reader.number(2)) != (_GENERATED, kind):
        raise EvidenceMalformed(f"{what} was not made by a TPM for this purpose.")
    reader.sized()  # qualifiedSigner
    extra_data = reader.sized()
    reader.take(8 + 4 + 4 + 1 + 8)  # clock, resets, restarts, safe, firmware version
    if kind == CERTIFY:
        found = Attested(kind, extra_data, name=reader.sized())
        reader.sized()  # qualifiedName
    else:
        found = Attested(kind, extra_data, selections=_selections(reader), digest=reader.sized())
    reader.end()
    return found


def _selections(reader: Reader) -> tuple[Selection, ...]:
    count = reader.number(4)
    if count > _MAX_SELECTIONS:
        raise reader.malformed()
    found = []
    for _ in range(count):
        bank, bitmap = reader.number(2), reader.take(reader.number(1))
        numbers = tuple(8 * at + bit for at, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1)
        if bank not in HASHES:
            raise reader.malformed()
        found.append(Selection(PcrBank(bank), numbers))
    return tuple(found)


# --- Signatures ----------------------------------------------------------------------------------------------------


def is_signed(key: PublicKey, signature: bytes, content: bytes) -> hashes.HashAlgorithm | None:
    """Verify a TPMT_SIGNATURE (part 2, §11.3.4) and return its hash, or ``None`` if it does not verify.

    RSASSA and RSAPSS with an RSA key, ECDSA with an ECC key; SHA-256 to SHA-512. Raises ``EvidenceMalformed``.
    """
    reader = Reader(signature, "A signature in the evidence")
    scheme, algorithm = reader.number(2), reader.number(2)
    if algorithm not in HASHES or scheme not in (_RSASSA, _RSAPSS, _ECDSA):
        return None
    digest = HASHES[algorithm]
    parts = [reader.sized() for _ in range(2 if scheme == _ECDSA else 1)]
    reader.end()
    try:
        match key:
            case rsa.RSAPublicKey() if scheme == _RSASSA:
                key.verify(parts[0], content, padding.PKCS1v15(), digest)
            case rsa.RSAPublicKey() if scheme == _RSAPSS:
                # The TPM's salt is as long as the key allows, or as the hash (part 1, annex B.7).
                key.verify(parts[0], content, padding.PSS(padding.MGF1(digest), padding.PSS.AUTO), digest)
            case ec.EllipticCurvePublicKey() if scheme == _ECDSA:
                r, s = (int.from_bytes(part, "big") for part in parts)
                key.verify(encode_dss_signature(r, s), content, ec.ECDSA(digest))
            case _:
                return None
    except InvalidSignature:
        return None
    return digest
