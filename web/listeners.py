"""What the server is reached by: sockets, TLS context, connections and request bodies with their time limits."""

from __future__ import annotations

import array
import contextlib
import errno
import functools
import logging
import os
import resource
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from core.errors import BodyTooSlow, PortalError, PortalStopping, RequestMalformed, StartupError
from core.files import LOOK_SECONDS
from core.setting_values import Address
from web.slow_clients import Lingering, SlowClients

BACKLOG = 1024
KILLED_PORTAL_SECONDS = 5.0
READ_AHEAD = 1024  # bytes that gunicorn waits for where an application reads less
LOOK_UP = 0.5  # seconds between looks whether the server still runs, where an upload is waited for
QUICK = 0.25  # seconds from its beginning in which a handshake or a request arrives from a client that is not slow
DISCARD_SECONDS, MAX_DISCARDED = 0.1, 65536  # of a body that is not wanted, so that the connection can be kept
PLAIN_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 33\r\n\r\nThis port speaks HTTPS, not HTTP."
)
CONTEXT_LIFE = 86400.0  # seconds after which the keys of the session tickets are replaced
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; those of TLS 1.3 are all good
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL: the application tells a client with an expired certificate so in a sentence.
NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
CLIENT_CHECKS = ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST | ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME

# Of socket(7), without a name in Python; the filter is a program of instructions of 8 bytes each (linux/filter.h).
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
_NO_SYN = array.array(
    "B",
    struct.pack("HBBI", 0x30, 0, 0, 13)  # load the byte of the TCP header that has the flags
    + struct.pack("HBBI", 0x54, 0, 0, 0x12)  # of them SYN and ACK
    + struct.pack("HBBI", 0x15, 0, 1, 0x02)  # if that is SYN alone
    + struct.pack("HBBI", 0x06, 0, 0, 0)  # drop the packet
    + struct.pack("HBBI", 0x06, 0, 0, 0xFFFF),  # else pass it on
)
JOINED_BYTES = 1 << 14  # of a body that is sent with its head: a longer one is several records of TLS in any case
HANDSHAKE_SECONDS = 0.2  # in which a TCP handshake that has begun is over, unless the client is far away

_END = b"-----END CERTIFICATE-----"

log = logging.getLogger("portal.serving")
_T = TypeVar("_T")

# --- Listeners ----------------------------------------------------------------------------------------------------


def listen(address: Address, variable: str, timeout: float, workers: int) -> list[socket.socket]:
    """Return sockets that listen on ``address``: one for each of the ``workers`` for TCP, one in all for a Unix socket.

    The kernel shares the connections out among the sockets of a port, by a hash of the addresses (SO_REUSEPORT in
    socket(7)), which ``sharing`` evens out. A plain connection ends a read or a write that takes longer than
    ``timeout`` seconds. Raises ``StartupError``, which names the setting ``variable``.
    """
    try:
        family, kind, target = _resolved(address)
    except OSError:
        raise StartupError(f"The host name {address.host} cannot be resolved; set {variable}.") from None
    with contextlib.ExitStack() as opened:
        try:
            first = opened.enter_context(_made(family, kind, timeout))
            if address.is_unix:
                _remove_stale(address.host)
            _bind(first, target)
            if address.is_unix:  # a process that may connect may say which certificate a client has shown
                os.chmod(address.host, 0o660)
            first.listen(BACKLOG)
            listeners = [first]
            if not address.is_unix and workers > 1:
                # Not before it listens: so it fails where another server has the port, were it one with this option.
                first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                for _ in range(workers - 1):
                    listener = opened.enter_context(_made(family, kind, timeout))
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    listener.bind(first.getsockname())
                    listener.listen(BACKLOG)
                    listeners.append(listener)
        except OSError as error:
            raise StartupError(_why_not(error, address, variable)) from None
        opened.pop_all()
    return listeners


def stop_listening(listeners: Sequence[socket.socket], accept: Callable[[socket.socket], object]) -> None:
    """Accept what has begun to connect, and close; whoever comes later is refused, by this machine's kernel.

    A connection that is closed before it was accepted is lost to a load balancer, which takes one that is refused to
    another node. So the packets that begin one are dropped first, by a filter in the kernel, and handshakes under way
    have ``HANDSHAKE_SECONDS``. ``accept`` takes one connection of a listener that has one, and must not block.
    """
    for listener in listeners:
        if listener.family != socket.AF_UNIX:
            program = struct.pack("HP", len(_NO_SYN) // 8, _NO_SYN.buffer_info()[0])
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    waits: Sequence[socket.socket] = ()
    with contextlib.suppress(OSError):  # as without a file descriptor left
        while waits or time.monotonic() < deadline:
            waits, _, _ = select.select(listeners, [], [], max(0.0, deadline - time.monotonic()))
            for listener in waits:
                accept(listener)
    for listener in listeners:
        listener.close()


def listen_again(listener: socket.socket) -> None:
    """Undo what ``stop_listening`` has done to a socket that another process goes on with."""
    with contextlib.suppress(OSError):  # it has no filter
        listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    listener.listen(BACKLOG)


def _made(family: socket.AddressFamily, kind: socket.SocketKind, timeout: float) -> socket.socket:
    """Return a socket with the options that its connections inherit, see socket(7) and tcp(7)."""
    made = socket.socket(family, kind)
    if family != socket.AF_UNIX:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        made.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(timeout), int(timeout % 1 * 1e6)))
    return made


