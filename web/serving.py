"""Runs a WSGI application on two listeners, HTTPS for everything with plain HTTP for certificates."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.glogging import Logger

from config import Settings
from core.errors import PortalError, StartupError
from web.serving_balance import ConnectionCounts
from web.serving_listeners import ServerTls, allow_open_files, listen
from web.serving_worker import PortalWorker

GRACEFUL_TIMEOUT = 10  # seconds that requests in flight have when the server stops
WORKER_TIMEOUT = 60  # seconds without a sign of life after which a worker is replaced
SPARE_FILES = 256  # file descriptors of a worker beyond its connections: database, logs, pipes

log = logging.getLogger("portal.serving")

WsgiApp = Callable[..., Iterable[bytes]]


def serve(
    settings: Settings,
    app_factory: Callable[[], WsgiApp],
    *,
    certificate: Path,
    key: Path,
    on_ready: Callable[[], None],
    client_cas: Path | None = None,
    on_listening: Callable[[], None] | None = None,
    on_worker_start: Callable[[Any], None] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status, which is 0 after a graceful stop.

    ``certificate`` (a chain, PEM), ``key`` and ``client_cas`` (PEM, the CAs whose certificates a client may present)
    are read again when they change on disk. ``app_factory`` is called in each worker process, ``on_worker_start`` right
    after it with the application, ``on_listening`` once in the master, when the ports are its own, ``on_ready`` when
    the first worker answers. The application finds in its WSGI environ ``portal.listener``, "main" or "pki", and
    ``gunicorn.socket``, the ``ssl.SSLSocket`` of the client.
    Raises ``StartupError``.
    """
    tls = ServerTls(certificate, key, client_cas)
    allow_open_files(settings.max_connections + SPARE_FILES)
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(listen(settings.bind, "PORTAL_BIND")),
            stack.enter_context(listen(settings.pki_bind, "PORTAL_PKI_BIND")),
        ]
        if on_listening is not None:
            on_listening()
        application = _Application(settings, app_factory, tls, on_worker_start or (lambda _app: None))
        arbiter = _Master(application, on_ready)
        arbiter.LISTENERS = listeners
        status: object = 0
        try:
            arbiter.run()
        except SystemExit as stopped:
            status = stopped.code
    if arbiter.failure is not None:
        raise arbiter.failure
    return status if isinstance(status, int) else int(status is not None)


# --- Processes ----------------------------------------------------------------------------------------------------


class WorkerReports:
    """A pipe by which workers tell the master that they answer, or in a sentence why they cannot start."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)

    def ready(self) -> None:
        """Say, in a worker, that it answers."""
        os.write(self._writing, b"\n")

    def failed(self, sentence: str) -> None:
        """Say, in a worker, why it ends."""
        os.write(self._writing, sentence.replace("\n", " ").encode()[:4000] + b"\n")

    def read(self) -> list[str]:
        """In the master, what workers said since the last call; an empty text is a worker that answers."""
        try:
            return os.read(self._reading, 65536).decode(errors="replace").split("\n")[:-1]
        except BlockingIOError:
            return []


class _Log(Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's own messages, through the root logger; requests are the application's to log."""

    def setup(self, cfg: Any) -> None:
        """Leave handlers and formats to the root logger."""
        self.cfg = cfg
        self._access_log_enabled = False
        self.error_log.propagate = True
        self.error_log.setLevel(logging.INFO if log.isEnabledFor(logging.DEBUG) else logging.WARNING)


