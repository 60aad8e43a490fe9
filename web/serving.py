"""Runs the WSGI application under gunicorn: HTTPS for everything, and plain HTTP for certificates.

``serve`` runs two gunicorns with threaded workers: the main one in this process, and one on PORTAL_PKI_BIND in a child
process. Both end together.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from config import Settings
from core import processors
from core.errors import PortalError, StartupError
from core.setting_values import Address
from web.listeners import ClientSocket, RequestBody, ServerTls, allow_open_files, listen, listen_again
from web.sharing import Sharing
from web.slow_clients import MAX_LINGERING, Lingering, SlowClients
from web.worker import Worker

GRACEFUL_TIMEOUT = 10  # seconds that requests in flight have when the server stops
WORKER_TIMEOUT = 60  # seconds without a sign of life after which a worker is replaced
KEEPALIVE = 75  # seconds that an idle connection is kept
START_AGAIN = 1.0  # seconds between two tries to start a worker
# Python's default is ten times as long, and a thread that has waited for the disk, as each that writes does several
# times, waits for so long again if another one computes.
SWITCH_SECONDS = 0.0005
SPARE_FILES = 256  # file descriptors of a worker beyond its connections: database, logs, pipes

log = logging.getLogger("portal.serving")

WsgiApp = Callable[..., Iterable[bytes]]
Listener = Literal["main", "pki"]
LISTENERS: tuple[Listener, ...] = ("main", "pki")


def serve(
    settings: Settings,
    app_factory: Callable[[Listener], WsgiApp],
    *,
    certificate: Path,
    key: Path,
    on_ready: Callable[[], None],
    client_cas: Path | None = None,
    on_listening: Callable[[], None] | None = None,
    on_worker_start: Callable[[Any], None] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status, which is 0 after a graceful stop.

    ``certificate`` (a chain, PEM), ``key`` and ``client_cas`` (PEM, the CAs whose certificates a client may present)
    are read again when they change on disk. ``app_factory`` is called here, once for each listener; ``on_worker_start``
    is called in each worker process with the application, which must open nothing before that; ``on_listening`` is
    called here when the ports are bound, ``on_ready`` in the first worker that is ready. The application finds in its
    WSGI environ ``portal.listener``, "main" or "pki", and ``gunicorn.socket``, the client's socket.
    Raises ``StartupError``.
    """
    tls = (
        None
        if settings.bind.is_unix
        else ServerTls(certificate, key, client_cas, settings.request_timeout, SlowClients(settings.threads))
    )
    allow_open_files(settings.max_connections + MAX_LINGERING + SPARE_FILES)
    start = _Start(on_worker_start or (lambda _app: None), on_ready)
    with contextlib.ExitStack() as stack:
        main_sockets = _sockets(stack, settings, settings.bind, "PORTAL_BIND")
        pki_sockets = _sockets(stack, settings, settings.pki_bind, "PORTAL_PKI_BIND")
        if on_listening is not None:
            on_listening()
        apps = {listener: app_factory(listener) for listener in LISTENERS}
        main_end, pki_end = socket.socketpair()
        child = os.fork()
        if not child:
            pki = _Gunicorn("pki", settings, apps["pki"], start, pki_sockets, pki_end)
            pki.run_and_exit(*main_sockets, main_end)
        _close([pki_end, *pki_sockets])
        status = _Gunicorn("main", settings, apps["main"], start, main_sockets, main_end, tls).run_beside(child)
    if sentence := start.failure():
        raise StartupError(sentence)
    return status


def check_addresses(settings: Settings) -> None:
    """Raise ``StartupError`` unless the portal may listen on its TCP addresses now."""
    with contextlib.ExitStack() as stack:
        addresses = {"PORTAL_BIND": settings.bind, "PORTAL_PKI_BIND": settings.pki_bind}
        if settings.agents_bind is not None:
            addresses["PORTAL_AGENTS_BIND"] = settings.agents_bind
        for setting, address in addresses.items():
            if not address.is_unix:
                _sockets(stack, settings, address, setting)