def _bind(listener: socket.socket, target: Any) -> None:
    """Bind; wait for the workers of a portal that was killed a moment ago, which hold its ports until they notice."""
    deadline = time.monotonic() + KILLED_PORTAL_SECONDS
    while True:
        try:
            return listener.bind(target)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _resolved(address: Address) -> tuple[socket.AddressFamily, socket.SocketKind, Any]:
    if address.is_unix:
        return socket.AF_UNIX, socket.SOCK_STREAM, address.host
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, _, _, target = found[0]
    return family, kind, target


def _remove_stale(path: str) -> None:
    """Remove the Unix socket of a server that is gone; raises ``OSError`` where one answers."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _why_not(error: OSError, address: Address, variable: str) -> str:
    if error.errno == errno.EADDRINUSE and address.is_unix:
        return f"Another server answers at {address}; stop it or set {variable}."
    if error.errno == errno.EADDRINUSE:
        return f"Port {address.port} on {address.host} is in use; stop what uses it or set {variable}."
    if error.errno in (errno.EACCES, errno.EPERM) and not address.is_unix:
        return f"Port {address.port} may not be opened by this user; set {variable} to a port from 1024 on."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address.host} is not an address of this machine; set {variable}."
    return f"The portal cannot listen on {address} ({error.strerror}); set {variable}."


def allow_open_files(wanted: int) -> None:
    """Let this process and its children open ``wanted`` files each; raises ``StartupError``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise StartupError(
            f"This machine allows a process {hard} open files, too few for PORTAL_MAX_CONNECTIONS; raise the limit"
            " or set PORTAL_MAX_CONNECTIONS lower."
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- TLS ----------------------------------------------------------------------------------------------------------


class ClientTooSlow(ConnectionResetError):
    """The client did not send its request in time."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNRESET, "the client is too slow")


class ClientSocket(ssl.SSLSocket):
    """A TLS connection on which a handshake, and then each request, must arrive within ``patience`` seconds.

    If one takes longer than ``QUICK``, it is for ``slow_clients`` to say whether a thread may wait for it. When the
    server ends the connection, it is for ``lingering`` to wait for the client.
    """

    patience = 15.0
    started = 0.0  # on the monotonic clock
    deadline = 0.0
    wanted: Callable[[], bool] | None = None  # says whether the server still runs, where that is to be looked at
    slow_clients: SlowClients
    lingering: Lingering
    has_ended = False
    _holds_head = False
    _head = b""

    def hold_head(self) -> None:
        """Send what comes next, the head of an answer, together with what follows it.

        gunicorn sends the two one after the other: each is encrypted by itself, and wakes the client.
        """
        self._holds_head = True

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all, or keep it until there is more."""
        if self._holds_head:
            self._holds_head, self._head = False, bytes(data)
            return
        if self._head:
            head, self._head = self._head, b""
            if len(data) > JOINED_BYTES:
                super().sendall(head, flags)
            else:
                data = head + data
        super().sendall(data, flags)

    def send_head(self) -> None:
        """Send what is kept, as of an answer that has no body after all."""
        self._holds_head = False
        if self._head:
            self.sendall(b"")

    def setblocking(self, flag: bool) -> None:
        """Begin to count the time of a request: gunicorn calls this before it reads one."""
        self.wanted = None  # of an upload on this connection before
        self.extend()
        self.settimeout(self.patience if flag else 0.0)

    def extend(self) -> None:
        """Give the client ``patience`` seconds from now on."""
        self.started = time.monotonic()
        self.deadline = self.started + self.patience

    def do_handshake(self, block: bool = False) -> None:
        """Complete the handshake; raises ``ConnectionResetError``, as for a client that is gone, where it fails."""
        self.setblocking(True)
        try:
            self._in_time(functools.partial(super().do_handshake, block))
        except (ssl.SSLError, TimeoutError) as error:
            if getattr(error, "reason", None) == "HTTP_REQUEST":
                socket.socket.send(self, PLAIN_HTTP)
            raise ConnectionResetError(errno.ECONNRESET, "the TLS handshake failed") from None

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Receive; raises ``ClientTooSlow``, and ``PortalStopping`` where ``wanted`` says that the server stops."""
        if self.has_ended:
            return b""
        if self.gettimeout() != self.patience:  # gunicorn has set a time of its own
            return super().recv(buflen, flags)
        return self._in_time(functools.partial(super().recv, buflen, flags))

    def _in_time(self, act: Callable[[], _T]) -> _T:
        """Do what waits for the client; raises ``ClientTooSlow`` and ``PortalStopping``."""
        try:
            quick = self.started + QUICK - time.monotonic()
            if self.wanted is None and quick > 0:
                self.settimeout(min(quick, self.patience))
                with contextlib.suppress(TimeoutError):
                    return act()
            if self.wanted is not None:  # an upload, of which there are not many
                return self._patiently(act)
            with self.slow_clients.waiting(self) as may_wait:
                if may_wait:
                    return self._patiently(act)
            raise ClientTooSlow
        finally:
            self.settimeout(self.patience)

    def _patiently(self, act: Callable[[], _T]) -> _T:
        while (left := self.deadline - time.monotonic()) > 0:
            if self.wanted is not None and not self.wanted():
                raise PortalStopping("The portal is being stopped; send what is not done yet again.")
            self.settimeout(min(left, LOOK_UP))
            with contextlib.suppress(TimeoutError):
                return act()
        raise ClientTooSlow

    def shutdown(self, how: int) -> None:
        """End the connection: nothing is received any more here, so that no thread of gunicorn's waits for it."""
        super().shutdown(how)
        if how == socket.SHUT_WR:
            self.has_ended = True
            self.lingering.take(self)


class ServerTls:
    """The TLS context of the main listener, made again when the certificate on disk changes, or a client CA goes.

    Where ``client_cas`` (PEM) is there and not empty, clients are asked for a certificate and need not have one. One
    that none of these CAs has issued ends the handshake; all else about a certificate is for the application to judge.
    """

    def __init__(
        self, certificate: Path, key: Path, client_cas: Path | None, timeout: float, slow_clients: SlowClients
    ) -> None:
        class Timed(ClientSocket):
            patience = timeout
            lingering = Lingering()

        Timed.slow_clients = slow_clients

        self.certificate, self.key = certificate, key
        self._client_cas = client_cas
        self._socket_class = Timed
        self._seen = self._signature()
        self._checked = self._made = time.monotonic()
        self._accepted: Set[bytes] = frozenset()  # the client CAs that the context has, PEM
        try:
            self._context = self._make()
        except OSError as error:
            raise StartupError(f"The server certificate {certificate} or its key cannot be used: {error}.") from None

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sslsocket_class = self._socket_class
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.num_tickets = 1
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.certificate, self.key)
        if self._client_cas is not None and self._client_cas.exists() and self._client_cas.stat().st_size:
            context.verify_mode = ssl.CERT_OPTIONAL
            context.verify_flags = CLIENT_CHECKS
            self._accepted = _certificates(self._client_cas)
            context.load_verify_locations(self._client_cas)
        return context

    def _add_client_cas(self) -> bool:
        """Add CAs that are new in the file to the context; return whether that is all that has changed in it.

        To read a thousand CAs of tenants again for one more takes 0.15 s.
        """
        if self._client_cas is None or self._context.verify_mode is not ssl.CERT_OPTIONAL:
            return False
        listed = _certificates(self._client_cas)
        if not listed >= self._accepted:
            return False
        if new := listed - self._accepted:
            self._context.load_verify_locations(cadata=b"".join(new).decode("ascii", "replace"))
        self._accepted = listed
        return True

    def _signature(self) -> list[tuple[int, int, int]]:
        signature = []
        for path in (self.certificate, self.key, *((self._client_cas,) if self._client_cas else ())):
            with contextlib.suppress(OSError):
                status = path.stat()
                signature.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return signature

    def context(self) -> ssl.SSLContext:
        """Look at the files, at most once a second; while they do not fit each other the old context stays."""
        now = time.monotonic()
        if now - self._checked < LOOK_SECONDS:
            return self._context
        self._checked = now
        seen = self._signature()
        if seen == self._seen and now - self._made < CONTEXT_LIFE:
            return self._context
        try:
            is_young = now - self._made < CONTEXT_LIFE
            if not (is_young and seen[:2] == self._seen[:2] and len(seen) == 3 and self._add_client_cas()):
                self._context = self._make()
                self._made = now
        except OSError as error:
            log.warning("The TLS files on disk cannot be used, those before stay: %s", error)
        else:
            log.info("The TLS files were read again.")
        self._seen = seen
        return self._context


