"""Gives each worker of a port as many connections as the others have.

The kernel chooses the worker by a hash of the addresses, so of eight clients one of two workers can get seven; and it
is workers whose threads wait for each other. So the worker that accepts a connection gives it to the one that has
fewest in use, untouched, if that has fewer than itself.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import mmap
import os
import socket
import termios
import time
from collections.abc import Sequence
from typing import Any

HANG_SECONDS = 3.0  # after which a worker that has not told how many connections it has is taken to hang
_CLOSED = 0xFFFFFFFF  # in place of a number of connections


class Sharing:
    """How many connections each worker has, and what takes those that are given to it. Made before the workers are.

    ``inboxes`` are pairs of connected sockets, one pair for each worker. All have both ends of each, as has the master:
    what was given to a worker that has died, or hangs, others take.
    """

    def __init__(self, inboxes: Sequence[tuple[socket.socket, socket.socket]]) -> None:
        self._inboxes = inboxes
        size = array.array("I").itemsize
        numbers = memoryview(mmap.mmap(-1, 2 * len(inboxes) * size)).cast("I")
        self._connections, self._told = numbers[: len(inboxes)], numbers[len(inboxes) :]  # each written by its worker
        for number, ends in enumerate(inboxes):
            self.close(number)
            for end in ends:
                end.setblocking(False)

    def tell(self, number: int, connections: int) -> None:
        """Say how many connections a worker has in use; one that was closed is open again."""
        self._told[number] = _milliseconds()
        self._connections[number] = connections

    def close(self, number: int) -> None:
        """Give a worker nothing any more. It takes what it was given after that, since another may just be giving."""
        self._connections[number] = _CLOSED

    def takes(self, number: int) -> bool:
        """Whether a worker is given connections: it is not closed, and does not hang."""
        silent = (_milliseconds() - self._told[number]) % (_CLOSED + 1)
        return self._connections[number] != _CLOSED and silent < 1000 * HANG_SECONDS

    def has_left(self, number: int) -> bool:
        """Whether connections wait for a worker that does not take them."""
        return not self.takes(number) and self._waiting(number) > 0

    def give(self, giver: int, client: socket.socket) -> int | None:
        """Give a connection to the worker with fewest, and return its number; ``None`` if ``giver`` has no more."""
        loads = {
            number: self._connections[number] + self._waiting(number)
            for number in range(len(self._inboxes))
            if self.takes(number)
        }
        fewest = min(loads, key=loads.__getitem__, default=giver)
        if giver not in loads or loads[fewest] == loads[giver]:
            return None
        with contextlib.suppress(OSError):  # it has too many already that it did not take
            socket.send_fds(self._inboxes[fewest][0], [b"."], [client.fileno()])
            return fewest
        return None

    def take(self, number: int) -> tuple[socket.socket, Any]:
        """Return a connection that was given to a worker, and the client's address, as ``socket.accept`` does.

        Raises ``BlockingIOError`` where there is none, ``ConnectionAbortedError`` where its client is gone.
        """
        received = array.array("i")
        # Not socket.recv_fds, whose flags Python 3.11 does not pass on: programs would inherit the connection.
        length = socket.CMSG_LEN(received.itemsize)
        _, messages, _, _ = self._inboxes[number][1].recvmsg(1, length, socket.MSG_CMSG_CLOEXEC)
        if not messages:  # as without a file descriptor left
            raise _aborted()
        received.frombytes(messages[0][2])
        client = socket.socket(fileno=received[0])
        try:
            return client, client.getpeername()
        except OSError:
            client.close()
            raise _aborted() from None

    def inbox(self, number: int) -> Inbox:
        """Return what a worker takes connections from that others give it."""
        return Inbox(self, number, self._inboxes[number][1])

    def _waiting(self, number: int) -> int:
        size = array.array("i", [0])
        fcntl.ioctl(self._inboxes[number][1], termios.FIONREAD, size)  # in bytes, one for each connection
        return size[0]


class SharedListener(socket.socket):
    """A listener from which a worker takes what it does not give to others."""

    def __init__(self, sharing: Sharing, number: int, listener: socket.socket) -> None:
        super().__init__(fileno=os.dup(listener.fileno()))
        self._sharing = sharing
        self._number = number

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection that is this worker's; raises ``BlockingIOError`` where it is another's."""
        client, address = super().accept()
        given_to = self._sharing.give(self._number, client)
        if given_to is None:
            return client, address
        client.close()
        if not self._sharing.takes(given_to):  # since then: it may look no more, so nobody leaves one there
            return self._sharing.take(given_to)
        raise BlockingIOError(errno.EAGAIN, "another worker has this connection")


class Inbox(socket.socket):
    """What a worker takes connections from that others have accepted, as from a listener."""

    def __init__(self, sharing: Sharing, number: int, end: socket.socket) -> None:
        super().__init__(fileno=os.dup(end.fileno()))
        self._sharing = sharing
        self.number = number
        self._address: Any = ""

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection, and the client's address; raises as ``Sharing.take`` does."""
        client, address = self._sharing.take(self.number)
        self._address = client.getsockname()
        return client, address

    def getsockname(self) -> Any:
        """Return the address that the last connection was made to."""
        return self._address


def _milliseconds() -> int:
    """Return the time by a clock that all processes of the machine share; it begins anew after 49 days."""
    return int(time.monotonic() * 1000) % (_CLOSED + 1)


def _aborted() -> ConnectionAbortedError:
    return ConnectionAbortedError(errno.ECONNABORTED, "the client is gone")
