"""Private keys that stay in a token, for ``cryptography``'s builders of certificates and CRLs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric import utils as asym_utils
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding, PKCS1v15
from cryptography.utils import Buffer

from core.errors import CaKeyUnavailable, TokenUnavailable
from pki.algorithms import PrivateKey, PublicKey
from pki.keys.contract import verifies

# Signs the bytes by a mechanism, ``ecdsa``, ``rsa`` or ``eddsa``; ``again`` is set if the first signature was wrong.
Sign = Callable[[str, bytes, bool], bytes]
# DigestInfo up to the digest (RFC 8017 section 9.2, note 1).
_DIGEST_INFO = {
    "sha256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "sha384": bytes.fromhex("3041300d060960864801650304020205000430"),
    "sha512": bytes.fromhex("3051300d060960864801650304020305000440"),
}


def token_key(public_key: PublicKey, sign: Sign) -> PrivateKey:
    """Return the private key of ``public_key`` whose signatures ``sign`` makes; each is verified."""
    if isinstance(public_key, rsa.RSAPublicKey):
        return RsaTokenKey(public_key, sign)
    if isinstance(public_key, ed25519.Ed25519PublicKey):
        return Ed25519TokenKey(public_key, sign)
    return EcTokenKey(public_key, sign)


def is_in_token(key: PrivateKey) -> bool:
    """Return whether a key is in a token, so that its private part cannot be read."""
    return isinstance(key, RsaTokenKey | Ed25519TokenKey | EcTokenKey)


def _never() -> NoReturn:
    raise CaKeyUnavailable("The key is in a token, which it cannot leave.")


def _checked(sign: Callable[[bool], bytes], is_right: Callable[[bytes], bool]) -> bytes:
    """Return a signature that was verified: a token may have been exchanged while a session of it was open."""
    for again in (False, True):
        signature = sign(again)
        if is_right(signature):
            return signature
    raise TokenUnavailable("The token signs by another key than the CA's; put the right token in.")


def _digest(data: bytes, algorithm: hashes.HashAlgorithm) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(data)
    return digest.finalize()


def _hash(algorithm: object) -> hashes.HashAlgorithm:
    if not isinstance(algorithm, hashes.HashAlgorithm):
        raise UnsupportedAlgorithm("keys in tokens sign data, not digests")
    return algorithm


class _InToken:
    """What no key in a token does."""

    def private_numbers(self) -> NoReturn:
        """Raise ``CaKeyUnavailable``."""
        _never()

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,  # noqa: A002 - its name in cryptography
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> NoReturn:
        """Raise ``CaKeyUnavailable``."""
        _never()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> Self:
        return self


class EcTokenKey(_InToken, ec.EllipticCurvePrivateKey):
    """An ECDSA key; the token returns r and s one after the other (PKCS#11 3.0 section 2.3.1)."""

    def __init__(self, public_key: ec.EllipticCurvePublicKey, sign: Sign) -> None:
        self._public_key = public_key
        self._sign = sign

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Return the public key."""
        return self._public_key

    @property
    def curve(self) -> ec.EllipticCurve:
        """The curve."""
        return self._public_key.curve

    @property
    def key_size(self) -> int:
        """Bits of the curve's field."""
        return self._public_key.key_size

    def sign(self, data: Buffer, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """Return an Ecdsa-Sig-Value in DER (RFC 3279 section 2.2.3); raises ``TokenUnavailable``."""
        algorithm = _hash(signature_algorithm.algorithm)
        message = bytes(data)
        digest = _digest(message, algorithm)

        def signed(again: bool) -> bytes:
            raw = self._sign("ecdsa", digest, again)
            half = len(raw) // 2
            r, s = int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big")
            return asym_utils.encode_dss_signature(r, s)

        return _checked(signed, lambda signature: verifies(self._public_key, signature, message, algorithm))

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> NoReturn:
        """Raise ``CaKeyUnavailable``: a CA's key signs, and does nothing else."""
        _never()


class RsaTokenKey(_InToken, rsa.RSAPrivateKey):
    """An RSA key; the token pads and signs what is the input of PKCS#1 v1.5 (PKCS#11 3.0 section 2.1.6)."""

    def __init__(self, public_key: rsa.RSAPublicKey, sign: Sign) -> None:
        self._public_key = public_key
        self._sign = sign

    def public_key(self) -> rsa.RSAPublicKey:
        """Return the public key."""
        return self._public_key

    @property
    def key_size(self) -> int:
        """Bits of the modulus."""
        return self._public_key.key_size

    def sign(
        self,
        data: bytes,
        padding: AsymmetricPadding,
        algorithm: asym_utils.Prehashed | hashes.HashAlgorithm | asym_utils.NoDigestInfo,
    ) -> bytes:
        """Return a signature by PKCS#1 v1.5; raises ``TokenUnavailable``."""
        hashed = _hash(algorithm)
        if not isinstance(padding, PKCS1v15) or hashed.name not in _DIGEST_INFO:
            raise UnsupportedAlgorithm("RSA keys in tokens sign by PKCS#1 v1.5 with SHA-2")
        info = _DIGEST_INFO[hashed.name] + _digest(data, hashed)
        return _checked(
            lambda again: self._sign("rsa", info, again),
            lambda signature: verifies(self._public_key, signature, data, hashed),
        )

    def decrypt(self, ciphertext: bytes, padding: AsymmetricPadding) -> NoReturn:
        """Raise ``CaKeyUnavailable``: a CA's key signs, and does nothing else."""
        _never()


class Ed25519TokenKey(_InToken, ed25519.Ed25519PrivateKey):
    """An Ed25519 key; the token is given the whole message (RFC 8032)."""

    def __init__(self, public_key: ed25519.Ed25519PublicKey, sign: Sign) -> None:
        self._public_key = public_key
        self._sign = sign

    def public_key(self) -> ed25519.Ed25519PublicKey:
        """Return the public key."""
        return self._public_key

    def sign(self, data: Buffer) -> bytes:
        """Return a signature of 64 bytes; raises ``TokenUnavailable``."""
        message = bytes(data)
        return _checked(
            lambda again: self._sign("eddsa", message, again),
            lambda signature: verifies(self._public_key, signature, message, hashes.SHA512()),
        )

    def private_bytes_raw(self) -> NoReturn:
        """Raise ``CaKeyUnavailable``."""
        _never()