def _sockets(stack: contextlib.ExitStack, settings: Settings, address: Address, setting: str) -> list[socket.socket]:
    sockets = listen(address, setting, settings.request_timeout, settings.workers)
    stack.callback(_close, sockets)
    return sockets


# --- Processes ----------------------------------------------------------------------------------------------------


class _Start:
    """What master and workers know together of the start: whether one of them has been ready, or cannot be."""

    STARTING, READY, FAILED = b"s", b"r", b"f"

    def __init__(self, on_worker_start: Callable[[Any], None], on_ready: Callable[[], None]) -> None:
        self._on_worker_start = on_worker_start
        self._on_ready = on_ready
        # A pipe that holds the state, one byte. Only the process that has read it decides what it becomes.
        self._state, self._state_in = os.pipe()
        os.write(self._state_in, self.STARTING)
        self._failures, self._failures_in = os.pipe()
        os.set_blocking(self._failures, False)

    def _decide(self, new: bytes) -> bytes:
        """Return the state; where that is still STARTING, it becomes ``new``."""
        state = os.read(self._state, 1)
        os.write(self._state_in, new if state == self.STARTING else state)
        return state

    def fail(self, sentence: str) -> None:
        """Say why the server ends."""
        os.write(self._failures_in, sentence.replace("\n", " ").encode()[:4000] + b"\n")

    @property
    def has_failed(self) -> bool:
        """Whether somebody has said why the server ends."""
        return bool(select.select([self._failures], [], [], 0)[0])

    def failure(self) -> str:
        """Take out the sentence that was said first, empty where there is none."""
        try:
            return os.read(self._failures, 65536).decode(errors="replace").partition("\n")[0]
        except BlockingIOError:
            return ""

    def work(self, app: Any, listener: Listener, own: socket.socket | None) -> None:
        """In a worker that is about to serve: prepare the application, or end the process and say why.

        ``own`` is the TCP listener that the worker shares with no other.
        """
        try:
            self._on_worker_start(app)
        except PortalError as error:
            self._give_up(error.detail, own)
        except Exception:
            log.exception("The application could not be made.")
            self._give_up("The portal could not start because of an error in it; the log says where.", own)
        if listener == "main" and self._decide(self.READY) == self.STARTING:
            try:
                self._on_ready()
            except PortalError as error:
                self.fail(error.detail)
                sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def _give_up(self, sentence: str, own: socket.socket | None) -> NoReturn:
        state = self._decide(self.FAILED)
        if state == self.STARTING:
            self.fail(sentence)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)  # at which gunicorn ends the server
        if state == self.READY:
            # It did start before: what keeps it from starting now (a full disk, a database that is away) may pass.
            if own is not None and own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                # It listens no longer: the others get all connections. Once only: one that does not listen would be
                # closed for reading, and so would all connections once it listens again.
                own.shutdown(socket.SHUT_RD)
            log.error("A worker could not start and is tried again: %s", sentence)
        time.sleep(START_AGAIN)
        sys.exit(1)

    def shows(self, record: logging.LogRecord) -> bool:
        """Decide whether a message of gunicorn's is logged, and take what clients have sent out of it."""
        if self.has_failed or (record.exc_info and isinstance(record.exc_info[1], BlockingIOError)):
            return False  # the sentence says it all; a client that is too slow is no error
        text = record.getMessage()
        if text.startswith("Invalid request from"):
            record.msg, record.args = text.partition(": ")[0] + " was refused.", ()
        elif text.startswith("Error handling request"):
            record.msg, record.args = "A request failed in the server.", ()
        return True


class _Log(Logger):
    """gunicorn's own messages, through the root logger; requests are the application's to log."""

    def setup(self, cfg: Any) -> None:
        """Leave handlers and formats to the root logger."""
        super().setup(cfg)
        for handler in list(self.error_log.handlers):
            self.error_log.removeHandler(handler)
        self.error_log.propagate = True
        self.error_log.setLevel(logging.INFO if log.isEnabledFor(logging.DEBUG) else logging.WARNING)


