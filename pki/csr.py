"""Read certificate signing requests (PKCS#10, RFC 2986), which may come from anybody."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from pyasn1.type import univ
from pyasn1_modules import rfc5480, rfc8410

from core.errors import CsrInvalid, KeyRefused
from pki import foreign
from pki.algorithms import ACCEPTED, PublicKey, check_public_key, key_type_of, public_key_der, public_key_fingerprint
from pki.encoding import encode, encode_sequence, failing_as
from pki.foreign import ForeignCsr

MAX_CSR_CHARACTERS = 16 * 1024

_BEGIN = re.compile(r"-----BEGIN ([A-Z0-9 ]{1,64})-----")
_END = "-----END"
_LABELS = ("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST")  # the second is that of Netscape and Microsoft
_SEQUENCE = b"\x30"  # the first byte of DER, and never of its Base64

# The AlgorithmIdentifier of each kind of public key, DER (RFC 3279 §2.3.1, RFC 5480 §2.1.1, RFC 8410 §3).
_RSA = encode_sequence(encode(rfc5480.rsaEncryption), encode(univ.Null("")))
_ALGORITHMS = {
    "ec-p256": encode_sequence(encode(rfc5480.id_ecPublicKey), encode(rfc5480.secp256r1)),
    "ec-p384": encode_sequence(encode(rfc5480.id_ecPublicKey), encode(rfc5480.secp384r1)),
    "ed25519": encode_sequence(encode(rfc8410.id_Ed25519)),
}


@dataclass(frozen=True, slots=True)
class Csr:
    """A CSR that is signed by the private key belonging to its ``public_key``, which is of a kind that is certified.

    Only ``read_csr`` and ``checked`` make them, so wherever there is one, its signature was verified. Subject,
    extensions and attributes do not count: the portal decides on them. ``pem`` is the text as it came.
    """

    pem: str = field(repr=False)
    public_key: PublicKey = field(repr=False)

    @property
    def key_type(self) -> str:
        """Name the kind of the key, as ``KeyType`` does."""
        return key_type_of(self.public_key)

    @property
    def key_fingerprint(self) -> str:
        """Name the key: SHA-256 of its SubjectPublicKeyInfo, 64 lower-case hex digits."""
        return public_key_fingerprint(self.public_key)

    def is_for_key_of(self, certificate: bytes) -> bool:
        """Return whether a certificate of this CA (DER) is for the same key."""
        return x509.load_der_x509_certificate(certificate).public_key() == self.public_key

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the key as DER, for the processes that issue the certificates of an upload."""
        return _unpickle, (self.pem, public_key_der(self.public_key))


def _unpickle(pem: str, public_key: bytes) -> Csr:
    return Csr(pem, check_public_key(load_der_public_key(public_key)))


def new_request(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a request, PEM, that asks for nothing but a certificate for the key: all names are the CA's to decide."""
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def read_csr(pem: str) -> Csr:
    """Read a CSR of at most 16 KiB, in the forms that ``csr_der`` knows, and verify its signature.

    Raises ``KeyRefused`` for a key that the portal does not certify, ``CsrInvalid`` for everything else.
    """
    if len(pem) > MAX_CSR_CHARACTERS:
        raise CsrInvalid(f"The CSR is longer than {MAX_CSR_CHARACTERS} characters.")
    return checked(load_csr(csr_der(pem)), pem)


def checked(csr: ForeignCsr, pem: str) -> Csr:
    """Check the key of a CSR and the proof that its owner has made it; raises ``KeyRefused``, ``CsrInvalid``."""
    with failing_as(KeyRefused(f"The public key in the CSR cannot be read or is of an unknown kind. {ACCEPTED}")):
        # Checked before the signature is: verifying under a very large RSA key would be slow.
        key = check_public_key(csr.strict.public_key())
    if _ALGORITHMS.get(key_type_of(key), _RSA) not in csr.public_key:
        # cryptography also reads keys marked for RSASSA-PSS only, and curves given by their parameters, which RFC 5480
        # §2.1.1 forbids. The certificate would name another algorithm than the key's owner does.
        raise KeyRefused("The public key must be marked as plain rsaEncryption or by the name of its curve.")
    _check_signature(csr, key)
    return Csr(pem, key)


def load_csr(der: bytes) -> ForeignCsr:
    """Load a CSR in DER, of at most 16 KiB, without a check of its key or signature; raises ``CsrInvalid``."""
    if len(der) > MAX_CSR_CHARACTERS:
        raise CsrInvalid(f"The CSR is longer than {MAX_CSR_CHARACTERS} bytes.")
    try:
        return foreign.parse_csr(der)
    except ValueError as error:
        raise CsrInvalid(f"The CSR {error}. Send a PKCS#10 request (RFC 2986).") from error


def _check_signature(csr: ForeignCsr, key: PublicKey) -> None:
    with failing_as(CsrInvalid("The CSR is signed with an algorithm that is not accepted. Sign it with SHA-256.")):
        algorithm = csr.strict.signature_hash_algorithm
    if not isinstance(key, ed25519.Ed25519PublicKey) and not isinstance(
        algorithm, hashes.SHA256 | hashes.SHA384 | hashes.SHA512
    ):
        name = algorithm.name if algorithm else "an algorithm of another kind of key"
        raise CsrInvalid(f"The CSR is signed with {name}. Sign it with SHA-256, SHA-384 or SHA-512.")
    with failing_as(CsrInvalid("The CSR's signature cannot be checked. Make the CSR again.")):
        valid = foreign.is_signed_by(key, csr.strict, csr.content)
    if not valid:
        raise CsrInvalid("The CSR's signature is wrong: it must be signed with the private key it is for.")


def csr_der(content: str | bytes) -> bytes:
    """Return the DER of a CSR: given as such, in Base64, or as a PEM block with any text around it (RFC 7468 §2).

    Raises ``CsrInvalid``, also if there is another block beside it: that could be the private key.
    """
    if isinstance(content, bytes):
        # The text before a PEM block may begin with a "0", too, but what follows is no length of DER that has a block.
        if content.startswith(_SEQUENCE) and not (content[1:2] < b"\x80" and b"-----BEGIN" in content):
            return content
        content = content.decode("utf-8", "replace")
    if not content.strip():
        raise CsrInvalid("The CSR is empty. Send a PKCS#10 request.")
    blocks = list(_BEGIN.finditer(content))
    body = _body(content, blocks) if blocks else content
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise CsrInvalid(
            "The CSR is not valid Base64. Send a PKCS#10 request in PEM, BEGIN CERTIFICATE REQUEST to END CERTIFICATE"
            " REQUEST, or the same in Base64 alone."
        ) from error


def _body(content: str, blocks: list[re.Match[str]]) -> str:
    """Return what is in the one PEM block of a CSR."""
    if len(blocks) > 1:
        raise CsrInvalid(f"There are {len(blocks)} PEM blocks. Send the CSR alone, and never a private key.")
    begin = blocks[0]
    if begin[1] not in _LABELS:
        raise CsrInvalid("The PEM block is not a CERTIFICATE REQUEST. Send the CSR, and never a private key.")
    end = content.find(_END, begin.end())
    if end < 0:
        raise CsrInvalid("The CSR's PEM block was cut off: it has no END CERTIFICATE REQUEST.")
    return content[begin.end() : end]
