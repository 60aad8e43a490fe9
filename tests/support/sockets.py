"""TCP sockets of this machine as the kernel shows them in /proc/net/tcp, which proc(5) describes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

LISTEN = "0A"


def _rows() -> list[list[str]]:
    return [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]


def _port(address: str) -> int:
    return int(address.partition(":")[2], 16)


def waiting(port: int) -> list[int]:
    """How many connections wait for a process at each socket that listens on the port, in ascending order."""
    own = [row for row in _rows() if _port(row[1]) == port and row[3] == LISTEN]
    return sorted(int(row[4].partition(":")[2], 16) for row in own)  # rx_queue


def serves(process: int, client: socket.socket) -> bool:
    """Whether a process has the other end of a client's connection to this machine."""
    ports = (client.getpeername()[1], client.getsockname()[1])
    ends = {f"socket:[{row[9]}]" for row in _rows() if (_port(row[1]), _port(row[2])) == ports}
    return any(os.readlink(each) in ends for each in Path(f"/proc/{process}/fd").iterdir())
