"""The signature over a DER structure, such as a certificate or a CRL: which bytes it covers, making it, checking it."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa

from pki.algorithms import PrivateKey

SEQUENCE, BIT_STRING = 0x30, 0x03
VerifyingKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey


@dataclass(frozen=True, slots=True)
class Signed:
    """SEQUENCE { what is signed, AlgorithmIdentifier, BIT STRING }: its parts with tag and length, uncopied."""

    content: memoryview
    algorithm: memoryview
    signature: bytes  # without tag, length and the count of unused bits


def take_apart(der: bytes) -> Signed:
    """Find the parts of a signed structure (RFC 5280 §4.1, §5.1); raises ``ValueError`` where it is none."""
    view = memoryview(der)
    whole = children(view)
    content, algorithm, signature = whole
    if len(whole) != 3 or content[0] != SEQUENCE or algorithm[0] != SEQUENCE or signature[0] != BIT_STRING:
        raise ValueError("not a signed structure")
    bits = value_of(signature)
    if len(bits) < 1 or bits[0] != 0:
        raise ValueError("a signature must be whole bytes")
    return Signed(content, algorithm, bytes(bits[1:]))


def children(element: memoryview) -> list[memoryview]:
    """The elements inside the constructed DER ``element``, each with its tag and length; raises ``ValueError``."""
    inner, position, found = value_of(element), 0, []
    while position < len(inner):
        start, length = _extent(inner, position)
        found.append(inner[position : start + length])
        position = start + length
    return found


def value_of(element: memoryview) -> memoryview:
    """What stands inside one DER element, without tag and length; raises ``ValueError``."""
    start, length = _extent(element, 0)
    if start + length != len(element):
        raise ValueError("DER is followed by something")
    return element[start:]


def element(tag: int, *parts: bytes | memoryview) -> bytes:
    """Write one DER element of the parts one after the other (X.690 §8.1.3, §10.1)."""
    length = sum(map(len, parts))
    if length < 0x80:
        head = bytes([tag, length])
    else:
        size = (length.bit_length() + 7) // 8
        head = bytes([tag, 0x80 | size]) + length.to_bytes(size, "big")
    return b"".join([head, *parts])


def _extent(data: memoryview, position: int) -> tuple[int, int]:
    """Where the value of the element at ``position`` begins, and how long it is."""
    try:
        first = data[position + 1]
        start = position + 2
        length = first
        if first & 0x80:
            size = first & 0x7F
            if not 1 <= size <= 8:
                raise ValueError("DER has a length that is none")
            length = int.from_bytes(data[start : start + size], "big")
            start += size
    except IndexError:
        raise ValueError("DER ends too early") from None
    if data[position] & 0x1F == 0x1F or start + length > len(data):
        raise ValueError("DER ends too early")
    return start, length


def sign(key: PrivateKey, algorithm: hashes.SHA256 | hashes.SHA384 | None, content: bytes) -> bytes:
    """Sign bytes as certificates and CRLs are signed by this kind of key (RFC 5758 §3.2, RFC 4055 §5, RFC 8410 §6)."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(content)
    if algorithm is None:
        raise ValueError("only Ed25519 signs without a hash")
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(content, padding.PKCS1v15(), algorithm)
    return key.sign(content, ec.ECDSA(algorithm))


def verifies(key: VerifyingKey, algorithm: hashes.HashAlgorithm | None, signature: bytes, content: bytes) -> bool:
    """Whether a signature over ``content`` is of this key; ``algorithm`` is the hash that the structure names."""
    try:
        if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
            key.verify(signature, content)
        elif algorithm is None:
            return False
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, content, padding.PKCS1v15(), algorithm)
        else:
            key.verify(signature, content, ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return True
