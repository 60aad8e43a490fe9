"""Make a credential that only one TPM can open, and only if it holds a certain key: TPM2_MakeCredential without a TPM.

TPM 2.0 Library, part 1: §24 (credential protection), §11.4.10 (key derivation), annexes B.10 and C.6 (secret sharing).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from attestation.refusals import SignerCertificateRefused
from pki.algorithms import PublicKey

_IDENTITY = b"IDENTITY\0"


@dataclass(frozen=True, slots=True)
class Credential:
    """The two arguments of TPM2_ActivateCredential, each a TPM2B: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""

    blob: bytes = field(repr=False)
    secret: bytes = field(repr=False)


def make_credential(endorsement_key: PublicKey, name: bytes, content: bytes) -> Credential:
    """Encrypt ``content``, of at most 32 bytes, for the TPM with this endorsement key and a loaded object of this name.

    Hash and cipher are those of the TCG's EK template for the key: SHA-256 and AES-128 for RSA 2048 and P-256, else
    SHA-384 and AES-256 (EK Credential Profile, annex B). Raises ``SignerCertificateRefused`` for keys of other kinds.
    """
    digest, key_bits = _template(endorsement_key)
    if isinstance(endorsement_key, rsa.RSAPublicKey):
        seed = secrets.token_bytes(digest.digest_size)
        oaep = padding.OAEP(padding.MGF1(digest), digest, label=_IDENTITY)
        secret = endorsement_key.encrypt(seed, oaep)
    elif isinstance(endorsement_key, ec.EllipticCurvePublicKey):
        seed, secret = _shared(endorsement_key, digest)
    else:
        raise _unusable()
    storage_key = _derived(digest, seed, b"STORAGE", name, key_bits)
    encryptor = Cipher(algorithms.AES(storage_key), CFB(bytes(16))).encryptor()
    identity = encryptor.update(_sized(content)) + encryptor.finalize()
    mac = hmac.HMAC(_derived(digest, seed, b"INTEGRITY", b"", 8 * digest.digest_size), digest)
    mac.update(identity + name)
    return Credential(_sized(_sized(mac.finalize()) + identity), _sized(secret))


def _template(key: PublicKey) -> tuple[hashes.SHA256 | hashes.SHA384, int]:
    match key:
        case rsa.RSAPublicKey(key_size=2048) | ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
            return hashes.SHA256(), 128
        case rsa.RSAPublicKey() | ec.EllipticCurvePublicKey(curve=ec.SECP384R1()):
            return hashes.SHA384(), 256
    raise _unusable()


def _unusable() -> SignerCertificateRefused:
    return SignerCertificateRefused("The endorsement key is of a kind that no TPM has.")


def _shared(key: ec.EllipticCurvePublicKey, digest: hashes.HashAlgorithm) -> tuple[bytes, bytes]:
    """Return the seed that a fresh key shares with the TPM's, by KDFe, and the point that tells it to the TPM."""
    size = key.curve.key_size // 8
    ephemeral = ec.generate_private_key(key.curve)
    own, its = ephemeral.public_key().public_numbers(), key.public_numbers()
    shared = ephemeral.exchange(ec.ECDH(), key)
    context = _IDENTITY + own.x.to_bytes(size, "big") + its.x.to_bytes(size, "big")
    seed = ConcatKDFHash(digest, digest.digest_size, context).derive(shared)
    return seed, _sized(own.x.to_bytes(size, "big")) + _sized(own.y.to_bytes(size, "big"))


def _derived(digest: hashes.HashAlgorithm, seed: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """Derive a key by KDFa, which is the counter mode of NIST SP 800-108."""
    kdf = KBKDFHMAC(digest, Mode.CounterMode, bits // 8, 4, 4, CounterLocation.BeforeFixed, label, context, None)
    return kdf.derive(seed)


def _sized(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content
