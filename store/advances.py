"""Wakes whoever waits for the next generation when a transaction with one has been committed, in whichever process.

On SQLite all processes are on one data folder: who waits binds a datagram socket there, to which the others send. On
PostgreSQL ``store/listening.py`` hears of it from the server, and ``heard`` passes it on. What is lost only takes
longer: who waits looks by itself now and then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOCKET = ".advances"  # in the data folder
ADVANCED = "portal_advanced"  # in the info of a connection whose transaction has the next generation
SUBSCRIBED = "portal_subscribed"  # likewise, of one that has seen whether there are subscriptions to events
_MANY = 1000  # datagrams that are read at once


class Advances:
    """Tells of the next generation to one process on a data folder at a time."""

    def __init__(self, folder: Path, *, is_alone: bool) -> None:
        """Take the data folder; it ``is_alone`` if all processes that write the database are on it."""
        self._folder = folder
        self._is_alone = is_alone
        self._heard = threading.Event()

    def tell(self) -> None:
        """Wake who waits in another process or in this one, if somebody does; never waits itself."""
        if not self._is_alone:
            return  # the server tells it
        # An error says that nobody waits, or is woken already.
        with contextlib.suppress(OSError), contextlib.closing(_new_socket()) as sender, self._path() as path:
            sender.sendto(b"", path)

    def heard(self) -> None:
        """Wake who waits in this process."""
        self._heard.set()

    @contextmanager
    def listening(self) -> Iterator[Callable[[float], None]]:
        """Yield what waits for the next generation, some seconds at most; raise ``OSError`` if that cannot be heard."""
        if not self._is_alone:
            yield self._wait
            return
        with contextlib.closing(_new_socket()) as receiver:
            with self._path() as path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                mask = os.umask(0o177)
                try:
                    receiver.bind(path)
                finally:
                    os.umask(mask)

            def wait(seconds: float) -> None:
                receiver.settimeout(seconds)
                with contextlib.suppress(TimeoutError):
                    receiver.recv(1)
                receiver.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    for _ in range(_MANY):  # those that have come meanwhile say the same
                        receiver.recv(1)

            yield wait

    def _wait(self, seconds: float) -> None:
        self._heard.wait(seconds)
        self._heard.clear()

    @contextmanager
    def _path(self) -> Iterator[str]:
        """Yield the path of the socket in a form that is short enough for its address, however deep the folder is."""
        descriptor = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{descriptor}/{SOCKET}"
        finally:
            os.close(descriptor)


def _new_socket() -> socket.socket:
    new = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    new.setblocking(False)
    return new
