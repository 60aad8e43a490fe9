"""The worker process: threads run the application beside an event loop that does the waiting."""

from __future__ import annotations

import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker

from core.errors import PortalError
from web.serving_connection import Connection
from web.serving_framing import BegunRequest, WholeRequest
from web.serving_loop import ClientLoop
from web.serving_refusals import RequestRefused, busy
from web.serving_response import ClientGone, respond

START_AGAIN = 1.0  # seconds between two tries to start a worker
MOST_STREAMS = 8  # requests of a worker whose bodies are read while the application works
STOP_MARGIN = 1.0  # seconds by which a worker gives up before it would be killed


class PortalWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's threaded worker, with its handling of connections replaced by ``ClientLoop``.

    The stock one lets a thread wait for the TLS handshake, the head and the body of a request, with no deadline: as
    many slow clients as it has threads hold it up. Here a thread is taken only while the application works.
    """

    def init_process(self) -> None:
        """Make the loop, then load the application and run."""
        self.settings = self.app.settings
        listeners = dict(zip(self.sockets, self.app.names, strict=True))
        count = self.app.counts.of(self.slot)
        self.streams = threading.BoundedSemaphore(MOST_STREAMS)
        self.loop = ClientLoop(self.settings, self.app.tls, listeners, count, self.dispatch, self.in_background)
        super().init_process()

    def init_signals(self) -> None:
        """Leave it to the master what Ctrl-C and a closed terminal mean: they reach every process of the group."""
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at once."""
        sys.exit(0)

    def load_wsgi(self) -> None:
        """Make the application; what keeps it from being made is told to the master in a sentence."""
        try:
            super().load_wsgi()
            self.app.on_worker_start(self.wsgi)
        except PortalError as error:
            self.app.reports.failed(error.detail)
            self.give_up_starting()
        except Exception:
            self.log.exception("The application could not be made.")
            self.app.reports.failed("The portal could not start because of an error in it; the log says where.")
            self.give_up_starting()

    def give_up_starting(self) -> NoReturn:
        """End, in a server that has answered before not faster than another worker is to be started in place."""
        if self.app.served:
            time.sleep(START_AGAIN)
        sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def run(self) -> None:
        """Serve until told to stop, then finish what is in flight."""
        self.loop.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        self.loop.listen(True)
        self.app.reports.ready()
        while self.alive:
            self.turn()
        self.loop.stop()
        until = time.monotonic() + self.cfg.graceful_timeout - STOP_MARGIN
        while self.loop and time.monotonic() < until:
            self.turn()

    def turn(self) -> None:
        """Let the loop handle what has happened; tell the master from time to time that this process lives."""
        if self.loop.turn():
            self.notify()
            if not self.is_parent_alive():
                self.alive = False

    def dispatch(self, connection: Connection, request: WholeRequest | BegunRequest) -> None:
        """Have a thread of the pool work on a request, or one beside them on a request that will take its time."""
        if isinstance(request, WholeRequest):
            self.tpool.submit(self.work, connection, request)
        elif self.streams.acquire(blocking=False):
            # A daemon: what waits for its client's next row must not keep the process from ending.
            threading.Thread(target=self.work_on_stream, args=(connection, request), daemon=True).start()
        else:
            self.loop.refuse(connection, busy("There are too many uploads at this time; try again in a few seconds."))

    def in_background(self, function: Callable[[], None]) -> None:
        """Have a thread of the pool call a function, whose failure is logged."""

        def call() -> None:
            try:
                function()
            except Exception:
                self.log.exception("What was to follow a response failed.")

        self.tpool.submit(call)

    def work_on_stream(self, connection: Connection, request: BegunRequest) -> None:
        """In a thread of its own: as ``work``, then make room for another stream."""
        try:
            self.work(connection, request)
        finally:
            self.streams.release()

    def work(self, connection: Connection, request: WholeRequest | BegunRequest) -> None:
        """In a thread: run the application, then give the connection back to the loop."""
        connection.keep = False
        try:
            connection.keep = respond(self, connection, request)
        except RequestRefused as refusal:
            self.method_queue.defer(self.loop.refuse, connection, refusal)
        except ClientGone:
            self.method_queue.defer(self.loop.drop, connection)
        except Exception:
            self.log.exception("A connection was closed because of an error in the server.")
            self.method_queue.defer(self.loop.drop, connection)
        else:
            self.method_queue.defer(self.loop.begin_sending, connection)
