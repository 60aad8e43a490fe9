"""Signs one event (Standard Webhooks 1.0) and posts it to its receiver."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import http.client
import io
import secrets
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from core.connections import cut_off_after
from core.errors import InputInvalid, StartupError, Unavailable
from workflows.webhooks.addresses import Address, Network, SendFailed, Target, read_url, resolve

# urllib3 is imported where an event is sent: most portals have no webhook, and every start would load it.
if TYPE_CHECKING:
    from urllib3.connection import HTTPConnection

SECRET_PREFIX = "whsec_"  # noqa: S105 - lets secret scanners find one that leaked; no secret itself
SECRET_BYTES = 32
NONCE_BYTES = 12

RESOLVE_SECONDS = 5.0
CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 10.0  # from the first connection attempt to the end of the response's head
DRAIN_SECONDS = 0.5  # for the body of a response, which is ignored
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024
USER_AGENT = "device-onboarding-portal"


# --- Signature ----------------------------------------------------------------------------------------------------


def new_secret() -> bytes:
    """Return the signing key of a new subscription: 256 random bits."""
    return secrets.token_bytes(SECRET_BYTES)


def shown(secret: bytes) -> str:
    """Return a secret in the form that its receiver is given: ``whsec_`` and base64."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def signature_of(secret: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """Return the ``Webhook-Signature`` header: the version, then HMAC-SHA-256 over ``id.timestamp.body`` in base64."""
    signed = f"{event_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()


class SecretSeal:
    """Encrypts the secrets in the database under a key that is not in it (AES-256-GCM, random nonce in front)."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, secret: bytes, webhook_id: str) -> bytes:
        """Encrypt a secret for one subscription; it cannot be decrypted as that of another."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret, webhook_id.encode())

    def open(self, sealed: bytes, webhook_id: str) -> bytes:
        """Decrypt what ``seal`` returned; raises ``Unavailable`` if it was altered or the key is another one."""
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], webhook_id.encode())
        except (InvalidTag, ValueError):
            raise Unavailable(
                "The webhook's secret cannot be decrypted with secrets/webhook-key; "
                "restore that file or make a new webhook."
            ) from None


# --- HTTP ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """An event to send: ``body`` is JSON, ``sealed_secret`` the signing key as the database holds it."""

    webhook_id: str
    url: str
    sealed_secret: bytes
    event_id: str
    body: str


@dataclass(frozen=True, slots=True)
class Sent:
    """The outcome: ``problem`` is one sentence if it failed; ``status`` is ``None`` if there was no response."""

    status: int | None
    problem: str | None
    seconds: float

    @property
    def delivered(self) -> bool:
        """Tell whether the receiver confirmed the event."""
        return self.problem is None


class Sender:
    """Posts events, each over a connection of its own: no redirects, no proxies, no internal addresses."""

    def __init__(self, allowed: Sequence[Network], ca_file: Path | None, seal: SecretSeal) -> None:
        """Trust the CA certificates in ``ca_file`` (PEM) beside the system's; raises ``StartupError``."""
        self._allowed = allowed
        self._seal = seal
        if ca_file is not None:
            try:
                self._tls.load_verify_locations(ca_file)
            except OSError as error:
                raise StartupError(
                    f"PORTAL_WEBHOOK_CA_FILE names {ca_file}, which holds no CA certificates in PEM."
                ) from error

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        """Load the system's CA certificates, at the first use: most portals send nothing."""
        return ssl.create_default_context()

    def send(self, message: Message, *, now: datetime) -> Sent:
        """Send once and report any failure in the result; returns within about 15 seconds."""
        started = time.monotonic()
        status, problem = None, None
        try:
            target = read_url(message.url, self._allowed)
            headers = self._headers(target, message, int(now.timestamp()))
            addresses = resolve(target, self._allowed, seconds=RESOLVE_SECONDS)
            status = self._post(target, addresses, headers, message.body.encode())
            problem = _refusal(status)
        except (InputInvalid, Unavailable) as error:
            problem = error.detail
        except SendFailed as error:
            problem = str(error)
        except TimeoutError:
            problem = f"The receiver did not answer within {TOTAL_SECONDS:g} seconds."
        except ssl.SSLCertVerificationError as error:
            problem = f"The receiver's certificate is not trusted: {error.verify_message}."
        except ssl.SSLError as error:
            problem = f"The TLS connection failed ({error.reason or 'it was closed'})."
        except OSError as error:
            problem = f"The connection was lost ({error.strerror or type(error).__name__})."
        return Sent(status, problem and problem[:256], time.monotonic() - started)

    def _headers(self, target: Target, message: Message, timestamp: int) -> dict[str, str]:
        secret = self._seal.open(message.sealed_secret, message.webhook_id)
        return {
            "Host": target.authority,
            "User-Agent": USER_AGENT,
            "Content-Type": "application/json",
            "Webhook-Id": message.event_id,
            "Webhook-Timestamp": str(timestamp),
            "Webhook-Signature": signature_of(secret, message.event_id, timestamp, message.body.encode()),
            "Accept": "*/*",
            "Connection": "close",
        }

    def _post(self, target: Target, addresses: Sequence[Address], headers: dict[str, str], body: bytes) -> int:
        from urllib3.exceptions import HTTPError

        deadline = time.monotonic() + TOTAL_SECONDS
        connection = self._connect(target, addresses)
        connection.timeout = TOTAL_SECONDS
        connected: socket.socket = connection.sock
        try:
            with cut_off_after(deadline - time.monotonic(), lambda: connected):
                connection.request("POST", target.path, body, headers, preload_content=False)
                response = connection.getresponse()
            drained = cut_off_after(DRAIN_SECONDS, lambda: connected)
            with contextlib.closing(response), contextlib.suppress(OSError, HTTPError), drained:
                response.read(MAX_BODY_BYTES, decode_content=False)  # lets the receiver finish its response
        except (http.client.BadStatusLine, http.client.UnknownProtocol) as error:
            raise SendFailed("The receiver's answer is not HTTP/1.1.") from error
        except http.client.HTTPException as error:
            raise SendFailed("The head of the receiver's answer is longer than 100 lines.") from error
        finally:
            connected.close()
            connection.close()
        return response.status

    def _connect(self, target: Target, addresses: Sequence[Address]) -> HTTPConnection:
        """Connect to the first address that answers; TLS verifies the certificate for the host's name."""
        from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

        until = time.monotonic() + CONNECT_SECONDS
        reason = "timeout"
        for address in addresses:
            left = until - time.monotonic()
            if left <= 0:
                break
            connection = self._connection(target, address, left)
            try:
                connection.connect()
            except (NewConnectionError, ConnectTimeoutError) as error:
                cause = error.__cause__
                reason = getattr(cause, "strerror", None) or type(cause).__name__
            except TimeoutError:
                connection.close()
                reason = "TLS timeout"
            except OSError:
                connection.close()
                raise
            else:
                return connection
        raise SendFailed(f"There was no connection to {target.host} within {CONNECT_SECONDS:g} seconds ({reason}).")

    def _connection(self, target: Target, address: Address, seconds: float) -> HTTPConnection:
        from urllib3.connection import HTTPConnection, HTTPSConnection

        connection = (
            HTTPSConnection(
                str(address), target.port, timeout=seconds, ssl_context=self._tls, server_hostname=target.host
            )
            if target.https
            else HTTPConnection(str(address), target.port, timeout=seconds)
        )
        connection.response_class = _Response
        return connection


class _Response(http.client.HTTPResponse):
    """Reads a head of at most ``MAX_HEAD_BYTES`` to its end, after interim responses (RFC 9110 section 15.2)."""

    def __init__(self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None):
        super().__init__(sock, debuglevel, method, url)
        self.fp = _HeadReader(self.fp.detach())

    def begin(self) -> None:
        super().begin()
        while self.status < 200:
            response: Any = self
            response.headers = None  # lets the next head be read
            super().begin()


class _HeadReader(io.BufferedReader):
    """Raises ``SendFailed`` for a head that is too long or ends before its last line."""

    left = MAX_HEAD_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self.left -= len(line)
        if self.left < 0:
            raise SendFailed(f"The head of the receiver's answer is longer than {MAX_HEAD_BYTES} bytes.")
        if not line.endswith(b"\n"):
            raise SendFailed("The receiver closed the connection without an answer.")
        return line


def _refusal(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"The receiver answered {status}, a redirect, which is not followed; change the webhook's URL."
    return f"The receiver answered {status}."
