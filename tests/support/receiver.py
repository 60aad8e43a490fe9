"""A receiver of events for tests: a real server that answers well, badly, or not at all."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"


def answer(status: int, *headers: str) -> bytes:
    """An answer with an empty body."""
    lines = (f"HTTP/1.1 {status} So", "Content-Length: 0", "Connection: close", *headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@dataclass(frozen=True)
class Received:
    """One request: header names in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """``behave`` is what it answers, or a function that gets the connection: after a whole request, if it ``reads``."""

    port: int
    scheme: str
    behave: bytes | Callable[[Any], None] = OK
    reads: bool = True
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.port}/events?from=portal"

    def serve(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            connection.settimeout(10)
            if context is not None:
                connection = stack.enter_context(context.wrap_socket(connection, server_side=True))
            if self.reads:
                self.requests.append(_read(connection))
            if callable(self.behave):
                self.behave(connection)
            else:
                connection.sendall(self.behave)


def _read(connection: socket.socket) -> Received:
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(4096) or b"\r\n\r\n"
    head, _, body = received.partition(b"\r\n\r\n")
    line, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (text.partition(": ") for text in rest)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(4096)
    return Received(line, headers, body)


@contextmanager
def receiving(credentials: tuple[Path, Path] | None = None) -> Iterator[Receiver]:
    """A receiver on localhost, with TLS where it has a certificate and a key."""
    context = None
    if credentials is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*credentials)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = Receiver(listener.getsockname()[1], "http" if context is None else "https")

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                receiver.connections += 1
                threading.Thread(target=receiver.serve, args=(connection, context), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield receiver
        receiver.stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
