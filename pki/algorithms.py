"""Make keys of the kinds that the certificate authority works with, check them, and encode them."""

from __future__ import annotations

import functools
import hashlib
import math
import secrets
from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import SignatureAlgorithmOID
from pyasn1.codec.der import encoder
from pyasn1.type import univ

from core.errors import KeyRefused
from pki.encoding import BIT_STRING, SEQUENCE, encode, join, pem

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey
SignatureHash = hashes.SHA256 | hashes.SHA384 | None

RSA_EXPONENT = 65537
RSA_SIZES = (2048, 3072, 4096)  # bits of modulus that a CSR may bring
# cryptography's own encryption of PKCS#8 is fixed at 2,048 rounds, too few for a passphrase that a person chose. OWASP
# advises this number for HMAC-SHA256; opening a key takes about 0.1 s.
PBKDF2_ROUNDS = 600_000
ACCEPTED = "Use ECDSA P-256 or P-384, Ed25519, or RSA of 2048, 3072 or 4096 bits with exponent 65537."


class KeyType(StrEnum):
    """A kind of key that the portal makes."""

    EC_P256 = "ec-p256"
    EC_P384 = "ec-p384"
    ED25519 = "ed25519"
    RSA_2048 = "rsa-2048"
    RSA_3072 = "rsa-3072"
    RSA_4096 = "rsa-4096"


def generate_key(key_type: KeyType) -> PrivateKey:
    """Make a new private key from the operating system's randomness."""
    match key_type:
        case KeyType.EC_P256:
            return ec.generate_private_key(ec.SECP256R1())
        case KeyType.EC_P384:
            return ec.generate_private_key(ec.SECP384R1())
        case KeyType.ED25519:
            return ed25519.Ed25519PrivateKey.generate()
        case KeyType.RSA_2048:
            return rsa.generate_private_key(RSA_EXPONENT, 2048)
        case KeyType.RSA_3072:
            return rsa.generate_private_key(RSA_EXPONENT, 3072)
        case KeyType.RSA_4096:
            return rsa.generate_private_key(RSA_EXPONENT, 4096)


def private_key_pem(key: PrivateKey) -> bytes:
    """Encode a private key as unencrypted PKCS#8 PEM: for memory only, never for a disk or a log."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def encrypt_private_key(key: PrivateKey, passphrase: bytes, *, rounds: int = PBKDF2_ROUNDS) -> bytes:
    """Return an EncryptedPrivateKeyInfo (RFC 5208 §6) as PEM: PBES2, PBKDF2 with HMAC-SHA256, AES-256-CBC (RFC 8018).

    ``openssl pkey`` opens it, and so does ``load_pem_private_key``.
    """
    from pyasn1_modules import rfc5208, rfc8018  # take a while to load, and are needed for new keys only

    salt, vector = secrets.token_bytes(16), secrets.token_bytes(16)
    padder = PKCS7(128).padder()
    clear = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    secret = PBKDF2HMAC(hashes.SHA256(), 32, salt, rounds).derive(passphrase)
    encryptor = Cipher(algorithms.AES256(secret), modes.CBC(vector)).encryptor()

    derivation = rfc8018.PBKDF2_params()
    derivation["salt"]["specified"] = salt
    derivation["iterationCount"] = rounds
    derivation["prf"]["algorithm"] = rfc8018.id_hmacWithSHA256
    derivation["prf"]["parameters"] = encoder.encode(univ.Null(""))
    scheme = rfc8018.PBES2_params()
    scheme["keyDerivationFunc"]["algorithm"] = rfc8018.id_PBKDF2
    scheme["keyDerivationFunc"]["parameters"] = encoder.encode(derivation)
    scheme["encryptionScheme"]["algorithm"] = rfc8018.aes256_CBC_PAD
    scheme["encryptionScheme"]["parameters"] = encoder.encode(univ.OctetString(vector))
    info = rfc5208.EncryptedPrivateKeyInfo()
    info["encryptionAlgorithm"]["algorithm"] = rfc8018.id_PBES2
    info["encryptionAlgorithm"]["parameters"] = encoder.encode(scheme)
    info["encryptedData"] = encryptor.update(padder.update(clear) + padder.finalize()) + encryptor.finalize()
    return pem("ENCRYPTED PRIVATE KEY", encoder.encode(info)).encode()


def public_key_der(key: PublicKey) -> bytes:
    """Encode a public key as SubjectPublicKeyInfo DER (RFC 5280 §4.1.2.7)."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def public_key_fingerprint(key: PublicKey) -> str:
    """Name a public key: SHA-256 of its SubjectPublicKeyInfo, 64 lower-case hex digits."""
    return hashlib.sha256(public_key_der(key)).hexdigest()


def certificate_key_fingerprint(der: bytes) -> str:
    """Name the key of a certificate (DER) of this portal, as ``public_key_fingerprint`` does.

    Raises ``ValueError`` if the certificate cannot be parsed.
    """
    key = x509.load_der_x509_certificate(der).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def key_type_of(key: PublicKey) -> str:
    """Name the kind of a public key, as ``KeyType`` does."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return "ec-p256" if isinstance(key.curve, ec.SECP256R1) else "ec-p384"
    return "ed25519" if isinstance(key, ed25519.Ed25519PublicKey) else f"rsa-{key.key_size}"


def signature_hash(key: PublicKey) -> SignatureHash:
    """Return the hash that this key signs with: as strong as the key (RFC 5758 §3.2), none for Ed25519 (RFC 8410)."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        return None
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.key_size > 256:
        return hashes.SHA384()
    return hashes.SHA256()


