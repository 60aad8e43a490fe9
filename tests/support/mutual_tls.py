"""A listener with mutual TLS that runs in a thread, and clients of it."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from pki.algorithms import PrivateKey, private_key_pem
from web.mutual_tls import MutualTlsListener

Listener = TypeVar("Listener", bound=MutualTlsListener)


@contextmanager
def serving(listener: MutualTlsListener) -> Iterator[None]:
    """Have it listen in the body of the ``with``."""
    stopping = threading.Event()
    thread = threading.Thread(target=listener.serve, args=(stopping,))
    thread.start()
    try:
        assert listener.listening.wait(10)
        yield
    finally:
        stopping.set()
        thread.join(10)
    assert not thread.is_alive()


class MutualTlsServer(Generic[Listener]):
    """A running listener, and clients of it, which trust ``portal_ca`` (PEM); ``folder`` is for their files."""

    def __init__(self, listener: Listener, portal_ca: str, folder: Path) -> None:
        address = listener.address
        assert address is not None
        self.listener, self.folder = listener, folder
        self.address = address.host, address.port
        self._portal_ca, self._number = portal_ca, 0

    def context(self, pair: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """What a client connects with that has a certificate, or none."""
        context = ssl.create_default_context(cadata=self._portal_ca)
        if pair is not None:
            context.load_cert_chain(*pair)
        return context

    def client(self, key: PrivateKey, chain: str) -> ssl.SSLContext:
        """What a client connects with that has this certificate."""
        self._number += 1
        pair = self.folder / f"pair-{self._number}.pem"
        pair.write_bytes(private_key_pem(key) + chain.encode())
        return self.context((pair, pair))

    @contextmanager
    def connected(self, context: ssl.SSLContext) -> Iterator[http.client.HTTPSConnection]:
        connection = http.client.HTTPSConnection(*self.address, timeout=30, context=context)
        try:
            yield connection
        finally:
            connection.close()

    def tls(self, context: ssl.SSLContext, source: str = "127.0.0.1") -> ssl.SSLSocket:
        """A bare connection."""
        plain = socket.create_connection(self.address, 30, (source, 0))
        return context.wrap_socket(plain, server_hostname=self.address[0])

    def refuses(self, context: ssl.SSLContext) -> bool:
        """Whether a client gets no answer at all."""
        try:
            with self.tls(context) as client:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return is_ended(client)
        except (ssl.SSLError, ConnectionError):
            return True


def is_ended(client: socket.socket) -> bool:
    """Whether the server ends a connection without an answer."""
    try:
        return client.recv(1) == b""
    except (ssl.SSLError, ConnectionError):
        return True


def is_ended_while_it_sends(client: socket.socket) -> bool:
    """Whether the server ends a connection without an answer, though a byte comes now and then: none of it is idle."""
    client.settimeout(0.05)
    for _ in range(600):
        try:
            client.sendall(b"x")
            return client.recv(1) == b""
        except TimeoutError:
            continue
        except (ssl.SSLError, ConnectionError):
            return True
    return False


def accepts(server: ssl.SSLContext, client: ssl.SSLContext) -> bool:
    """Whether a handshake of the two in memory, with ``localhost``, succeeds at both ends."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                return False
    return True
