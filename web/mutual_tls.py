"""A listener of its own for clients that show certificates: mutual TLS, and a thread for each connection.

It runs in one worker process of a node, so that its connections take no thread of those that answer requests. Who has
not shown a certificate that counts has few connections at a time, each address fewer, and they are ended soon.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import re
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

from config import Settings
from core.errors import BodyTooLarge, PortalError, RequestMalformed
from core.files import FileLock
from core.setting_values import Address
from web.listeners import CIPHERS, listen
from web.slow_clients import network_of

log = logging.getLogger("portal.serving")

MAX_CONNECTIONS = 1000
MAX_UNKNOWN, MAX_UNKNOWN_OF_ADDRESS = 256, 16  # connections that have not shown a certificate that counts
MAX_UNKNOWN_OF_TRUSTED = 256
BLOCK = 64 << 10
AGAIN_SECONDS, FULL_SECONDS = 2.0, 0.2
LOOK_SECONDS = 0.5  # between two looks whether to stop, and which connections take too long
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN}  # what the system has no more of


def run_in_one_process(lock: Path, serve: Callable[[threading.Event], None], stopping: threading.Event) -> None:
    """Call ``serve`` until ``stopping`` is set, in one process among all that use the lock; the body of a thread."""
    while not stopping.is_set():
        try:
            with FileLock(lock).try_hold() as mine:
                if mine:
                    serve(stopping)
        except (PortalError, OSError) as error:
            log.error("a listener cannot serve", extra={"lock": lock.name, "problem": str(error)})
        stopping.wait(AGAIN_SECONDS)


class MutualTlsListener(ABC):
    """Accepts connections, and ends those that take too long.

    Its certificate and key are the files ``name``.pem and ``name``.key of ``PORTAL_DATA_DIR/tls``.
    """

    name: ClassVar[str]
    variable: ClassVar[str]  # the setting of its address
    # For so long an address from which a certificate was shown that counts has more connections that show none yet, and
    # others cannot take those.
    trusts_addresses_for: ClassVar[float] = 0.0
    max_of_client: ClassVar[int] = MAX_CONNECTIONS  # connections by one certificate: the oldest ends for a newer one

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.listening, self.stopping = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # until when each may take
        # Connections that have not shown a certificate that counts, the oldest first, with their addresses.
        self._unknown: dict[socket.socket, str] = {}
        self._trusted: dict[str, float] = {}  # addresses, each until when
        self._under_way: Counter[Hashable] = Counter()
        self._of_client: dict[bytes, list[socket.socket]] = {}  # by certificates that count, the oldest first
        self._context: tuple[object, ssl.SSLContext] | None = None

    @property
    @abstractmethod
    def address(self) -> Address | None:
        """Where it listens; nowhere if ``None``."""

    @property
    @abstractmethod
    def client_cas(self) -> str:
        """The CAs that clients' certificates are verified by, PEM."""

    @abstractmethod
    def check(self, certificate: bytes) -> None:
        """Raise a ``PortalError`` if a client's certificate (DER), which TLS has verified, does not count here."""

    @abstractmethod
    def converse(self, client: ssl.SSLSocket) -> None:
        """Answer the requests of a connection until it ends, also those of a client whose certificate does not count.

        So a client learns in a sentence that its certificate does not.
        """

    def serve(self, stopping: threading.Event) -> None:
        """Serve until ``stopping`` is set; raise ``StartupError`` if the address cannot be bound."""
        address = self.address
        if address is None:
            return
        [listener] = listen(address, self.variable, self.settings.request_timeout, 1)
        log.info("serving", extra={"listener": self.name, "address": str(address)})
        with listener:
            listener.settimeout(LOOK_SECONDS)
            self.listening.set()
            while not stopping.is_set():
                try:
                    client, _ = listener.accept()
                    self._accept(client)
                except OSError as error:  # also of a client that has gone already; those that are served stay
                    if error.errno in _FULL:
                        log.error("a connection was not accepted", extra={"listener": self.name, "problem": str(error)})
                        stopping.wait(FULL_SECONDS)
                self._end_late()
        self.stopping.set()
        with self._lock:
            for client in self._open:
                _end(client)

    def _accept(self, client: socket.socket) -> None:
        address = network_of(client)
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS or not self._may_come(address):
                client.close()
                return
            self._open[client] = time.monotonic() + self.settings.request_timeout
            self._unknown[client] = address
        try:
            threading.Thread(target=self._take, args=(client, address), name=self.name, daemon=True).start()
        except RuntimeError as error:  # as many threads as the system lets the portal have
            with self._lock:
                del self._open[client]
                self._unknown.pop(client, None)
            client.close()
            raise OSError(errno.EAGAIN, "no thread can be started") from error

    def _may_come(self, address: str) -> bool:
        """Tell whether another connection may come from an address; the oldest of those of others may end for it.

        So whoever holds all that there are from many addresses keeps nobody out who has a handshake to do.
        """
        count = sum(other == address for other in self._unknown.values())
        if self._trusted.get(address, 0.0) > time.monotonic():
            return count < MAX_UNKNOWN_OF_TRUSTED
        if count >= MAX_UNKNOWN_OF_ADDRESS:
            return False
        others = [client for client, other in self._unknown.items() if other not in self._trusted]
        if len(others) >= MAX_UNKNOWN:
            del self._unknown[others[0]]
            _end(others[0])
        return True

    def _trust(self, address: str) -> None:
        now = time.monotonic()
        with self._lock:
            for other in [other for other, until in self._trusted.items() if until < now]:
                del self._trusted[other]
            self._trusted[address] = now + self.trusts_addresses_for

    def _end_late(self) -> None:
        """End the connections whose time is over: their threads notice."""
        now = time.monotonic()
        with self._lock:
            for client in [client for client, until in self._open.items() if until < now]:
                _end(client)

    @contextlib.contextmanager
    def counted(self, whose: Hashable, most: int) -> Iterator[bool]:
        """Count the body as one of a client's, and yield whether it may be done: ``most`` at a time."""
        with self._lock:
            may_be_done = self._under_way[whose] < most
            self._under_way[whose] += may_be_done
        try:
            yield may_be_done
        finally:
            with self._lock:
                self._under_way[whose] -= may_be_done
                if not self._under_way[whose]:
                    del self._under_way[whose]

    def extend(self, client: socket.socket, seconds: float) -> None:
        """Give a connection time."""
        with self._lock:
            if client in self._open:
                self._open[client] = time.monotonic() + seconds

    def _take(self, client: socket.socket, address: str) -> None:
        try:
            client.settimeout(self.settings.request_timeout)
            secure = self._tls().wrap_socket(client, server_side=True, do_handshake_on_connect=False)
            with self._lock:
                self._open[secure] = self._open.pop(client)
                if client in self._unknown:
                    self._unknown[secure] = self._unknown.pop(client)
            client = secure
            secure.do_handshake()
            # Each device has a certificate of this CA, so that TLS alone does not tell clients from others.
            with contextlib.suppress(PortalError):  # the first request is answered with it
                certificate = secure.getpeercert(binary_form=True) or b""
                self.check(certificate)
                self._known(secure)
                self._trust(address)
                self._count(secure, certificate)
            self.converse(secure)
        except OSError as error:  # of TLS, too
            log.debug("a connection has ended", extra={"listener": self.name, "problem": str(error)})
        except Exception:
            log.exception("a connection has failed", extra={"listener": self.name})
        finally:
            self._known(client)
            with self._lock:
                self._open.pop(client, None)
                self._discount(client)
            client.close()

    def _count(self, client: socket.socket, certificate: bytes) -> None:
        """Count a connection of a client that counts; its oldest one ends if there are too many, as of a lost link."""
        with self._lock:
            its = self._of_client.setdefault(hashlib.sha256(certificate).digest(), [])
            its.append(client)
            if len(its) > self.max_of_client:
                _end(its.pop(0))

    def _discount(self, client: socket.socket) -> None:
        for key, its in [*self._of_client.items()]:
            if client in its:
                its.remove(client)
            if not its:
                del self._of_client[key]

    def _known(self, client: socket.socket) -> None:
        """Count a connection no longer as one without a certificate that counts."""
        with self._lock:
            self._unknown.pop(client, None)

    def _tls(self) -> ssl.SSLContext:
        """Return the TLS context, made anew if a certificate of the portal's has changed."""
        folder, cas = self.settings.tls_dir, self.client_cas
        certificate, key = folder / f"{self.name}.pem", folder / f"{self.name}.key"
        seen = (cas, certificate.stat().st_mtime_ns, key.stat().st_mtime_ns)
        with self._lock:
            if self._context is None or self._context[0] != seen:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                context.set_ciphers(CIPHERS)
                context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
                context.num_tickets = 0  # each connection shows its certificate
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(cadata=cas)
                context.load_cert_chain(certificate, key)
                self._context = (seen, context)
            return self._context[1]


