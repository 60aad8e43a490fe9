"""The secret of a subscription, with the signature that it makes (Standard Webhooks 1.0)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from core.errors import Unavailable

SECRET_PREFIX = "whsec_"  # noqa: S105 - lets secret scanners find one that leaked; no secret itself
SECRET_BYTES = 32
NONCE_BYTES = 12


def new_secret() -> bytes:
    """The key of a subscription: 256 random bits."""
    return secrets.token_bytes(SECRET_BYTES)


def shown(secret: bytes) -> str:
    """A secret as its receiver is given it: ``whsec_`` and base64."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def signature_of(secret: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """The ``Webhook-Signature`` header: HMAC-SHA-256 over ``id.timestamp.body``, in base64 after the version."""
    signed = f"{event_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()


class SecretSeal:
    """Seals the secrets in the database under a key that is outside of it (AES-256-GCM, random nonce in front)."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, secret: bytes, webhook_id: str) -> bytes:
        """Encrypt a secret so that it opens as this subscription's only."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret, webhook_id.encode())

    def open(self, sealed: bytes, webhook_id: str) -> bytes:
        """Decrypt what ``seal`` made; raises ``Unavailable`` where it was altered or sealed under another key."""
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], webhook_id.encode())
        except (InvalidTag, ValueError):
            raise Unavailable(
                "The webhook's secret does not open with secrets/webhook-key; restore that file or make a new webhook."
            ) from None
