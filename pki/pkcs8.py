"""Encrypts a private key as PKCS#8 with enough work to slow down the guessing of a passphrase."""

from __future__ import annotations

import secrets

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pki.algorithms import PrivateKey
from pki.pem import pem

# pyca's own encryption of PKCS#8 is fixed at 2048 rounds, too few for a passphrase that a person chose. This is what
# OWASP advises for HMAC-SHA256; opening a key takes about 0.1 s.
PBKDF2_ROUNDS = 600_000

_SEQUENCE, _INTEGER, _OCTETS = 0x30, 0x02, 0x04
_PBES2 = bytes.fromhex("06092a864886f70d01050d")
_PBKDF2 = bytes.fromhex("06092a864886f70d01050c")
_HMAC_WITH_SHA256 = bytes.fromhex("300c06082a864886f70d02090500")  # with its NULL parameters
_AES_256_CBC = bytes.fromhex("060960864801650304012a")


def encrypt_private_key(key: PrivateKey, passphrase: bytes, *, rounds: int = PBKDF2_ROUNDS) -> bytes:
    """Return an EncryptedPrivateKeyInfo (RFC 5958 §3) as PEM: PBES2, PBKDF2 with HMAC-SHA256, AES-256-CBC (RFC 8018).

    ``openssl pkey`` opens it, and so does ``load_pem_private_key``.
    """
    salt, vector = secrets.token_bytes(16), secrets.token_bytes(16)
    padder = PKCS7(128).padder()
    clear = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    encryptor = Cipher(
        algorithms.AES256(PBKDF2HMAC(hashes.SHA256(), 32, salt, rounds).derive(passphrase)), modes.CBC(vector)
    ).encryptor()
    sealed = encryptor.update(padder.update(clear) + padder.finalize()) + encryptor.finalize()
    count = rounds.to_bytes(rounds.bit_length() // 8 + 1, "big")
    kdf = _tlv(_SEQUENCE, _PBKDF2, _tlv(_SEQUENCE, _tlv(_OCTETS, salt), _tlv(_INTEGER, count), _HMAC_WITH_SHA256))
    cipher = _tlv(_SEQUENCE, _AES_256_CBC, _tlv(_OCTETS, vector))
    scheme = _tlv(_SEQUENCE, _PBES2, _tlv(_SEQUENCE, kdf, cipher))
    return pem("ENCRYPTED PRIVATE KEY", _tlv(_SEQUENCE, scheme, _tlv(_OCTETS, sealed))).encode()


def _tlv(tag: int, *parts: bytes) -> bytes:
    """Encode one DER value (X.690 §8.1.3)."""
    content = b"".join(parts)
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + content
