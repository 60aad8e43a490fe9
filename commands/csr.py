"""A device's own CSR in a file, which is the portal's to judge."""

from __future__ import annotations

import base64
import re
import ssl
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from commands.errors import CheckFailed

_BEGIN = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,64})-----")
_BLOCK = re.compile(rb"-----BEGIN (?:NEW )?CERTIFICATE REQUEST-----([A-Za-z0-9+/=\s]*)-----END")
_DER_SEQUENCE, _DER_INTEGER = b"\x30", b"\x02"


@dataclass(frozen=True)
class CsrFile:
    """What a file with a CSR holds, DER."""

    der: bytes = field(repr=False)

    @classmethod
    def of(cls, content: bytes) -> CsrFile:
        """Find the CSR in a file: DER, Base64, or PEM with any text around it; raises ``CheckFailed``.

        What could be a private key is refused, since that must not be sent: another PEM block, other DER.
        """
        der = content if content.startswith(_DER_SEQUENCE) and not _is_text(content) else cls._decoded(content)
        # SEQUENCE { SEQUENCE { INTEGER (RFC 2986 section 4.2): no form of a private key begins like this.
        within = _content(der)
        if not (within.startswith(_DER_SEQUENCE) and _content(within).startswith(_DER_INTEGER)):
            raise CheckFailed("The file holds no CSR (PKCS#10), perhaps a private key; nothing of it was sent.")
        return cls(der)

    @staticmethod
    def _decoded(content: bytes) -> bytes:
        labels, base64_text = _BEGIN.findall(content), content
        if any(b"PRIVATE KEY" in label for label in labels):
            raise CheckFailed("The file holds a private key, which was not sent; use a file with the CSR alone.")
        if labels:
            found = _BLOCK.search(content)
            base64_text = found[1] if found is not None and len(labels) == 1 else b""
        if not base64_text.strip():
            raise CheckFailed(
                "The file must hold one CSR (PKCS#10, PEM): BEGIN CERTIFICATE REQUEST to END CERTIFICATE REQUEST."
            )
        try:
            return base64.b64decode(b"".join(base64_text.split()), validate=True)
        except ValueError:
            if not labels:
                raise CheckFailed("The file holds no CSR (PKCS#10): it is neither PEM nor DER nor Base64.") from None
            raise CheckFailed("The CSR in the file is not valid Base64; copy the file again.") from None

    @property
    def pem(self) -> str:
        """Return the CSR as the portal takes it, without what was around it in the file."""
        return ssl.DER_cert_to_PEM_cert(self.der).replace("CERTIFICATE-----", "CERTIFICATE REQUEST-----")

    def has_key(self, key: PublicKeyTypes) -> bool:
        """Return whether the CSR holds this public key, in whatever form its algorithm allows."""
        return any(form in self.der for form in _forms(key))


def _is_text(content: bytes) -> bool:
    """Return whether a file that begins with a "0", as DER does, is text with PEM in it: no DER is as short."""
    return content[1:2] < b"\x80" and b"-----BEGIN" in content


def _content(der: bytes) -> bytes:
    """Return what follows the tag and the length of an element of DER."""
    length = der[1] if len(der) > 1 else 0
    return der[2 + (length & 0x7F if length & 0x80 else 0) :]


def _forms(key: PublicKeyTypes) -> tuple[bytes, ...]:
    """Return the bytes that encodings of a public key have in common."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return point[1:], key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    if isinstance(key, rsa.RSAPublicKey):
        return (key.public_numbers().n.to_bytes(key.key_size // 8, "big"),)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return (key.public_bytes_raw(),)
    return ()
