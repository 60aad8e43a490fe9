"""What slow clients may take: threads while requests arrive, and file descriptors while connections end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LINGER_SECONDS = 2.0  # for so long a client may take to read the answer and close
LINGER_BYTES = 65536  # that it may send meanwhile
MAX_LINGERING = 128
_LOOK_SECONDS = 0.5


class SlowClients:
    """Counts the threads of a process that wait for slow clients; the others are for those that are not slow.

    A client gets one of the first half of all threads. The next quarter is for clients at addresses that have none.
    """

    def __init__(self, threads: int) -> None:
        self._for_any = max(1, threads // 2)
        self._for_all = max(1, threads * 3 // 4)
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    @contextmanager
    def waiting(self, client: socket.socket) -> Iterator[bool]:
        """Wait for a client in the body of the ``with`` if this yields true: else it has to be cut off."""
        address = network_of(client)
        with self._lock:
            total = self._held.total()
            if may_wait := total < self._for_any or (total < self._for_all and not self._held[address]):
                self._held[address] += 1
        try:
            yield may_wait
        finally:
            if may_wait:
                with self._lock:
                    self._held[address] -= 1
                    if not self._held[address]:
                        del self._held[address]


def network_of(client: socket.socket) -> str:
    """Return the address of a client, of IPv6 the network of 64 bits, in which a host chooses its own."""
    try:
        host = client.getpeername()[0]
        address = ipaddress.ip_address(host.partition("%")[0])
    except (OSError, ValueError, IndexError):
        return ""  # it is gone
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


@dataclass(slots=True)
class _Ending:
    until: float
    bytes_left: int = LINGER_BYTES


class Lingering:
    """Keeps connections whose answer was sent until the client has closed, as RFC 9112 section 9.6 asks for.

    Else the kernel tells a client that still sends to forget what it has not read. One thread waits for all of them,
    and ends when there are none. Of more than ``MAX_LINGERING`` the others are closed at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._endings: dict[socket.socket, _Ending] = {}
        self._selector: selectors.BaseSelector | None = None

    def take(self, client: socket.socket) -> None:
        """Wait for the client of a connection that this process may close itself; one for writing no longer."""
        with contextlib.suppress(OSError):
            own = socket.socket(fileno=os.dup(client.fileno()))
            with self._lock:
                if len(self._endings) >= MAX_LINGERING:
                    own.close()
                    return
                own.setblocking(False)
                if self._selector is None:
                    self._selector = selectors.DefaultSelector()
                    threading.Thread(target=self._run, args=(self._selector,), daemon=True, name="lingering").start()
                self._selector.register(own, selectors.EVENT_READ)
                self._endings[own] = _Ending(time.monotonic() + LINGER_SECONDS)

    def take_over(self, client: socket.socket) -> None:
        """End a connection and wait for the client, while ``client`` becomes one of which the other end has closed."""
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)
            self.take(client)
            ours, theirs = socket.socketpair()
            with ours, theirs:
                os.dup2(ours.fileno(), client.fileno(), inheritable=False)

    def _run(self, selector: selectors.BaseSelector) -> None:
        while True:
            ready = {key.fileobj for key, _ in selector.select(_LOOK_SECONDS)}
            with self._lock:
                for client, ending in list(self._endings.items()):
                    if (client in ready and not _goes_on(client, ending)) or time.monotonic() >= ending.until:
                        selector.unregister(client)
                        del self._endings[client]
                        client.close()
                if not self._endings:
                    selector.close()
                    self._selector = None
                    return


def _goes_on(client: socket.socket, ending: _Ending) -> bool:
    """Discard what a client has sent; return whether it may send more."""
    try:
        received = len(client.recv(4096))
    except BlockingIOError:
        return True
    except OSError:
        return False
    ending.bytes_left -= received
    return received > 0 and ending.bytes_left > 0
