"""What a place for the private keys of the CAs can do, and what is known of a key there."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from core.errors import CaKeyUnavailable
from pki.algorithms import KeyType, PrivateKey, PublicKey


class Origin(StrEnum):
    """How a key came to where it is."""

    FILE = "file"
    BORN_IN_TOKEN = "born in the token"  # noqa: S105 - made there, and it never could leave
    IMPORTED = "imported"  # a token has it, but it was elsewhere before, or could have been read
    UNKNOWN = "unknown"  # a token that does not tell


@dataclass(frozen=True, slots=True)
class KeyDescription:
    """Where a CA's key is: ``place`` is the path of its file, or the URI of its token without module and PIN."""

    name: str
    place: str
    origin: Origin
    can_leave: bool = False  # whether its token says that it can be read


class CaKeys(Protocol):
    """The interface of a backend that keeps CA keys.

    Each method raises ``CaKeyUnavailable`` if the key cannot be had, ``TokenUnavailable`` if its token cannot be asked.
    """

    def exists(self, name: str) -> bool:
        """Return whether there is a key of that name here, or was begun; a root's key may have been moved away.

        Asks no token: what is known of its keys is recorded in the CA folder.
        """
        ...

    def create(self, name: str, kind: KeyType) -> PrivateKey:
        """Make and keep a new key; an existing one is never replaced."""
        ...

    def adopt(self, name: str, key: PrivateKey) -> PrivateKey:
        """Keep a key that was made elsewhere; an existing one is never replaced."""
        ...

    def load(self, name: str) -> PrivateKey:
        """Return the key, ready to sign; that of a token asks the token when it signs, and not before."""
        ...

    def destroy(self, name: str) -> None:
        """Destroy a key, and what is recorded of it; may be repeated."""
        ...

    def describe(self, name: str) -> KeyDescription:
        """Return where the key is, without asking a token."""
        ...

    def examine(self, name: str) -> KeyDescription:
        """Have the key sign, and return where it is and how it came there, as the token says now."""
        ...


def check_that_it_signs(key: PrivateKey) -> None:
    """Sign a random message and verify it; raises ``CaKeyUnavailable`` if that fails, or as the key's backend does."""
    message = secrets.token_bytes(32)
    if not verifies(key.public_key(), sign_message(key, message), message, hashes.SHA256()):
        raise CaKeyUnavailable("A signature of the CA's key does not verify; check the machine and the key.")


def sign_message(key: PrivateKey, message: bytes) -> bytes:
    """Sign a message: ECDSA with SHA-256 in DER, RSA by PKCS#1 v1.5 with SHA-256, or Ed25519."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(hashes.SHA256()))
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(message, padding.PKCS1v15(), hashes.SHA256())
    return key.sign(message)


def verifies(public_key: PublicKey, signature: bytes, message: bytes, algorithm: hashes.HashAlgorithm) -> bool:
    """Return whether a signature, ECDSA in DER or RSA by PKCS#1 v1.5, is that of the key (Ed25519: no hash)."""
    try:
        if isinstance(public_key, ed25519.Ed25519PublicKey):
            public_key.verify(signature, message)
        elif isinstance(public_key, rsa.RSAPublicKey):
            public_key.verify(signature, message, padding.PKCS1v15(), algorithm)
        else:
            public_key.verify(signature, message, ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return True
