"""Reads certificate signing requests (PKCS#10) from anybody."""

from __future__ import annotations

import base64
import re

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519

from core.errors import CsrInvalid, KeyRefused
from pki.algorithms import ACCEPTED, PublicKey, check_public_key, public_key_der
from pki.encoding import failing_as, sequence_elements

MAX_CSR_CHARACTERS = 16 * 1024

# One block and nothing else (RFC 7468 §7). No quantifier is nested, so the time is linear.
_PEM = re.compile(
    r"\s*-----BEGIN (NEW )?CERTIFICATE REQUEST-----[ \t]*\r?\n"
    r"([A-Za-z0-9+/=\s]+)"
    r"-----END (NEW )?CERTIFICATE REQUEST-----\s*",
    re.ASCII,
)
_UNREADABLE = "The CSR is damaged: it is not a PKCS#10 request in DER."


def read_csr(pem: str) -> PublicKey:
    """Return the public key of a CSR (RFC 2986) that is signed by the private key belonging to it.

    ``pem`` is one PEM block of at most 16 KiB. Subject, extensions and attributes are not read: the portal decides on
    them. Raises ``KeyRefused`` for a key that the portal does not certify, ``CsrInvalid`` for everything else.
    """
    return check_csr(der_of(pem))[1]


def check_csr(der: bytes) -> tuple[x509.CertificateSigningRequest, PublicKey]:
    """Read a CSR in DER, of at most 16 KiB, as ``read_csr`` does; returns it with its public key."""
    if len(der) > MAX_CSR_CHARACTERS:
        raise CsrInvalid(f"The CSR is longer than {MAX_CSR_CHARACTERS} bytes.")
    with failing_as(CsrInvalid(_UNREADABLE)):
        csr = x509.load_der_x509_csr(der)
    with failing_as(KeyRefused(f"The public key in the CSR cannot be read or is of an unknown kind. {ACCEPTED}")):
        # Checked before the signature is: verifying under a monstrous RSA key would be slow.
        key = check_public_key(csr.public_key())
    with failing_as(CsrInvalid(_UNREADABLE)):
        plainly_marked = _key_algorithm(csr) == sequence_elements(public_key_der(key))[0]
    if not plainly_marked:
        # pyca also reads keys marked for RSASSA-PSS only, and curves spelled out as numbers (RFC 5480 §2.1.1 forbids).
        # The certificate would say something else of the key than its owner does, and might not fit it.
        raise KeyRefused("The public key must be marked as plain rsaEncryption or by the name of its curve.")
    with failing_as(CsrInvalid("The CSR is signed with an algorithm that is not accepted. Sign it with SHA-256.")):
        algorithm = csr.signature_hash_algorithm
    if not isinstance(key, ed25519.Ed25519PublicKey) and not isinstance(
        algorithm, hashes.SHA256 | hashes.SHA384 | hashes.SHA512
    ):
        name = algorithm.name if algorithm else "an algorithm of another kind of key"
        raise CsrInvalid(f"The CSR is signed with {name}. Sign it with SHA-256, SHA-384 or SHA-512.")
    with failing_as(CsrInvalid("The CSR's signature cannot be checked. Make the CSR anew.")):
        valid = csr.is_signature_valid
    if not valid:
        raise CsrInvalid("The CSR's signature is wrong: it must be signed with the private key it is for.")
    return csr, key


def is_for_key_of(certificate: bytes, csr: str) -> bool:
    """Whether a certificate of this CA (DER) is for the key that a CSR is signed with; raises as ``read_csr`` does."""
    key = check_public_key(x509.load_der_x509_certificate(certificate).public_key())
    return public_key_der(key) == public_key_der(read_csr(csr))


def _key_algorithm(csr: x509.CertificateSigningRequest) -> bytes:
    """Return the AlgorithmIdentifier of a CSR's public key (RFC 2986 §4.1) as it was encoded."""
    _version, _subject, key_info, *_ = sequence_elements(csr.tbs_certrequest_bytes)
    return sequence_elements(key_info)[0]


def der_of(pem: str) -> bytes:
    """What a PEM block of a CSR holds; raises ``CsrInvalid``."""
    if not isinstance(pem, str) or not pem.strip():
        raise CsrInvalid("The CSR is empty. Send a PKCS#10 request in PEM.")
    if len(pem) > MAX_CSR_CHARACTERS:
        raise CsrInvalid(f"The CSR is longer than {MAX_CSR_CHARACTERS} characters.")
    match = _PEM.fullmatch(pem)
    if match is None or match[1] != match[3]:
        raise CsrInvalid("The CSR must be one PEM block, BEGIN CERTIFICATE REQUEST to END CERTIFICATE REQUEST, alone.")
    try:
        return base64.b64decode("".join(match[2].split()), validate=True)
    except ValueError as error:
        raise CsrInvalid("The CSR's PEM block is damaged: it is not valid Base64.") from error
