"""What the server listens with: its sockets, its TLS context."""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import socket
import ssl
import time
from pathlib import Path

from config import Address
from errors import StartupError

BACKLOG = 1024
CONTEXT_LIFE = 86400.0  # seconds after which the keys of the session tickets are replaced
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; those of TLS 1.3 are all good

log = logging.getLogger("portal.serving")

# --- Listeners ----------------------------------------------------------------------------------------------------


def listen(address: Address, variable: str) -> socket.socket:
    """A socket that listens on ``address``; raises ``StartupError``, which names the setting ``variable``."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError:
        raise StartupError(f"The host name {address.host} cannot be resolved; set {variable}.") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by the connections
        listener.bind(target)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StartupError(_why_not(error, address, variable)) from None
    listener.setblocking(False)
    return listener


def _why_not(error: OSError, address: Address, variable: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {address.port} on {address.host} is in use; stop what uses it or set {variable}."
    if error.errno in (errno.EACCES, errno.EPERM):
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


class ServerTls:
    """The TLS context of the main listener, made anew when the certificate on disk changes."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._paths = (certificate, key)
        self._seen = self._signature()
        self._checked = self._made = time.monotonic()
        try:
            self.context = self._make()
        except OSError as error:
            raise StartupError(f"The server certificate {certificate} or its key cannot be used: {error}.") from None

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # client certificates, once wanted: context.verify_mode
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.num_tickets = 1
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(*self._paths)
        return context

    def _signature(self) -> list[tuple[int, int, int]]:
        signature = []
        for path in self._paths:
            with contextlib.suppress(OSError):
                status = path.stat()
                signature.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return signature

    def refresh(self) -> None:
        """Look at the files, at most once a second; while they do not fit each other the old context stays."""
        now = time.monotonic()
        if now - self._checked < 1:
            return
        self._checked = now
        seen = self._signature()
        if seen == self._seen and now - self._made < CONTEXT_LIFE:
            return
        try:
            self.context = self._make()
        except OSError as error:
            log.warning("The server certificate on disk cannot be used, the one before stays: %s", error)
        else:
            self._made = now
            log.info("The server certificate was read again.")
        self._seen = seen