def _certificates(path: Path) -> Set[bytes]:
    """Return each certificate of a file, PEM."""
    *blocks, _ = path.read_bytes().split(_END)
    return frozenset(block.lstrip() + _END + b"\n" for block in blocks)


# --- A request's body ---------------------------------------------------------------------------------------------


class RequestBody:
    """What WSGI calls ``wsgi.input``; gunicorn's, with errors that the application knows.

    ``wanted`` says whether the server still runs.
    """

    def __init__(self, environ: dict[str, Any], wanted: Callable[[], bool]) -> None:
        self._input = environ["wsgi.input"]
        self._socket: socket.socket = environ["gunicorn.socket"]
        self._left = int(environ["CONTENT_LENGTH"]) if "CONTENT_LENGTH" in environ else None
        self._is_read = self._left == 0 or (self._left is None and "HTTP_TRANSFER_ENCODING" not in environ)
        self._wanted = wanted

    def read(self, size: int = -1) -> bytes:
        """Read as a file does; raises ``BodyTooSlow`` and ``RequestMalformed``."""
        try:
            return self._receive(self._input.read, size)
        except ConnectionError:
            raise RequestMalformed("The connection ended before the body did.") from None

    def read_some(self, wait: float | None = None) -> bytes | None:
        """Return what has arrived of a long body, empty at the end, ``None`` where nothing comes in ``wait`` seconds.

        Raises ``BodyTooSlow``, ``RequestMalformed`` for bad framing, ``PortalStopping``, and ``ConnectionResetError``
        where the client is gone before the end.
        """
        if wait is not None and not self._arrives(wait):
            return None
        if isinstance(self._socket, ClientSocket):
            self._socket.wanted = self._wanted
            self._socket.extend()
        return self._read_held()

    def _read_held(self) -> bytes:
        parts = [self._receive(self._input.readline, 1)]
        held = self._held()[0] if parts[0] else 0
        while held:
            # Below READ_AHEAD a line at a time, since gunicorn's read would wait for more than has arrived.
            part = self._receive(self._input.read if held >= READ_AHEAD else self._input.readline, held)
            parts.append(part)
            held -= len(part)
        return b"".join(parts)

    def discard(self) -> bool:
        """Discard what is left of the body if it is there; return whether it was, so that another request can follow.

        A client that has not sent it yet is not waited for: a thread would be, which others need.
        """
        until, discarded = time.monotonic() + DISCARD_SECONDS, 0
        if isinstance(self._socket, ClientSocket):
            self._socket.deadline = min(self._socket.deadline, until)
        try:
            while not self._is_read and discarded < MAX_DISCARDED:
                if not self._arrives(max(0.0, until - time.monotonic())):
                    return False
                discarded += len(self._read_held())
        except (PortalError, OSError):
            return False
        return self._is_read

    def check(self) -> None:
        """Raise ``PortalStopping`` if the server is being stopped, so that the reader ends."""
        if not self._wanted():
            raise PortalStopping("The portal is being stopped; send what is not done yet again.")

    def _held(self) -> tuple[int, int]:
        """Return how many bytes of the body gunicorn holds already, and how many of the body with its framing.

        Both are 0 where it does not say. A reader has to know, because gunicorn waits until it has as many bytes as it
        is asked for: rows that have arrived would wait for those that have not.
        """
        reader = getattr(self._input, "reader", None)
        unreader = getattr(getattr(reader, "req", reader), "unreader", None)
        held, framed = (buffer.tell() if (buffer := getattr(of, "buf", None)) else 0 for of in (reader, unreader))
        return (held, held + framed) if self._left is None else (min(framed, self._left),) * 2

    def _arrives(self, wait: float) -> bool:
        if self._held()[1] or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
            return True
        return bool(select.select([self._socket], [], [], wait)[0])

    def _receive(self, read: Callable[[int | None], bytes], size: int) -> bytes:
        try:
            data = read(size if size >= 0 else None)
        except PortalError:
            raise
        except (ClientTooSlow, BlockingIOError) as error:
            raise BodyTooSlow("The body did not arrive in time; send what is not done yet again.") from error
        except OSError as error:
            raise ConnectionResetError(errno.ECONNRESET, "the client went away in the middle of a body") from error
        except Exception as error:  # of gunicorn's parser, which says in many classes that the framing is bad
            raise RequestMalformed("The body is not framed as RFC 9112 section 7.1 says.") from error
        if self._left is None:
            self._is_read = self._is_read or not data or size < 0
        else:
            self._left -= len(data)
            self._is_read = not self._left
            if self._left and (not data or size < 0 or (read == self._input.read and len(data) < size)):
                raise ConnectionResetError(errno.ECONNRESET, "the client went away in the middle of a body")
        return data
