"""A worker process of gunicorn's, whose threads answer requests.

gunicorn's own lets the kernel take connections while it stops, and resets them; miscounts them; has a thread wait for
a client that sends nothing; and wakes two threads for each request of a client that sends the next one at once.
"""

from __future__ import annotations

import functools
import select
import selectors
import socket
import time
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from web.listeners import stop_listening
from web.sharing import SharedListener, Sharing

STAY_SECONDS = 0.02  # that a thread waits for the next request of a client before others wait for it
SILENT_AT_STOP = 5.0  # seconds that a client which has sent nothing yet has when the server stops


class Worker(ThreadWorker):
    """A worker of one listener."""

    sockets: list[Any]
    number = 0  # from 0, no other worker's of the same gunicorn
    _sharing: Sharing | None = None
    _connections = 0

    @property
    def nr_conns(self) -> int:
        """How many connections this worker has; gunicorn counts them, and the other workers see it."""
        return self._connections

    @nr_conns.setter
    def nr_conns(self, connections: int) -> None:
        self._connections = connections
        if self._sharing is not None and self.alive:
            self._sharing.count(self.number, connections)

    def share(self, sharing: Sharing) -> None:
        """Share connections with the other workers from now on."""
        own: list[socket.socket] = [SharedListener(sharing, self.number, listener) for listener in self.sockets]
        for listener in self.sockets:
            listener.close()
        self.sockets = [*own, sharing.inbox(self.number)]
        self._sharing = sharing
        sharing.count(self.number, self._connections)

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

        The client would else be handed to the thread that waits for all connections, and to another one of these.
        """
        goes_on = super().handle(conn)
        while goes_on is True and self._may_stay() and self._follows_at_once(conn):
            goes_on = super().handle(conn)
        return goes_on

    def _may_stay(self) -> bool:
        """Whether half of the threads are free for others; one that has a request or waits for one is not."""
        busy = self.nr_conns - len(self.keepalived_conns) - len(self.pending_conns)
        return bool(self.alive and busy <= self.cfg.threads // 2)

    def _follows_at_once(self, conn: Any) -> bool:
        if conn.parser.unreader.buf.getvalue():  # it is here already: gunicorn goes on with it
            return False
        arrival = select.poll()
        arrival.register(conn.sock, select.POLLIN)
        return bool(arrival.poll(STAY_SECONDS * 1000))

    def finish_request(self, conn: Any, fs: Any) -> None:
        """Count a connection once that has ended, also if it could not be closed, as after a failed handshake.

        Else their number is too small: a worker that stops does not wait for all requests, and accepts too many before.
        """
        before = self.nr_conns
        super().finish_request(conn, fs)
        self.nr_conns = max(self.nr_conns, before - 1)
