"""The forms that a device's credentials can be delivered in."""

from __future__ import annotations

from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import PrivateFormat, load_pem_private_key, pkcs12

from pki.pkcs8 import encrypt_private_key

# What OpenSSL 3 uses. pyca's MAC is fixed at this number, and can be guessed at just as well: more rounds for the
# encryption would only look stronger. As with a ZIP it is the password's entropy that protects the file.
PKCS12_ROUNDS = 2048


class BundleFormat(StrEnum):
    """How the bundle is packed: an AES ZIP, a PKCS#12 file, or a plain ZIP with the key as encrypted PKCS#8."""

    ZIP = "zip"
    P12 = "p12"
    PEM = "pem"

    @property
    def media_type(self) -> str:
        """What the download says that it is."""
        return "application/x-pkcs12" if self is BundleFormat.P12 else "application/zip"

    @property
    def extension(self) -> str:
        """What the file's name ends with."""
        return "p12" if self is BundleFormat.P12 else "zip"


def encrypted_pem(key_pem: bytes, password: str) -> bytes:
    """A private key as encrypted PKCS#8 (PEM): PBES2, 600,000 rounds of PBKDF2 with HMAC-SHA-256, AES-256-CBC."""
    return encrypt_private_key(_key(key_pem), password.encode())


def pkcs12_file(key_pem: bytes, certificate_pem: str, ca_pem: str, password: str, *, name: str) -> bytes:
    """A PKCS#12 file (RFC 7292) of the key with its certificate, and the certificates of the CAs up to the root.

    PBES2 with AES-256-CBC, and a MAC with SHA-256: OpenSSL 3 and Java 8u301 or later open it. ``name`` is the alias.
    """
    encryption = (
        PrivateFormat.PKCS12.encryption_builder()
        .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(SHA256())
        .kdf_rounds(PKCS12_ROUNDS)
        .build(password.encode())
    )
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    authorities = x509.load_pem_x509_certificates(ca_pem.encode())
    return pkcs12.serialize_key_and_certificates(name.encode(), _key(key_pem), certificate, authorities, encryption)


def _key(pem: bytes) -> ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey:
    key = load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
        raise TypeError("the portal makes no keys of another kind")
    return key
