"""Sends one event to its receiver."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from core.errors import InputInvalid, StartupError, Unavailable
from workflows.webhooks.addresses import Address, Network, Refused, Target, read_url, resolve
from workflows.webhooks.signature import SecretSeal, signature_of

RESOLVE_SECONDS = 5.0
CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 10.0  # from the first address tried to the last byte of the answer's head
GOODBYE_SECONDS = 0.5  # for the rest of an answer, which is thrown away
HEAD_MOST = 16 * 1024  # bytes
BODY_MOST = 64 * 1024
USER_AGENT = "device-onboarding-portal"
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [^\r\n]*)?")


@dataclass(frozen=True, slots=True)
class Message:
    """An event on its way: ``body`` is JSON, ``sealed_secret`` what signs it."""

    webhook_id: str
    url: str
    sealed_secret: bytes
    event_id: str
    body: str


@dataclass(frozen=True, slots=True)
class Sent:
    """How it ended: the receiver has it, or the ``problem`` in one sentence; ``status`` where there was an answer."""

    status: int | None
    problem: str | None
    seconds: float

    @property
    def delivered(self) -> bool:
        """Whether the receiver said that it has the event."""
        return self.problem is None


class Sender:
    """Posts events over connections of their own: no redirects, no proxies, no address that is internal."""

    def __init__(self, allowed: Sequence[Network], ca_file: Path | None, seal: SecretSeal) -> None:
        """``ca_file`` holds CA certificates (PEM) that are trusted beside the system's; raises ``StartupError``."""
        self._allowed = allowed
        self._seal = seal
        self._tls = ssl.create_default_context()
        if ca_file is not None:
            try:
                self._tls.load_verify_locations(ca_file)
            except OSError as error:
                raise StartupError(f"PORTAL_WEBHOOK_CA_FILE names {ca_file}, which holds no certificates.") from error

    def send(self, message: Message, *, now: datetime) -> Sent:
        """Send once; what goes wrong, however that may be, is in the answer. Returns within some 15 seconds."""
        started = time.monotonic()
        status, problem = None, None
        try:
            target = read_url(message.url, self._allowed)
            request = self._request(target, message, int(now.timestamp()))
            addresses = resolve(target, self._allowed, seconds=RESOLVE_SECONDS)
            status = self._exchange(target, addresses, request)
            problem = _refusal(status)
        except (InputInvalid, Unavailable) as error:
            problem = error.detail
        except Refused as error:
            problem = str(error)
        except TimeoutError:
            problem = f"The receiver did not answer within {TOTAL_SECONDS:g} seconds."
        except ssl.SSLCertVerificationError as error:
            problem = f"The receiver's certificate is not trusted: {error.verify_message}."
        except ssl.SSLError as error:
            problem = f"There was no TLS connection ({error.reason or 'it broke off'})."
        except OSError as error:
            problem = f"The connection broke off ({error.strerror or type(error).__name__})."
        return Sent(status, problem and problem[:256], time.monotonic() - started)

    def _request(self, target: Target, message: Message, timestamp: int) -> bytes:
        body = message.body.encode()
        secret = self._seal.open(message.sealed_secret, message.webhook_id)
        head = (
            f"POST {target.path} HTTP/1.1",
            f"Host: {target.authority}",
            f"User-Agent: {USER_AGENT}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            f"Webhook-Id: {message.event_id}",
            f"Webhook-Timestamp: {timestamp}",
            f"Webhook-Signature: {signature_of(secret, message.event_id, timestamp, body)}",
            "Accept: */*",
            "Connection: close",
        )
        return "\r\n".join(head).encode("ascii") + b"\r\n\r\n" + body

    def _exchange(self, target: Target, addresses: Sequence[Address], request: bytes) -> int:
        deadline = time.monotonic() + TOTAL_SECONDS
        with _connect(target, addresses) as connection:
            connection.settimeout(_left(deadline))
            if not target.https:
                return _post(connection, request, deadline)
            with self._tls.wrap_socket(connection, server_hostname=target.host) as secured:
                return _post(secured, request, deadline)


def _connect(target: Target, addresses: Sequence[Address]) -> socket.socket:
    until = time.monotonic() + CONNECT_SECONDS
    failure: OSError = TimeoutError()
    for address in addresses:
        left = until - time.monotonic()
        if left <= 0:
            break
        try:
            # The address that was checked: the name could lead elsewhere when it is looked up again.
            return socket.create_connection((str(address), target.port), timeout=left)
        except OSError as error:
            failure = error
    if isinstance(failure, TimeoutError):
        raise Refused(f"There was no connection to {target.host} within {CONNECT_SECONDS:g} seconds.")
    raise Refused(f"There was no connection to {target.host} ({failure.strerror or type(failure).__name__}).")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _post(connection: socket.socket, request: bytes, deadline: float) -> int:
    connection.settimeout(_left(deadline))
    connection.sendall(request)
    received = b""
    while True:
        head, end, rest = received.partition(b"\r\n\r\n")
        if end:
            status = _status(head)
            if status >= 200:
                _leave(connection, len(rest))
                return status
            received = rest  # an interim answer (RFC 9110 section 15.2)
            continue
        if len(received) > HEAD_MOST:
            raise Refused(f"The head of the receiver's answer is longer than {HEAD_MOST} bytes.")
        connection.settimeout(_left(deadline))
        part = connection.recv(4096)
        if not part:
            raise Refused("The receiver closed the connection without an answer.")
        received += part


def _status(head: bytes) -> int:
    line = _STATUS_LINE.fullmatch(head.split(b"\r\n", 1)[0])
    if line is None:
        raise Refused("The receiver's answer is not HTTP/1.1.")
    return int(line[1])


def _leave(connection: socket.socket, received: int) -> None:
    """Read what little may follow, so that the receiver is not cut off in its answer; what it is does not matter."""
    until = time.monotonic() + GOODBYE_SECONDS
    try:
        while received < BODY_MOST and (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            part = connection.recv(4096)
            if not part:
                return
            received += len(part)
    except OSError:
        return


def _refusal(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"The receiver answered {status}, a redirect, which is not followed; change the webhook's URL."
    return f"The receiver answered {status}."