def signature_identifier(key: PrivateKey, algorithm: SignatureHash) -> bytes:
    """Return the AlgorithmIdentifier, DER, of a key's signatures (RFC 4055 §5, RFC 5758 §3.2, RFC 8410 §3)."""
    if isinstance(key, rsa.RSAPrivateKey):
        return _identifier(SignatureAlgorithmOID.RSA_WITH_SHA256, encode(univ.Null("")))
    if algorithm is None:
        return _identifier(SignatureAlgorithmOID.ED25519)
    is_long = isinstance(algorithm, hashes.SHA384)
    return _identifier(SignatureAlgorithmOID.ECDSA_WITH_SHA384 if is_long else SignatureAlgorithmOID.ECDSA_WITH_SHA256)


@functools.cache
def _identifier(oid: x509.ObjectIdentifier, *parameters: bytes) -> bytes:
    return join(SEQUENCE, encode(univ.ObjectIdentifier(oid.dotted_string)), *parameters)


def signed(content: bytes, key: PrivateKey, algorithm: SignatureHash) -> bytes:
    """Sign a TBSCertificate or TBSCertList that names the algorithm; return the signed whole, DER (RFC 5280 §4.1)."""
    signature = join(BIT_STRING, b"\0", _signature(content, key, algorithm))
    return join(SEQUENCE, content, signature_identifier(key, algorithm), signature)


def _signature(content: bytes, key: PrivateKey, algorithm: SignatureHash) -> bytes:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(content)
    if algorithm is None:
        raise ValueError("a key of this kind does not sign without a hash")
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(content, padding.PKCS1v15(), algorithm)
    return key.sign(content, ec.ECDSA(algorithm))


def check_public_key(key: object) -> PublicKey:
    """Return ``key`` if the portal certifies keys of its kind, size and quality; raises ``KeyRefused``."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
            raise KeyRefused(f"The curve {key.curve.name} is not accepted. {ACCEPTED}")
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        _check_ed25519(key)
        return key
    if isinstance(key, rsa.RSAPublicKey):
        _check_rsa(key)
        return key
    raise KeyRefused(f"Keys of this kind are not accepted. {ACCEPTED}")


# --- Ed25519 ------------------------------------------------------------------------------------------------------

_FIELD = 2**255 - 19
# The y coordinates of the eight points of small order. Anybody can make signatures that verify under such a key, so a
# CSR for it would prove nothing.
_ORDER_8_Y = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_SMALL_ORDER_Y = frozenset({0, 1, _FIELD - 1, _ORDER_8_Y, _FIELD - _ORDER_8_Y})


def _check_ed25519(key: ed25519.Ed25519PublicKey) -> None:
    y = int.from_bytes(key.public_bytes_raw(), "little") & (2**255 - 1)
    if y >= _FIELD or y in _SMALL_ORDER_Y:
        raise KeyRefused("The Ed25519 public key has a small order. Make a new key pair.")


# --- RSA ----------------------------------------------------------------------------------------------------------

_SMALL_PRIMES = tuple(n for n in range(3, 752) if all(n % d for d in range(2, math.isqrt(n) + 1)))
_SMALL_PRIMES_PRODUCT = math.prod(_SMALL_PRIMES)
_FERMAT_ROUNDS = 100


def _powers_of_65537(prime: int) -> frozenset[int]:
    powers, power = set(), 1
    while power not in powers:
        powers.add(power)
        power = power * RSA_EXPONENT % prime
    return frozenset(powers)


# CVE-2017-15361 (ROCA), common in security chips: modulo every small prime, the modulus is a power of 65537. These are
# the primes with few such powers; a sound key has this property for all of them by chance once in 2^27.
_ROCA_PRIMES = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
_ROCA_RESIDUES = tuple((prime, _powers_of_65537(prime)) for prime in _ROCA_PRIMES)


def _check_rsa(key: rsa.RSAPublicKey) -> None:
    if key.key_size not in RSA_SIZES:
        raise KeyRefused(f"RSA keys of {key.key_size} bits are not accepted. {ACCEPTED}")
    numbers = key.public_numbers()
    if numbers.e != RSA_EXPONENT:
        raise KeyRefused(f"RSA keys with another exponent than 65537 are not accepted. {ACCEPTED}")
    modulus = numbers.n
    if modulus % 2 == 0 or math.gcd(modulus, _SMALL_PRIMES_PRODUCT) != 1:
        raise KeyRefused("The RSA modulus has a small factor. Make a new key pair.")
    if all(modulus % prime in residues for prime, residues in _ROCA_RESIDUES):
        raise KeyRefused("The RSA key has the ROCA weakness (CVE-2017-15361). Make a new key pair outside that chip.")
    if _has_close_primes(modulus):
        raise KeyRefused("The RSA modulus is the product of two close primes. Make a new key pair.")


def _has_close_primes(modulus: int) -> bool:
    """Try Fermat's factorisation for a few rounds (CVE-2022-26320), which never succeeds for a sound key."""
    a = math.isqrt(modulus)
    if a * a == modulus:
        return True
    for candidate in range(a + 1, a + 1 + _FERMAT_ROUNDS):
        square = candidate * candidate - modulus
        if math.isqrt(square) ** 2 == square:
            return True
    return False