class _Application(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's settings with what a worker needs to know."""

    names = ("main", "pki")  # of the listeners, in their order

    def __init__(
        self,
        settings: Settings,
        app_factory: Callable[[], WsgiApp],
        tls: ServerTls,
        on_worker_start: Callable[[Any], None],
    ) -> None:
        self.settings = settings
        self.load = app_factory
        self.tls = tls
        self.reports = WorkerReports()
        self.counts = ConnectionCounts()
        self.on_worker_start = on_worker_start
        self.served = False  # in a worker: whether the server had answered before it was started
        super().__init__()

    def load_config(self) -> None:
        """Set everything that gunicorn would else take from its environment, or that trusts a header of a client."""
        options = {
            "worker_class": PortalWorker,
            "workers": self.settings.workers,
            "threads": self.settings.threads,
            "worker_connections": self.settings.max_connections,
            "timeout": WORKER_TIMEOUT,
            "graceful_timeout": GRACEFUL_TIMEOUT,
            "limit_request_line": 8190,
            "limit_request_field_size": 8190,
            "limit_request_fields": 100,
            "forwarded_allow_ips": "",
            "secure_scheme_headers": {},
            "forwarder_headers": "",
            "http_parser": "python",
            "logger_class": _Log,
            "sendfile": False,
            "control_socket_disable": True,
            "pre_fork": lambda _master, worker: setattr(worker, "slot", self.counts.claim()),
            "child_exit": lambda _master, worker: self.counts.release(worker.slot),
        }
        for name, value in options.items():
            self.cfg.set(name, value)


class _Master(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's master process, that knows when the server is ready, or will never be."""

    def __init__(self, application: _Application, on_ready: Callable[[], None]) -> None:
        super().__init__(application)
        self.failure: PortalError | None = None
        self._halting = False
        self._stopping = False
        self._application = application
        self._reports = application.reports
        self._on_ready: Callable[[], None] | None = on_ready

    def wait_for_signals(self, timeout: float = 1.0) -> list[int]:
        """Wait as gunicorn does, looking out for the first worker that answers."""
        signals: list[int] = super().wait_for_signals(timeout if self._on_ready is None else 0.02)
        self._hear()
        return signals

    def _hear(self) -> None:
        for sentence in self._reports.read():
            if sentence and self._on_ready is None:
                # It did start before: what keeps it from starting now (a full disk, a database that is away) may pass.
                self.log.error("A worker could not start and is tried again: %s", sentence)
            elif sentence:
                self.failure = self.failure or StartupError(sentence)
                self.log.error_log.disabled = True  # the sentence says it all
            elif self._on_ready is not None and not self._stopping:
                on_ready, self._on_ready = self._on_ready, None
                self._application.served = True
                if self.failure is not None:  # another worker's, which was heard before this one answered
                    self.log.error_log.disabled = False
                    self.log.error("A worker could not start and is tried again: %s", self.failure.detail)
                    self.failure = None
                try:
                    on_ready()
                except PortalError as error:
                    self.failure = error
                    raise HaltServer(error.detail, 1) from None

    def stop(self, graceful: bool = True) -> None:
        """Stop as gunicorn does; a worker that comes to answer meanwhile, its ports closed, makes no server ready."""
        self._stopping = True
        super().stop(graceful)

    def reap_workers(self) -> None:
        """Hear why a worker ended before acting on it; one that could not start stops a server that never answered."""
        self._hear()
        while True:
            before = dict(self.WORKERS)
            try:
                super().reap_workers()
            except HaltServer:
                for pid in before.keys() - self.WORKERS.keys():
                    if not before[pid].tmp._tmp.closed:
                        before[pid].tmp.close()
                        self.cfg.child_exit(self, before[pid])
                if self._on_ready is None:
                    continue
                if not self._halting:  # else gunicorn is here because it waits for the others
                    self._halting = True
                    raise
            return

    def spawn_worker(self) -> int:
        """Start a worker process, which ends here: nothing of the master's stack is run in it."""
        try:
            return int(super().spawn_worker())
        except SystemExit as stopped:
            if os.getpid() == self.pid:
                raise
            _end(stopped.code)

    def handle_int(self) -> None:
        """Stop gracefully at the first Ctrl-C; a second one is taken as a wish to stop at once."""
        self.handle_term()

    def handle_hup(self) -> None:
        """Stop when the terminal is closed: there is nothing to reload but the certificate, which is noticed anyway."""
        self.handle_term()

    def handle_usr2(self) -> None:
        """Refuse to start a second master: it could not have the listeners."""


def _end(code: object) -> NoReturn:
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
