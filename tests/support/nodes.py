"""Several nodes on one PostgreSQL, each with its Mosquitto, and haproxy in front of them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from tests.support import programs
from tests.support.databases import postgres_database
from tests.support.deployment import Deployment, is_answered, wait_until
from tests.support.ports import free_port
from tests.support.programs import SERVER, Process

HAPROXY = """\
global
    maxconn 500
    stats socket {socket} level admin
defaults
    mode tcp
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    retries 3
    option redispatch 1
frontend portal
    bind 127.0.0.1:{port}
    default_backend nodes
backend nodes
    balance roundrobin
    option httpchk GET /healthz
{servers}
"""


class JoinedNode(Deployment):
    """A node that has joined another one's installation; its operator is the first node's."""

    def __init__(self, first: Deployment, **environment: str) -> None:
        super().__init__(**environment)
        self.first = first

    def make_data_folder(self) -> None:
        """Join by a code of the first node's, and write the broker's files."""
        said = self.first.run_flask("invite").stdout
        code = said.split()[1]
        self.run_flask("join", "--name", self.folder.name, "--code", code)
        self.run_flask("init")

    def start_portal(self, *, others: dict[str, str] | None = None) -> Process:
        """Start the server; returns once it answers."""
        with self.log.open("ab") as log:
            process = programs.start(SERVER, ["serve"], env=self.environment, stdout=log, stderr=log, under=self.under)
        self.processes.append(process)
        wait_until(lambda: is_answered(f"{self.url}/healthz") or process.poll() is not None)
        assert process.poll() is None, self.log.read_text()
        self.operator = {**self.first.operator, "PORTAL_URL": self.url}
        self.session.verify = self.first.session.verify
        self.session.headers["Authorization"] = self.first.session.headers["Authorization"]
        return process


def kill(node: Deployment) -> None:
    """Kill all processes of a node's portal at once, as a machine that is gone."""
    for process in node.processes:
        with suppress(ProcessLookupError):
            children = programs_of(process.pid)
            for pid in (process.pid, *children):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait(60)
    node.processes.clear()


def programs_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@dataclass(frozen=True)
class Installation:
    """The nodes, the first one first, and the URL of the load balancer."""

    nodes: list[Deployment]
    url: str

    @contextmanager
    def without(self, node: Deployment) -> Iterator[None]:
        """Have the load balancer give a node no new connections, until it is well again at the end."""
        name = f"nodes/node{self.nodes.index(node)}"
        self._order(f"set server {name} state drain")
        wait_until(lambda: self._sessions(name) == 0)
        yield
        self._order(f"set server {name} state ready")
        wait_until(lambda: "UP" in self._row(name)[17])

    def _sessions(self, name: str) -> int:
        return int(self._row(name)[4])

    def _row(self, name: str) -> list[str]:
        backend, server = name.split("/")
        rows = [line.split(",") for line in self._order("show stat").splitlines()]
        return next(row for row in rows if row[:2] == [backend, server])

    def _order(self, words: str) -> str:
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self.nodes[0].folder / "haproxy.sock"))
            control.sendall(words.encode() + b"\n")
            return b"".join(iter(lambda: control.recv(65536), b"")).decode()


@contextmanager
def installation(count: int, **environment: str) -> Iterator[Installation]:
    """An installation of several nodes behind haproxy, on a database of its own unless one is given."""
    with ExitStack() as stack:
        url = environment.get("PORTAL_DATABASE_URL") or stack.enter_context(postgres_database())
        front = free_port()
        given = {"PORTAL_SERVER_NAMES": "localhost,127.0.0.1", **environment, "PORTAL_DATABASE_URL": url}
        first = stack.enter_context(Deployment(**given))
        nodes = [first, *(stack.enter_context(JoinedNode(first, **given)) for _ in range(count - 1))]
        for node in nodes:
            node.wait_ready()
        stack.enter_context(_haproxy(first, front, nodes))
        yield Installation(nodes, f"https://127.0.0.1:{front}")


@contextmanager
def _haproxy(first: Deployment, port: int, nodes: list[Deployment]) -> Iterator[None]:
    addresses = [node.environment["PORTAL_BIND"] for node in nodes]
    checked = "check check-ssl verify none inter 500 fall 1 rise 1"
    servers = "\n".join(f"    server node{number} {at} {checked}" for number, at in enumerate(addresses))
    file = first.folder / "haproxy.cfg"
    file.write_text(HAPROXY.format(port=port, servers=servers, socket=first.folder / "haproxy.sock"))
    program = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin") or "haproxy"
    with subprocess.Popen([program, "-db", "-f", str(file)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: is_answered(f"https://127.0.0.1:{port}/healthz"))
            yield
        finally:
            process.terminate()
