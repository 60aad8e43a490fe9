"""A worker process of gunicorn's, whose threads answer requests.

gunicorn's own lets the kernel take connections while it stops, and resets them; miscounts them; has a thread wait for
a client that sends nothing; and wakes two threads for each request of a client that sends the next one at once.
"""

from __future__ import annotations

import functools
import itertools
import select
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from web.listeners import stop_listening
from web.sharing import Inbox, SharedListener, Sharing

IDLE_SECONDS = 1.0  # after which a connection without a request does not count when those of workers are compared
STAY_SECONDS = 0.02  # that a thread waits for the next request of a client before others wait for it
SILENT_AT_STOP = 5.0  # seconds that a client which has sent nothing yet has when the server stops


class Worker(ThreadWorker):
    """A worker of one listener."""

    sockets: list[Any]
    nr_conns: int
    keepalived_conns: deque[Any]
    pending_conns: deque[Any]
    number = 0  # from 0, no other worker's of the same gunicorn
    _sharing: Sharing | None = None
    _others: Sequence[Inbox] = ()  # what the other workers take connections from

    def share(self, sharing: Sharing, workers: int) -> None:
        """Share connections with the other ``workers`` from now on."""
        own: list[socket.socket] = [SharedListener(sharing, self.number, listener) for listener in self.sockets]
        for listener in self.sockets:
            listener.close()
        self.sockets = [*own, sharing.inbox(self.number)]
        self._others = [sharing.inbox(number) for number in range(workers) if number != self.number]
        self._sharing = sharing
        self._tell()

    def notify(self) -> None:
        """Say that this worker lives, as once a second at least, and take what others leave that do not."""
        super().notify()
        self._make_room()
        self._tell()
        for other in self._others:
            if self._sharing is not None and self._sharing.has_left(other.number):
                self.accept(other)

    def accept(self, listener: socket.socket) -> None:
        """Accept a connection of a listener, or one that another worker gives."""
        super().accept(listener)
        self._tell()

    def _make_room(self) -> None:
        """Where no connection can be accepted any more, close the one that was idle longest, unless that is not long.

        Else whoever opens as many as there may be keeps all others out.
        """
        idle = [each for each in (self.keepalived_conns, self.pending_conns) if each]
        if self.alive and idle and self.nr_conns >= self.worker_connections:
            oldest = min((each[0] for each in idle), key=lambda conn: conn.timeout)
            if oldest.timeout < self._idle_since():
                oldest.timeout = 0.0
                self.murder_keepalived()
                self.murder_pending()

    def _tell(self) -> None:
        if self._sharing is not None and self.alive:
            in_use = self._busy() + self._recent(self.keepalived_conns, self.pending_conns)
            is_full = self.nr_conns >= self.worker_connections
            self._sharing.tell(self.number, self.nr_conns if is_full else in_use)

    def _busy(self) -> int:
        """Return how many connections have a thread, or wait for one."""
        return max(0, self.nr_conns - len(self.keepalived_conns) - len(self.pending_conns))

    def _recent(self, *idle: deque[Any]) -> int:
        """Return on how many idle connections the client has sent something lately, or has just come.

        Only these count, or whoever keeps many open at one worker could send all others to another one.
        """
        since = self._idle_since()
        return sum(1 for each in idle for _ in itertools.takewhile(lambda conn: conn.timeout >= since, reversed(each)))

    def _idle_since(self) -> float:
        """Return until when gunicorn keeps a connection that begins to count as idle now."""
        return time.monotonic() + float(self.cfg.keepalive) - IDLE_SECONDS

    def set_accept_enabled(self, enabled: bool) -> None:
        """Also take what waits before it listens no more."""
        super().set_accept_enabled(enabled)
        if not enabled and not self.alive:
            if self._sharing is not None:
                self._sharing.close(self.number)
            for silent in self.pending_conns:
                silent.timeout = min(silent.timeout, time.monotonic() + SILENT_AT_STOP)
            stop_listening(self.sockets, self.accept)

    def enqueue_req(self, conn: Any) -> None:
        """Have a thread answer, and none wait for a client that has not sent a byte yet: gunicorn's would, 5 s each."""
        if conn.initialized or conn.data_ready:
            super().enqueue_req(conn)
            return
        conn.timeout = time.monotonic() + (self.cfg.keepalive if self.alive else SILENT_AT_STOP)
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, functools.partial(self.on_pending_socket_readable, conn))

    def handle(self, conn: Any) -> Any:
        """Answer a request, and those that follow at once: this thread waits for the next one for a moment.

        The client would else be handed to the thread that waits for all connections, and to another one of these. That
        is what becomes of a client, too, whose handshake is done and who sends no request, as browsers do.
        """
        if not conn.initialized:
            try:
                conn.sock.setblocking(True)
                conn.init()
            except OSError:  # of its handshake
                return False
            if not conn.is_http2 and not self._arrives(conn, STAY_SECONDS if self._may_stay() else 0.0):
                return True
        goes_on = super().handle(conn)
        while goes_on is True and (_is_decrypted(conn) or (self._may_stay() and self._arrives(conn, STAY_SECONDS))):
            goes_on = super().handle(conn)
        return goes_on

    def _may_stay(self) -> bool:
        """Whether half of the threads are free for others; one that has a request or waits for one is not."""
        return bool(self.alive and self._busy() <= self.cfg.threads // 2)

    def _arrives(self, conn: Any, seconds: float) -> bool:
        """Whether a request begins to arrive in this time; not if it is here already, with which gunicorn goes on."""
        if conn.parser.unreader.buf.getvalue():
            return False
        arrival = select.poll()
        arrival.register(conn.sock, select.POLLIN)
        return bool(arrival.poll(seconds * 1000))

    def finish_request(self, conn: Any, fs: Any) -> None:
        """Count a connection once that has ended, also if it could not be closed, as after a failed handshake.

        Else their number is too small: a worker that stops does not wait for all requests, and accepts too many before.
        """
        before = self.nr_conns
        super().finish_request(conn, fs)
        self.nr_conns = max(self.nr_conns, before - 1)


def _is_decrypted(conn: Any) -> bool:
    """Whether the next request came in one TLS record with the last one, so that nothing arrives at the socket."""
    return isinstance(conn.sock, ssl.SSLSocket) and conn.sock.pending() > 0
