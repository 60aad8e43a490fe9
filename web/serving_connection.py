"""One client's connection: its socket, the bytes read from it, the bytes still to be sent."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import select
import socket
import ssl
import struct
import termios
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from web.serving_framing import RequestScanner

READ_SIZE = 64 * 1024
READ_LIMIT = 1024 * 1024  # bytes read from one connection before the others have their turn
# A retry of an SSL write must offer the same bytes again (SSL_write(3)), so what is sent goes in slices of one size.
# With smaller ones, a thread spends more time on getting Python's lock back after each than on sending.
SLICE = 256 * 1024
ROOM = 256 * 1024  # unsent bytes beyond which a response that is still being made waits for its reader
SMALL_RECORD = 16 * 1024  # a TLS record holds no more than this (RFC 8446 section 5.1)


class Phase(enum.Enum):
    """What a connection is waiting for."""

    HANDSHAKE = enum.auto()  # the client's part of the TLS handshake
    IDLE = enum.auto()  # the first byte of a further request
    READING = enum.auto()  # the rest of a request
    WORKING = enum.auto()  # the application
    SENDING = enum.auto()  # the client, to take the rest of a response
    LINGERING = enum.auto()  # the client, to close its side
    CLOSED = enum.auto()


class ReaderTooSlow(OSError):
    """The client did not take a response in time."""


class Connection:
    """A non-blocking connection, owned by the event loop except in ``Phase.WORKING``, when a thread owns it.

    The HTTP response is written to it as if it were a socket: ``sendall`` only queues.
    """

    __slots__ = (
        "_outgoing",
        "_pieces",
        "broken",
        "buffer",
        "client",
        "deadline",
        "fd",
        "held",
        "keep",
        "listener",
        "phase",
        "scanner",
        "server",
        "since",
        "sock",
        "tls",
        "unsent",
        "watched",
        "when_done",
    )

    def __init__(
        self, sock: socket.socket, client: Any, server: Any, listener: str, *, tls: bool, scanner: RequestScanner
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.client = client
        self.server = server
        self.listener = listener
        self.tls = tls
        self.scanner = scanner
        self.buffer = bytearray()
        self.phase = Phase.HANDSHAKE if tls else Phase.READING
        self.deadline = 0.0  # on the monotonic clock, as since
        self.since = 0.0  # when the phase began
        self.watched = 0  # selector events
        self.held = 0  # bytes that the worker counts for this connection
        self.keep = False  # whether another request may follow
        self.unsent = 0
        self.broken = False  # whether the connection ended in an error
        # Told, once the connection has ended, whether the client received its last response.
        self.when_done: Callable[[bool], None] | None = None
        self._outgoing: deque[memoryview] = deque()
        self._pieces: list[bytes] = []

    @property
    def size(self) -> int:
        """Bytes kept in memory for this connection's client."""
        return len(self.buffer) + self.scanner.held + self.unsent

    @property
    def started(self) -> bool:
        """Whether a part of a request has come."""
        return bool(self.buffer) or self.scanner.started

    def handshake(self, context: ssl.SSLContext) -> None:
        """Go on with the TLS handshake; raises ``ssl.SSLWantReadError`` and the like until it is done."""
        if not isinstance(self.sock, ssl.SSLSocket):
            self.sock = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        self.sock.do_handshake()

    def receive(self) -> bool:
        """Read what has arrived; returns whether the client may send more."""
        received = 0
        while True:
            try:
                data = self.sock.recv(READ_SIZE)
            except (BlockingIOError, ssl.SSLWantReadError):
                return True
            if not data:
                return False
            self.buffer += data
            received += len(data)
            # Bytes that are decrypted already never make the descriptor readable: take them before going back to wait.
            if not self.pending and (len(data) < SMALL_RECORD or received >= READ_LIMIT):
                return True

    @property
    def pending(self) -> bool:
        """Whether decrypted bytes wait in the TLS layer."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0

    def sendall(self, data: bytes) -> None:
        """Queue bytes of a response."""
        self._pieces.append(data)

    def flush(self) -> bool:
        """Send what is queued as far as the client takes it now; returns whether nothing is left."""
        pieces = self._pieces
        if pieces:
            self.unsent += sum(map(len, pieces))
            if len(pieces) > 1 and self.unsent <= SLICE:
                pieces = [b"".join(pieces)]
            self._outgoing.extend(memoryview(piece) for piece in pieces)
            self._pieces = []
        while self._outgoing:
            view = self._outgoing[0]
            try:
                sent = self.sock.send(view[:SLICE])
            except (BlockingIOError, ssl.SSLWantWriteError):
                return False
            self.unsent -= sent
            if sent == len(view):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = view[sent:]
        return True

    def wait_for_room(self, timeout: float) -> None:
        """In a thread that makes a long response: wait until little is unsent; raises ``ReaderTooSlow``."""
        if self.unsent <= ROOM:
            return
        deadline = time.monotonic() + timeout
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        while self.unsent > ROOM // 2:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ReaderTooSlow
            poller.poll(left * 1000)
            self.flush()

    def end_sending(self) -> None:
        """Tell the client that nothing more comes, in TLS (RFC 8446 section 6.1) and in TCP."""
        if isinstance(self.sock, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_WR)

    @property
    def unacknowledged(self) -> bool:
        """Whether the client's kernel has yet to acknowledge bytes that were sent (SIOCOUTQ of tcp(7))."""
        waiting: int = struct.unpack("i", fcntl.ioctl(self.fd, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
        return waiting > 0

    @property
    def received(self) -> bool:
        """Whether the client has all that was sent, as far as TCP can tell.

        A client that read everything closes in order. One that went away before, its program with bytes unread or
        its machine, leaves a reset connection or bytes that nobody acknowledges.
        """
        if self.broken or self.unsent or self._pieces or self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return False
        return not self.unacknowledged

    def discard(self) -> bool:
        """Throw away what still arrives; returns whether the client may send more."""
        for _ in range(READ_LIMIT // READ_SIZE):
            try:
                if not socket.socket.recv(self.sock, READ_SIZE):
                    return False
            except BlockingIOError:
                break
        return True

    def close(self) -> None:
        """Close the socket at once."""
        self.phase = Phase.CLOSED
        self.buffer = bytearray()
        self._outgoing.clear()
        self._pieces = []
        self.unsent = 0
        self.sock.close()