def _end(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not the method of a TLS socket, which takes from its thread what that may be using.
        socket.socket.shutdown(client, socket.SHUT_RDWR)


class Conversation(BaseHTTPRequestHandler):
    """Answers the requests of one connection, with limits on what a request has."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "portal", ""
    max_body: ClassVar[int]

    def __init__(self, client: ssl.SSLSocket, listener: MutualTlsListener) -> None:
        self._client = client
        self._of = listener
        super().__init__(client, client.getpeername(), None)  # type: ignore[arg-type]

    def setup(self) -> None:
        """Give the client time for its first request."""
        super().setup()
        self.extend(self._of.settings.request_timeout)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Log nothing: what counts is logged where it is decided."""

    def do_GET(self) -> None:
        """Answer a request."""
        self.answer()

    def do_POST(self) -> None:
        """Answer a request with a body."""
        self.answer()

    def answer(self) -> None:
        """Answer the request that was read, of which the body was not."""
        raise NotImplementedError

    def extend(self, seconds: float) -> None:
        """Give the connection time; end it after this request if the portal is being stopped."""
        self._of.extend(self._client, seconds)
        self._client.settimeout(seconds)  # else that of the handshake ends a connection that is kept
        if self._of.stopping.is_set():
            self.close_connection = True

    @property
    def certificate(self) -> bytes:
        """The certificate that the client has shown, DER."""
        return self._client.getpeercert(binary_form=True) or b""

    def read_body(self) -> bytes:
        """Return the body; raise ``RequestMalformed`` or ``BodyTooLarge``, after which the connection must end."""
        length = self.length_of_body()
        body = self.rfile.read(length)
        if len(body) != length:
            raise ConnectionResetError("the body was cut")
        return body

    def skip_body(self, length: int) -> None:
        """Read a body of this length without keeping it."""
        while length > 0:
            part = self.rfile.read(min(length, BLOCK))
            if not part:
                raise ConnectionResetError("the body was cut")
            length -= len(part)

    def length_of_body(self) -> int:
        """Return the length that the request states; raise as ``read_body`` does."""
        lengths = self.headers.get_all("Content-Length", ["0"] if self.command == "GET" else [])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not re.fullmatch("[0-9]{1,9}", lengths[0]):
            raise RequestMalformed("A request at this address states the length of its body, once.")
        length = int(lengths[0])
        if length > self.max_body:
            raise BodyTooLarge(f"A request at this address has at most {self.max_body} bytes.")
        return length

    def send(self, status: int, content: bytes, media_type: str, **headers: str) -> None:
        """Send an answer."""
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.write(content)

    def write(self, content: bytes | memoryview) -> None:
        """Send bytes in blocks, each of which may take until the time-out of the connection."""
        view = memoryview(content)
        for start in range(0, len(content), BLOCK):
            self.wfile.write(view[start : start + BLOCK])
