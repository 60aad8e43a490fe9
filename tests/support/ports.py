"""Ports for the servers that tests start, which nobody else takes before the server does."""

from __future__ import annotations

import atexit
import fcntl
import itertools
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Below those that the kernel gives to clients: a connection that somebody opens can have none of them.
FIRST, LAST = 20000, 32767
BLOCK = 399

_claims = Path(tempfile.gettempdir(), f"portal-test-ports-{os.getuid()}").open("ab")  # noqa: SIM115 - until this process ends
atexit.register(_claims.close)


def _own_ports() -> Iterator[int]:
    """The ports of a block that no other process on this machine has, over and over."""
    blocks = range(FIRST, LAST + 1 - BLOCK, BLOCK)
    for start in random.sample(blocks, len(blocks)):
        try:
            fcntl.lockf(_claims, fcntl.LOCK_EX | fcntl.LOCK_NB, BLOCK, start)
        except OSError:
            continue
        return itertools.cycle(range(start, start + BLOCK))
    raise RuntimeError("every block of ports is claimed by another process that runs tests")


_ports = _own_ports()


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    for port in itertools.islice(_ports, BLOCK):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free in this process's block")
