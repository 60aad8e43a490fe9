"""Checks a manufacturer's CA certificate, with the proof that somebody has its key."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from core.errors import KeyRefused, ManufacturerInvalid, ProofInvalid
from pki.algorithms import check_public_key
from pki.encoding import failing_as

MAX_PEM_CHARACTERS = 16 * 1024
_ONE_PEM = "Send one certificate in PEM, BEGIN CERTIFICATE to END CERTIFICATE."


@dataclass(frozen=True, slots=True)
class ManufacturerCa:
    """A CA's certificate: ``fingerprint`` is the SHA-256 of its DER, 64 lower-case hex digits."""

    der: bytes = field(repr=False)
    fingerprint: str
    not_after: datetime


def _read(pem: str, failure: ManufacturerInvalid | ProofInvalid) -> x509.Certificate:
    if len(pem) > MAX_PEM_CHARACTERS or pem.count("-----BEGIN") != 1:
        raise failure
    with failing_as(failure):
        return x509.load_pem_x509_certificate(pem.encode("ascii"))


def read_manufacturer_ca(pem: str, *, now: datetime) -> ManufacturerCa:
    """Read a CA certificate whose certificates devices are born with; it need not be a root.

    Raises ``ManufacturerInvalid`` where it is none, is out of date, or its key is of a kind that is not accepted.
    """
    certificate = _read(pem, ManufacturerInvalid(f"The certificate cannot be read. {_ONE_PEM}"))
    try:
        check_public_key(certificate.public_key())
    except KeyRefused as error:
        raise ManufacturerInvalid(f"The CA's key is not accepted. {error.detail}") from error
    except ValueError as error:
        raise ManufacturerInvalid("The CA's key cannot be read.") from error
    with failing_as(ManufacturerInvalid("The CA's certificate has extensions that cannot be read.")):
        extensions = certificate.extensions
        constraints = [item.value for item in extensions if isinstance(item.value, x509.BasicConstraints)]
        usage = [item.value for item in extensions if isinstance(item.value, x509.KeyUsage)]
    if not constraints or not constraints[0].ca or (usage and not usage[0].key_cert_sign):
        raise ManufacturerInvalid("The certificate is not that of a CA; send the one that signs the devices' own.")
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise ManufacturerInvalid("The CA's certificate has expired or is not valid yet.")
    der = certificate.public_bytes(Encoding.DER)
    return ManufacturerCa(der, hashlib.sha256(der).hexdigest(), certificate.not_valid_after_utc)


def check_proof_by_certificate(ca_der: bytes, nonce: str, pem: str) -> None:
    """Raise ``ProofInvalid`` unless ``pem`` is a certificate, signed by the CA, whose common name is the nonce."""
    proof = _read(pem, ProofInvalid(f"The proof cannot be read. {_ONE_PEM}"))
    failure = ProofInvalid("The proof is not a certificate that this CA has signed.")
    with failing_as(failure):
        names = [attribute.value for attribute in proof.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        proof.verify_directly_issued_by(x509.load_der_x509_certificate(ca_der))
    if names != [nonce]:
        raise ProofInvalid("The proof's common name is not the nonce; make a certificate whose common name it is.")


def check_proof_by_signature(ca_der: bytes, nonce: str, signature: str) -> None:
    """Raise ``ProofInvalid`` unless ``signature`` (Base64) is one of the nonce's text, in ASCII, by the CA's key.

    ECDSA or RSA (PKCS#1 v1.5) with SHA-256, as ``openssl dgst -sha256 -sign`` makes it, or Ed25519.
    """
    key = x509.load_der_x509_certificate(ca_der).public_key()
    message = nonce.encode("ascii")
    try:
        raw = base64.b64decode("".join(signature.split()), validate=True)
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(raw, message, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(raw, message, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(raw, message)
        else:
            raise ProofInvalid("The CA's key is of a kind that is not accepted.")
    except (ValueError, InvalidSignature) as error:
        raise ProofInvalid("The proof is not a signature of the nonce's text by this CA's key.") from error
