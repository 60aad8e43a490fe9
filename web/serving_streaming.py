"""A request's body that the application reads while it arrives."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from core.errors import BodyTooLarge, BodyTooSlow, PortalStopping, RequestMalformed
from web.serving_connection import Connection
from web.serving_framing import BegunRequest
from web.serving_refusals import RequestRefused

SLOWEST_SENDER = 1024  # bytes a second; beside the timeout, nobody waits longer for a body than this allows
LOOK_UP = 0.5  # seconds between looks whether the server still runs

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class StreamedInput:
    """What WSGI calls ``wsgi.input``, with a read that does not wait longer than it is told.

    Used by the one thread that owns the connection. What was written of the answer goes out while the client is waited
    for. ``timeout``, in seconds, is how long the client may pause; ``wanted`` says whether the server still runs.
    """

    def __init__(
        self, connection: Connection, request: BegunRequest, *, timeout: float, wanted: Callable[[], bool]
    ) -> None:
        self._connection = connection
        self._body = request.coming
        self._continue = request.expects_continue
        self._timeout = timeout
        self._wanted = wanted
        self._more = True  # whether the client may still send
        self._refusal: RequestRefused | None = None  # why nothing follows what was taken
        self._received = 0
        self._waited = 0.0  # seconds spent on waiting for the client
        self._poller = select.poll()

    def read_some(self, wait: float | None = None) -> bytes | None:
        """What has arrived, at most about 1 MiB; empty at the end, ``None`` where nothing came in ``wait`` seconds.

        Raises ``BodyTooLarge``, ``RequestMalformed`` for bad framing, ``BodyTooSlow``, ``PortalStopping``, and
        ``ConnectionResetError`` where the client is gone before the end.
        """
        while True:
            try:
                whole = self._refusal is None and (self._body.whole or self._body.take(self._connection.buffer))
            except RequestRefused as refusal:
                self._refusal = refusal
                whole = False
            if self._body.data or whole:
                return self._taken()
            if self._refusal is not None:
                kind = BodyTooLarge if self._refusal.status == 413 else RequestMalformed
                raise kind(self._refusal.detail)
            if not self._more:
                raise ConnectionResetError("the client went away in the middle of a body")
            try:
                if not self._connection.pending and not self._arrives(wait):
                    return None
                self._more = self._connection.receive()
            except OSError as error:
                raise ConnectionResetError("the connection of an upload broke") from error

    def check(self) -> None:
        """Raise ``PortalStopping`` where the server is being stopped: whoever reads has to come to an end."""
        if not self._wanted():
            raise PortalStopping("The portal is being stopped; send what is not done yet again.")

    def _taken(self) -> bytes:
        data = bytes(self._body.data)
        self._body.data.clear()
        self._received += len(data)
        return data

    def read(self, size: int = -1) -> bytes:
        """As a file's: what is asked for, or all; for applications that know no better."""
        parts, left = [], size
        while left:
            part = self.read_some()
            if not part:
                break
            if 0 <= left < len(part):
                self._body.data[:0] = part[left:]
                self._received -= len(part) - left
                part = part[:left]
            parts.append(part)
            left = left - len(part) if left > 0 else left
        return b"".join(parts)

    def _arrives(self, wait: float | None) -> bool:
        """Send what is queued, wait for the client; returns whether it has sent something, or gone."""
        if self._continue:
            self._continue = False
            self._connection.sendall(CONTINUE)
        started = time.monotonic()
        patience = min(self._timeout, self._timeout + self._received / SLOWEST_SENDER - self._waited)
        deadline = started + (patience if wait is None else min(wait, patience))
        try:
            while True:
                events = select.POLLIN if self._connection.flush() else select.POLLIN | select.POLLOUT
                self._poller.register(self._connection.fd, events)
                now = time.monotonic()
                # Rounded up: what is left of a millisecond must not become a loop that never sleeps.
                ready = self._poller.poll(1000 * min(LOOK_UP, max(0.0, deadline - now)))
                if any(found & ~select.POLLOUT for _, found in ready):
                    return True
                self.check()
                if time.monotonic() < deadline:
                    continue
                if wait is not None and time.monotonic() - started < patience:
                    return False
                raise BodyTooSlow("The body did not arrive in time; send what is not done yet again.")
        finally:
            self._waited += time.monotonic() - started
