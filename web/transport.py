"""What the socket under an answer tells of the client."""

from __future__ import annotations

import fcntl
import select
import struct
import termios
import time
from typing import Literal, Protocol, runtime_checkable

CLOSING_SECONDS = 0.02
PATIENCE_SECONDS = 1.0


class HasDescriptor(Protocol):
    """A socket, plain or TLS."""

    def fileno(self) -> int:
        """The descriptor."""


@runtime_checkable
class HasPeer(Protocol):
    """A TLS socket."""

    def getpeercert(self, binary_form: Literal[True]) -> bytes | None:
        """The peer's certificate, DER."""


def client_certificate(connection: object) -> bytes | None:
    """The certificate, DER, that a TLS client has shown with proof of its key; ``None`` where it has shown none.

    A resumed TLS session brings the one of its beginning (RFC 8446 section 4.6.1), so what has happened to the
    certificate since then is for the caller to find out.
    """
    if not isinstance(connection, HasPeer):
        return None
    return connection.getpeercert(binary_form=True)


def client_is_gone(connection: HasDescriptor) -> bool:
    """Whether the client closes, or has closed, the connection without waiting for the rest of its answer.

    Called with a part of the answer sent and a part held back. Waits until the client's kernel has acknowledged the
    part that was sent, a second at most, and then 20 ms for a close to show: a client that breaks off does so then,
    one that reads on waits for the rest.
    """
    descriptor = connection.fileno()
    if descriptor < 0:
        return True
    poller = select.poll()
    poller.register(descriptor, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not poller.poll(CLOSING_SECONDS * 1000):
        (unacknowledged,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0"))
        if unacknowledged == 0 or time.monotonic() >= deadline:
            return False
    return True
