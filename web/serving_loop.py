"""The event loop that does all waiting for clients."""

from __future__ import annotations

import errno
import logging
import math
import selectors
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus

from config import Settings
from core import metrics
from web.serving_balance import ConnectionCount
from web.serving_connection import Connection, Phase
from web.serving_framing import BegunRequest, RequestScanner, WholeRequest
from web.serving_limits import OpenConnections
from web.serving_listeners import ServerTls
from web.serving_refusals import RequestRefused

TICK = 0.5  # seconds between looks at the deadlines
KEEPALIVE = 75.0  # seconds that an idle connection is kept
LINGER = 2.0  # seconds a client has to close its side, so that it sees the end of its answer (RFC 9112 section 9.6)
SLOWEST_READER = 16 * 1024  # bytes a second; a response is given up that takes longer, plus the request's timeout
YIELD = 0.003  # seconds that a worker leaves a new connection to another one that has fewer
# The route whose body the application reads while it arrives, as long as it may be.
STREAMED = b"POST /register/bulk"
SHED_REPORT = 10.0  # seconds between two log lines about connections that were given up

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
PLAIN_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 33\r\n\r\nThis port speaks HTTPS, not HTTP."
)
SLOW = RequestRefused(
    HTTPStatus.REQUEST_TIMEOUT, "request_timeout", "The request did not arrive in time; send it again."
)
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger("portal.serving")


