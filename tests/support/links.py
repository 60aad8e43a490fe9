"""Links that tests cut and join again: one of TCP to a port of this machine, and one that loses packets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import threading
from types import TracebackType
from typing import Self

from tests.support.ports import free_port


class Link:
    """Passes on what is sent, until it is cut: then nothing passes and nobody is told, as with a cable that is out."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._passes = threading.Event()
        self._passes.set()
        self._stopping = False
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._ends: list[socket.socket] = []
        self.passed = 0  # bytes from the target
        self.limit: int | None = None  # after which it is cut

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._passes.set()
        self._listener.close()
        for end in self._ends:
            end.close()

    def cut(self) -> None:
        """Let nothing pass; connections stay, and new ones are not answered."""
        self._passes.clear()

    def join(self) -> None:
        """Let connections pass that begin from now on; those from before are lost, as their time is over."""
        self.limit = None
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._passes.set()

    def _accept(self) -> None:
        while not self._stopping:
            with contextlib.suppress(OSError):
                client = self._listener.accept()[0]
                self._ends.append(client)
                threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        self._passes.wait()
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._target)) as target:
            self._ends.append(target)
            while not self._stopping:
                ready, _, _ = select.select([client, target], [], [], 0.2)
                for end in ready:
                    self._passes.wait()
                    content = end.recv(65536)
                    if not content:
                        return
                    if end is target:
                        self.passed += len(content)
                        if self.limit is not None and self.passed > self.limit:
                            self._passes.clear()
                            continue
                    (client if end is target else target).sendall(content)


TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # of linux/if_tun.h


NAMESPACE = "edge"  # begins the names


class LossyNamespace:
    """A namespace of the network, joined to this one by a link that loses a share of the packets, each way.

    The kernel hands over the packets (TUN devices), and this process passes them on, or does not. Only root makes it.
    """

    def __init__(self) -> None:
        self.lost = 0.0  # 1.0: all packets
        self._random = random.Random(17)  # noqa: S311 - which packets are lost is no secret
        self._stopping = threading.Event()
        self._passing: threading.Thread | None = None

    def __enter__(self) -> Self:
        number = _new_namespace()
        self.name, self._here, self._there = f"{NAMESPACE}{number}", f"{NAMESPACE}{number}a", f"{NAMESPACE}{number}b"
        self.outside, self.inside = f"10.213.{number}.1", f"10.213.{number}.2"
        ends = [_tun(self._here), _tun(self._there)]
        self._passing = threading.Thread(target=self._pass, args=(ends,))
        self._passing.start()
        _run("ip", "link", "set", self._there, "netns", self.name)
        in_it = ("ip", "-n", self.name)
        _run("ip", "address", "add", self.outside, "peer", self.inside, "dev", self._here)
        _run("ip", "link", "set", self._here, "up")
        _run(*in_it, "address", "add", self.inside, "peer", self.outside, "dev", self._there)
        for device in (self._there, "lo"):
            _run(*in_it, "link", "set", device, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if self._passing is not None:
            self._passing.join()
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)

    def _pass(self, ends: list[int]) -> None:
        other = {ends[0]: ends[1], ends[1]: ends[0]}
        while not self._stopping.is_set():
            ready, _, _ = select.select(ends, [], [], 0.2)
            for end in ready:
                with contextlib.suppress(OSError):  # one of the devices is not up
                    packet = os.read(end, 65536)
                    if self._random.random() >= self.lost:
                        os.write(other[end], packet)
        for end in ends:
            os.close(end)


def _new_namespace() -> int:
    """Make a namespace with a number that no other one has, whichever process made that; return the number."""
    for number in random.sample(range(250), 250):
        made = subprocess.run(["ip", "netns", "add", f"{NAMESPACE}{number}"], check=False, capture_output=True)
        if made.returncode == 0:
            return number
    raise RuntimeError(f"no namespace can be made: {made.stderr.decode()}")


def _tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=30)
