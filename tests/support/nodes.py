"""Several nodes on one PostgreSQL, each with its Mosquitto, and haproxy in front of them."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import subprocess
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg

from store.advisory import AdvisoryLock
from tests.support import programs
from tests.support.databases import postgres_database
from tests.support.deployment import Deployment, Onboarded, is_answered, wait_until
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
    timeout check 10s
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
FOR_AGENTS = """\
frontend agents
    bind {address}
    default_backend listeners
backend listeners
    balance roundrobin
{servers}
"""


GRANTED = ("Success", "No matching subscribers")


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
            given = self.environment | (others or {})
            process = programs.start(SERVER, ["serve"], env=given, stdout=log, stderr=log, under=self.under)
        self.processes.append(process)
        wait_until(lambda: is_answered(f"{self.url}/healthz") or process.poll() is not None)
        assert process.poll() is None, self.log.read_text()
        self.operator = {**self.first.operator, "PORTAL_URL": self.url}
        self.session.verify = self.first.session.verify
        self.session.headers["Authorization"] = self.first.session.headers["Authorization"]
        return process


def is_let_in(device: Onboarded) -> bool:
    """Whether a broker lets a device publish."""
    try:
        client = device.client()
    except (OSError, AssertionError):
        return False
    try:
        return client.publish(f"devices/{device.id}/x") in GRANTED
    except queue.Empty:  # its connection was cut before the answer
        return False
    finally:
        client.close()


def leaders(node: Deployment) -> list[int]:
    """The database's processes that hold the lock of the jobs of all nodes."""
    number = AdvisoryLock(None, ".installation.lock")._number  # type: ignore[arg-type]
    with psycopg.connect(node.environment["PORTAL_DATABASE_URL"].replace("+psycopg", "")) as connection:
        query = (
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND objsubid = 2 AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return [pid for (pid,) in connection.execute(query, (number,))]


@contextmanager
def by_another_clock(node: Deployment, ahead: str) -> Iterator[None]:
    """Restart a node with a clock that is off, and back at the end."""
    node.stop_portal()
    usual = node.environment
    node.environment = usual | {
        "LD_PRELOAD": str(next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))),
        "FAKETIME": ahead,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": str(node.folder),
    }
    # libfaketime 0.9.10 fails at the system call that time.sleep() is made of.
    (node.folder / "sitecustomize.py").write_text(
        "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
    )
    node.start_portal()
    wait_until(lambda: node.call("GET", "/readyz").status_code == 200)
    yield
    node.stop_portal()
    node.environment = usual
    node.start_portal()


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


@contextmanager
def stopped(node: Deployment) -> Iterator[None]:
    """Stop all processes of a node's portal, none of them within a transaction, which others would wait for."""

    def send(how: signal.Signals) -> None:
        for process in node.processes:
            for pid in (process.pid, *programs_of(process.pid)):
                os.kill(pid, how)

    def stops() -> bool:
        send(signal.SIGSTOP)
        # Those that wait to lead are in no transaction that changes anything.
        busy = (
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND state <> 'idle' AND query NOT LIKE 'SELECT pg_advisory_lock(%'"
        )
        if connection.execute(busy).fetchone() is None:
            return True
        send(signal.SIGCONT)
        return False

    url = node.environment["PORTAL_DATABASE_URL"].replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        wait_until(stops)
    try:
        yield
    finally:
        send(signal.SIGCONT)


def programs_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@dataclass(frozen=True)
class Installation:
    """The nodes, the first one first, and the URL of the load balancer."""

    nodes: list[Deployment]
    url: str

    def is_up(self, node: Deployment) -> bool:
        """Whether the load balancer gives a node connections."""
        return "UP" in self._row(f"nodes/node{self.nodes.index(node)}")[17]

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
def installation(
    count: int, *, agents: str = "", brokerless: Collection[int] = (), **environment: str
) -> Iterator[Installation]:
    """An installation of several nodes behind haproxy, on a database of its own unless one is given.

    Nodes with the numbers ``brokerless`` have no broker. With ``agents``, an address of this machine's, agents reach
    the nodes by haproxy, too.
    """
    with ExitStack() as stack:
        url = environment.get("PORTAL_DATABASE_URL") or stack.enter_context(postgres_database())
        front = free_port()
        given = {"PORTAL_SERVER_NAMES": "localhost,127.0.0.1", **environment, "PORTAL_DATABASE_URL": url}
        for_agents = f"{agents}:{free_port()}"
        own: list[dict[str, str]] = [{} for _ in range(count)]
        for number, more in enumerate(own):
            if agents:
                more |= {"PORTAL_AGENTS_BIND": f"127.0.0.1:{free_port()}", "PORTAL_AGENTS_URL": f"https://{for_agents}"}
            if number in brokerless:
                more["PORTAL_BROKER_CONTROL"] = "none"
        first = stack.enter_context(Deployment(**given, **own[0]))
        nodes = [first, *(stack.enter_context(JoinedNode(first, **given, **more)) for more in own[1:])]
        for node in nodes:
            node.wait_ready()
        stack.enter_context(_haproxy(first, front, nodes, for_agents if agents else ""))
        yield Installation(nodes, f"https://127.0.0.1:{front}")


@contextmanager
def _haproxy(first: Deployment, port: int, nodes: list[Deployment], for_agents: str) -> Iterator[None]:
    addresses = [node.environment["PORTAL_BIND"] for node in nodes]
    checked = "check check-ssl verify none inter 500 fall 2 rise 1"
    servers = "\n".join(f"    server node{number} {at} {checked}" for number, at in enumerate(addresses))
    file = first.folder / "haproxy.cfg"
    text = HAPROXY.format(port=port, servers=servers, socket=first.folder / "haproxy.sock")
    if for_agents:
        listeners = [node.environment["PORTAL_AGENTS_BIND"] for node in nodes]
        lines = (f"    server agents{number} {at} check inter 500" for number, at in enumerate(listeners))
        text += FOR_AGENTS.format(address=for_agents, servers="\n".join(lines))
    file.write_text(text)
    program = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin") or "haproxy"
    with subprocess.Popen([program, "-db", "-f", str(file)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: is_answered(f"https://127.0.0.1:{port}/healthz"))
            yield
        finally:
            process.terminate()