class _Gunicorn(BaseApplication):
    """One gunicorn on one listener; ``link`` connects it with the process of the other."""

    def __init__(
        self,
        listener: Listener,
        settings: Settings,
        app: WsgiApp,
        start: _Start,
        bound: list[socket.socket],
        link: socket.socket,
        tls: ServerTls | None = None,
    ) -> None:
        self._listener = listener
        self._settings = settings
        self._app = app
        self._start = start
        self._bound = bound
        self._link = link
        self._tls = tls
        self._worker: Any = None
        workers = settings.workers
        self._sharing = Sharing([socket.socketpair() for _ in range(workers)]) if workers > 1 else None
        self._lingering = Lingering()
        self._under_way = threading.local()  # the request that a thread of gunicorn's works on
        super().__init__()

    def load_config(self) -> None:
        """Set everything that gunicorn would else take from its environment, or that trusts a header of a client."""
        options: dict[str, Any] = {
            "bind": [f"fd://{bound.detach()}" for bound in self._bound],
            "worker_class": Worker,
            "preload_app": True,
            "workers": self._settings.workers,
            "threads": self._settings.threads,
            "worker_connections": self._settings.max_connections,
            "timeout": WORKER_TIMEOUT,
            "graceful_timeout": GRACEFUL_TIMEOUT,
            "keepalive": KEEPALIVE,
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
            "when_ready": self._when_ready,
            "pre_fork": self._pre_fork,
            "post_fork": self._post_fork,
            "pre_request": self._pre_request,
            "post_request": self._post_request,
            "post_worker_init": self._post_worker_init,
            "worker_exit": self._worker_exit,
            "child_exit": self._child_exit,
        }
        if (tls := self._tls) is not None:
            options |= {"certfile": str(tls.certificate), "keyfile": str(tls.key)}
            options["ssl_context"] = lambda _config, _default: tls.context()  # called for each connection
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> WsgiApp:
        """Return the application for gunicorn to call."""
        return self._call

    def run_to_end(self) -> int:
        """Run until stopped; return the exit status."""
        try:
            self.run()
        except SystemExit as stopped:
            return _status(stopped)
        return 0

    def run_beside(self, child: int) -> int:
        """Run until stopped, then wait for the process of the other listener; return the exit status."""
        try:
            return self.run_to_end()
        finally:
            self._link.close()
            with contextlib.suppress(ChildProcessError):  # gunicorn waits for all children of its process
                os.waitpid(child, 0)

    def run_and_exit(self, *others: socket.socket) -> NoReturn:
        """Run in a process of its own, which ends here, without the sockets of the ``others``."""
        _close(others)
        os.environ.pop("NOTIFY_SOCKET", None)  # systemd listens to the main process only
        status = 1
        try:
            status = self.run_to_end()
        except Exception:
            log.exception("The server of PORTAL_PKI_BIND failed.")
        finally:
            _exit(status)

    def _call(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["portal.listener"] = self._listener
        environ["wsgi.input"] = body = RequestBody(environ, lambda: bool(self._worker.alive))
        of_gunicorn, client = self._under_way.request, environ["gunicorn.socket"]
        if environ["gunicorn.socket"].family == socket.AF_UNIX:  # whose other end is the front server, and trusted
            environ["REMOTE_ADDR"] = environ.get("HTTP_X_FORWARDED_FOR", "").rpartition(",")[2].strip()
            environ["wsgi.url_scheme"] = "https"

        def begin(status: str, headers: list[tuple[str, str]], *failed: Any) -> Any:
            # gunicorn would wait for the rest of a body in this thread. One that is still read has no length yet.
            has_no_body = status[:3] in ("204", "304")
            length = next((value for name, value in headers if name.lower() == "content-length"), None)
            if (has_no_body or length is not None) and not body.discard():
                of_gunicorn.force_close()
            has_no_body |= length in (None, "0") or environ["REQUEST_METHOD"] == "HEAD"
            if isinstance(client, ClientSocket) and not has_no_body:
                client.hold_head()
            return start_response(status, headers, *failed)

        return self._app(environ, begin)

    # --- gunicorn's hooks, in the order in which they are called

    def _when_ready(self, server: Any) -> None:
        """In the master, which listens: give signals their meaning, and watch the process of the other listener."""
        logging.getLogger("gunicorn.error").addFilter(self._start.shows)
        stop: Any = signal.getsignal(signal.SIGTERM)  # gunicorn's

        def end(number: int, frame: Any) -> None:
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            with contextlib.suppress(OSError):
                self._link.shutdown(socket.SHUT_RDWR)  # tells the other one
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, at_once)
            stop(signal.SIGTERM, frame)

        def end_with_other(_number: int, frame: Any) -> None:
            if self._listener == "main" and server.LISTENERS and not self._start.has_failed:
                self._start.fail("The server of PORTAL_PKI_BIND has ended; the log says why.")
            stop(signal.SIGTERM, frame)

        if self._listener == "main":
            at_once = signal.getsignal(signal.SIGINT)  # for a second Ctrl-C
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, end)
        else:
            for number in (signal.SIGINT, signal.SIGHUP):  # the main one gets it, too
                signal.signal(number, signal.SIG_IGN)
        # A second master could not have the listeners, and each of these belongs to one of PORTAL_WORKERS.
        for number in (signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGIO, end_with_other)
        # The kernel sends SIGIO when all other ends are closed: fcntl(2), F_SETOWN and O_ASYNC.
        fcntl.fcntl(self._link, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._link, fcntl.F_SETFL, fcntl.fcntl(self._link, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([self._link], [], [], 0)[0]:  # closed already
            os.kill(os.getpid(), signal.SIGIO)

    def _pre_fork(self, server: Any, worker: Any) -> None:
        """In the master: give a new worker a number, and one of the TCP listeners for itself, that no other worker has.

        Workers that accept from one socket share badly, since the one woken first takes all that waits. The master
        keeps the listener open, so that what waits there for a worker that ended is answered by the next one.
        """
        taken = {other.number for other in server.WORKERS.values()}
        worker.number = next(number for number in range(self._settings.workers) if number not in taken)
        if (count := len(self._bound)) > 1:
            own = server.LISTENERS[worker.number]
            worker.sockets = [own, *server.LISTENERS[count:]]  # the rest is what systemd has passed

    def _post_fork(self, server: Any, worker: Any) -> None:
        """In a new worker: keep no other's listener, and nothing that tells the other process that the master lives."""
        _close(listener for listener in server.LISTENERS if listener not in worker.sockets)
        self._link.close()

    def _post_worker_init(self, worker: Any) -> None:
        """In a worker about to serve: leave Ctrl-C and a closed terminal to the master, prepare the application."""
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._worker = worker
        own = worker.sockets[0] if len(self._bound) > 1 else None
        self._start.work(self._app, self._listener, own)
        processors.keep_to_one(worker.number, self._settings.workers)  # the threads for requests, which start at need
        for listener in worker.sockets:
            listen_again(listener)  # as it does already, unless the worker before was told to end, or could not start
        if self._sharing is not None:
            worker.share(self._sharing, self._settings.workers)

    def _pre_request(self, _worker: Any, request: Any) -> None:
        """In a thread that is about to answer a request."""
        self._under_way.request = request

    def _post_request(self, _worker: Any, _request: Any, environ: dict[str, Any], response: Any) -> None:
        """In a thread that has answered one: do not have gunicorn wait for the client of a connection that it closes.

        It would in the thread that all requests come through. Connections with TLS see to it themselves.
        """
        client = environ.get("gunicorn.socket")
        if isinstance(client, ClientSocket):
            with contextlib.suppress(OSError):  # it has gone away
                client.send_head()
        if response is not None and response.should_close() and type(client) is socket.socket:
            self._lingering.take_over(client)

    def _worker_exit(self, _server: Any, _worker: Any) -> None:
        """In a worker that ends: let nothing of the master's stack run in it."""
        stopped = sys.exc_info()[1]
        _exit(_status(stopped) if isinstance(stopped, SystemExit) else 1)

    def _child_exit(self, _server: Any, worker: Any) -> None:
        """In the master: have nothing given to a worker that has ended, until the next one is ready."""
        if self._sharing is not None:
            self._sharing.close(worker.number)


def _close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()


def _status(stopped: SystemExit) -> int:
    return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)


def _exit(status: int) -> NoReturn:
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
