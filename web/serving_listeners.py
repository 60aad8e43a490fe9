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
from core.errors import StartupError

BACKLOG = 1024
CONTEXT_LIFE = 86400.0  # seconds after which the keys of the session tickets are replaced
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; those of TLS 1.3 are all good
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL: the application tells a client with an expired certificate so in a sentence.
NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
CLIENT_CHECKS = ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST | ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME

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
    """The TLS context of the main listener, made anew when the certificate on disk changes, or the file of client CAs.

    Where ``client_cas`` (PEM) is there and not empty, clients are asked for a certificate and need not have one. One
    that none of these CAs has issued ends the handshake; all else about a certificate is for the application to judge.
    """

    def __init__(self, certificate: Path, key: Path, client_cas: Path | None = None) -> None:
        self._certificate = (certificate, key)
        self._client_cas = client_cas
        self._seen = self._signature()
        self._checked = self._made = time.monotonic()
        try:
            self.context = self._make()
        except OSError as error:
            raise StartupError(f"The server certificate {certificate} or its key cannot be used: {error}.") from None

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.num_tickets = 1
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(*self._certificate)
        if self._client_cas is not None and self._client_cas.exists() and self._client_cas.stat().st_size:
            context.verify_mode = ssl.CERT_OPTIONAL
            context.verify_flags = CLIENT_CHECKS
            context.load_verify_locations(self._client_cas)
        return context

    def _signature(self) -> list[tuple[int, int, int]]:
        signature = []
        for path in (*self._certificate, *((self._client_cas,) if self._client_cas else ())):
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
            log.warning("The TLS files on disk cannot be used, those before stay: %s", error)
        else:
            self._made = now
            log.info("The TLS files were read again.")
        self._seen = seen
