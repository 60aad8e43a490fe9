"""The forms of what a device that speaks EST is answered."""

from __future__ import annotations

import base64
import secrets

from pki import est
from web.api.routing import Answers, Reply
from workflows.enrolment.means import Waiting

PKCS7 = "application/pkcs7-mime; smime-type=certs-only"
CSR_ATTRIBUTES = "application/csrattrs"
_PKCS8 = "application/pkcs8"

_RETRY = {"Retry-After": "Seconds after which to ask again, with the same key"}
WAITING = Answers(media_type="text/plain", status=202, description="An operator has yet to decide", headers=_RETRY)


def waiting(outcome: Waiting) -> Reply:
    """Tell a device that an operator has yet to decide (RFC 7030 section 4.2.3)."""
    sentence = f"Device {outcome.device_id} waits for an operator; ask again with the same key.\n"
    headers = {"Retry-After": str(outcome.retry_after)}
    return Reply(content=sentence.encode(), media_type="text/plain", status=202, headers=headers)


def in_base64(content: bytes, media_type: str) -> Reply:
    """Base64 in lines (RFC 2045 section 6.8): some clients read no longer ones (RFC 8951 section 3.1)."""
    # RFC 8951 has clients ignore this header; those of RFC 7030 look for it.
    headers = {"Content-Transfer-Encoding": "base64"}
    return Reply(content=base64.encodebytes(content), media_type=media_type, headers=headers)


def key_with_certificate(key: bytes, certificate: bytes) -> Reply:
    """A private key (PKCS#8, DER), then its certificate, as two parts (RFC 7030 section 4.4.2)."""
    boundary = f"est-{secrets.token_hex(16)}"  # Base64 has no hyphen, so no part can hold it
    parts = ((_PKCS8, key), (PKCS7, est.certs_only([certificate])))
    content = b"".join(_part(boundary, media_type, part) for media_type, part in parts) + f"--{boundary}--\r\n".encode()
    headers = {"Cache-Control": "no-store"}
    return Reply(content=content, media_type=f'multipart/mixed; boundary="{boundary}"', headers=headers)


def _part(boundary: str, media_type: str, content: bytes) -> bytes:
    head = f"--{boundary}\r\nContent-Type: {media_type}\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    return head.encode() + base64.encodebytes(content).replace(b"\n", b"\r\n")