class ClientLoop:
    """Accepts connections, reads whole requests, sends responses; a slow client costs it no thread.

    ``dispatch`` is called with each whole request, or with the head of one whose body is streamed. Until
    ``begin_sending``, ``refuse`` or ``drop`` is called for its connection, in the loop's thread, the connection is the
    callee's. ``background`` has a thread call a function.
    """

    def __init__(
        self,
        settings: Settings,
        tls: ServerTls,
        listeners: Mapping[socket.socket, str],
        count: ConnectionCount,
        dispatch: Callable[[Connection, WholeRequest | BegunRequest], None],
        background: Callable[[Callable[[], None]], object],
    ) -> None:
        self.poller = selectors.DefaultSelector()
        self.stopping = False
        self._settings = settings
        self._tls = tls
        self._listeners = listeners
        self._count = count
        self._dispatch = dispatch
        self._streamed = {STREAMED: settings.bulk_max_bytes}
        self._background = background
        self._open = OpenConnections(settings.max_connections)
        self._now = time.monotonic()
        self._next_tick = self._now
        self._listening = False
        self._resume = math.inf  # when to listen again
        self._yielded = False
        self._shed = 0
        self._shed_reported = -math.inf
        self._steps: dict[Phase, Callable[[Connection], None]] = {
            Phase.HANDSHAKE: self._handshake,
            Phase.IDLE: self._receive,
            Phase.READING: self._receive,
            Phase.SENDING: self._send,
            Phase.LINGERING: self._discard,
        }

    def __len__(self) -> int:
        return len(self._open)

    # --- Turns ------------------------------------------------------------------------------------------------

    def turn(self, wait: float = TICK) -> bool:
        """Wait for events, at most ``wait`` seconds, then handle them; returns whether a tick has passed."""
        events = self.poller.select(min(wait, max(0.0, self._resume - self._now)))
        self._now = time.monotonic()
        for key, _ in events:
            key.data(key.fileobj)
        if self._now >= self._resume:
            self.listen(True)
        if self._now < self._next_tick:
            return False
        self._next_tick = self._now + TICK
        self._expire()
        self._tls.refresh()
        self.listen(not self.stopping)
        return True

    def listen(self, wanted: bool) -> None:
        """Take new connections, or leave them in the kernel's queue."""
        self._resume = math.inf
        if wanted != self._listening:
            self._listening = wanted
            for listener in self._listeners:
                if wanted:
                    self.poller.register(listener, READ, self._accept)
                else:
                    self.poller.unregister(listener)

    def stop(self) -> None:
        """Take no new connections, close those that nothing has come on; the others may end what they have begun."""
        self.turn(0)  # a request that has arrived by now is still answered
        self.stopping = True
        self.listen(False)
        for listener in self._listeners:
            listener.close()
        for connection in self._open.of(Phase.IDLE, Phase.HANDSHAKE, Phase.READING, Phase.LINGERING):
            if connection.started:
                connection.deadline = min(connection.deadline, self._now + LINGER)
            else:
                self.drop(connection)

    def _expire(self) -> None:
        for connection in self._open.overdue(self._now):
            if connection.phase is Phase.READING and connection.started:
                self.refuse(connection, SLOW)
            else:
                self.drop(connection)
        if self._shed and self._now - self._shed_reported >= SHED_REPORT:
            log.warning("Overload: %d connections that kept others waiting were closed.", self._shed)
            self._shed, self._shed_reported = 0, self._now

    # --- Connections ------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        if not self._yielded and self._count.is_ahead():
            self.listen(False)
            self._yielded, self._resume = True, self._now + YIELD
            return
        self._yielded = False
        if self._open.full and not self._make_room():
            self.listen(False)  # until the next tick, or until a connection is closed
            return
        try:
            sock, client = listener.accept()
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES and not self._make_room():
                self.listen(False)
            return
        name = self._listeners[listener]
        scanner = RequestScanner(self._settings.max_body_bytes, self._streamed if name == "main" else None)
        connection = Connection(sock, client, sock.getsockname(), name, tls=name == "main", scanner=scanner)
        self._enter(connection, connection.phase, self._settings.request_timeout)
        self._watch(connection, READ)
        self._count.set(len(self._open))

    def _enter(self, connection: Connection, phase: Phase, timeout: float) -> None:
        self._open.enter(connection, phase, self._now, timeout)

    def _watch(self, connection: Connection, events: int) -> None:
        if events == connection.watched:
            return
        if not events:
            self.poller.unregister(connection.fd)
        elif connection.watched:
            self.poller.modify(connection.fd, events, partial(self._step, connection))
        else:
            self.poller.register(connection.fd, events, partial(self._step, connection))
        connection.watched = events

    def _step(self, connection: Connection, _descriptor: int) -> None:
        step = self._steps.get(connection.phase)
        if step is None:  # closed, or dispatched, by an event before this one
            return
        try:
            step(connection)
        except ssl.SSLWantReadError:
            self._watch(connection, READ)
        except ssl.SSLWantWriteError:
            self._watch(connection, WRITE)
        except OSError:  # the client is gone, or does not speak TLS
            connection.broken = True
            self.drop(connection)
        except Exception:
            log.exception("A connection was closed because of an error in the server.")
            self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """Close a connection now."""
        if connection.phase is Phase.CLOSED:
            return
        self._watch(connection, 0)
        self._open.remove(connection)
        self._count.set(len(self._open))
        if connection.when_done is not None:
            received = connection.phase is Phase.LINGERING and connection.received
            self._background(partial(connection.when_done, received))
        connection.close()
        if not self._listening and self._resume == math.inf:
            self._resume = self._now if not self.stopping else math.inf

    def _make_room(self) -> bool:
        victim = self._open.victim(self._now)
        if victim is None:
            return False
        if victim.phase is not Phase.IDLE:
            self._count_shed()
        self.drop(victim)
        return True

    def _weigh(self, connection: Connection) -> None:
        while (heaviest := self._open.weigh(connection)) is not None:
            self._count_shed()
            self.drop(heaviest)

    def _count_shed(self) -> None:
        self._shed += 1
        metrics.shed()

    # --- The phases, one after the other ----------------------------------------------------------------------

    def _handshake(self, connection: Connection) -> None:
        try:
            connection.handshake(self._tls.context)
        except ssl.SSLError as error:
            if error.reason == "HTTP_REQUEST":
                socket.socket.send(connection.sock, PLAIN_HTTP)
            raise
        self._enter(connection, Phase.READING, connection.deadline - self._now)
        self._receive(connection)  # the first request may have come along

    def _receive(self, connection: Connection) -> None:
        if connection.phase is Phase.IDLE:
            self._enter(connection, Phase.READING, self._settings.request_timeout)
        self._watch(connection, READ)
        more = connection.receive()
        try:
            request = connection.scanner.take(connection.buffer)
        except RequestRefused as refusal:
            self.refuse(connection, refusal)
            return
        if request is not None:
            self._watch(connection, 0)
            self._enter(connection, Phase.WORKING, 0)
            self._dispatch(connection, request)
        elif not more:
            self.drop(connection)
            return
        elif connection.scanner.wants_continue:
            connection.scanner.wants_continue = False
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.flush()
        self._weigh(connection)

    def refuse(self, connection: Connection, refusal: RequestRefused) -> None:
        """Answer a request that the application never sees, then close the connection."""
        request_id = str(uuid.uuid4())
        log.info("Refused a request from %s: %s", connection.client[0], refusal.code, extra={"request_id": request_id})
        metrics.refused(refusal.code)
        connection.keep = False
        connection.sendall(refusal.response(request_id))
        self.begin_sending(connection)

    def begin_sending(self, connection: Connection) -> None:
        """Send what is queued on a connection, then go on as its ``keep`` says."""
        self._enter(connection, Phase.SENDING, self._settings.request_timeout + connection.unsent / SLOWEST_READER)
        self._step(connection, connection.fd)

    def _send(self, connection: Connection) -> None:
        sent = connection.flush()
        self._weigh(connection)
        if connection.phase is Phase.CLOSED:
            return
        if not sent:
            self._watch(connection, WRITE)
        elif not connection.keep:
            if connection.when_done is None:
                connection.end_sending()
            # Else the client is to close first: a last word from here, unread, would make it look as if it broke off.
            self._enter(connection, Phase.LINGERING, LINGER)
            self._watch(connection, READ)
        elif connection.buffer or connection.pending:
            self._enter(connection, Phase.READING, self._settings.request_timeout)
            self._receive(connection)
        elif self.stopping:
            self.drop(connection)
        else:
            self._enter(connection, Phase.IDLE, KEEPALIVE)
            self._watch(connection, READ)

    def _discard(self, connection: Connection) -> None:
        if connection.discard():
            return
        if connection.when_done is not None and connection.unacknowledged and not connection.broken:
            self._watch(connection, 0)  # it may only have closed its own side: the deadline tells
        else:
            self.drop(connection)
