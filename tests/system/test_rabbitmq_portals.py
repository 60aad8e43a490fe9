"""Two portals on one PostgreSQL that answer the nodes of one RabbitMQ: enforced is what both have denied."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.databases import POSTGRES_URL, postgres_database
from tests.support.deployment import Deployment, wait_until
from tests.support.engines import SUBSCRIBED, Engine, Member
from tests.support.nodes import kill
from tests.support.ports import free_port
from tests.support.rabbitmq import is_installed
from tests.support.rabbitmq_deployment import JoinedRabbitmqPortal, RabbitmqDeployment

pytestmark = [
    pytest.mark.system,
    pytest.mark.long,
    pytest.mark.skipif(not is_installed(), reason="rabbitmq-server is not installed"),
    pytest.mark.skipif(not POSTGRES_URL, reason="needs PostgreSQL"),
]
NODES = 1
AT_ONCE = 12  # connections, whose questions both portals answer
# As docs/how-to/rabbitmq.md has it.
HAPROXY = """\
defaults
    mode tcp
    timeout connect 1s
    timeout client 5m
    timeout server 5m
    option redispatch 1
listen rabbitmq
    bind 127.0.0.1:{port}
    balance roundrobin
    default-server check inter 500 fall 2 rise 1 on-marked-down shutdown-sessions
{servers}
"""


@dataclass
class Portals:
    """The engine as each portal tells it."""

    first: Engine
    second: Engine

    def is_admitted(self, device: Member) -> bool:
        """Whether any of several connections is let in, about which one portal or the other is asked."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return any(list(pool.map(lambda _: device.is_admitted(), range(AT_ONCE))))

    def is_known(self, device: Member) -> bool:
        """Whether each of several connections is let in."""
        return all(device.is_admitted() for _ in range(AT_ONCE))


@contextmanager
def balanced(folder: Path, port: int, portals: list[Deployment]) -> Iterator[None]:
    """haproxy before the portals' listeners for RabbitMQ."""
    listeners = [portal.environment["PORTAL_RABBITMQ_BIND"] for portal in portals]
    servers = "\n".join(f"    server portal{number} {at}" for number, at in enumerate(listeners))
    file = folder / "haproxy.cfg"
    file.write_text(HAPROXY.format(port=port, servers=servers))
    program = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin") or "haproxy"
    with subprocess.Popen([program, "-db", "-f", str(file)], stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def portals() -> Iterator[Portals]:
    with ExitStack() as stack:
        url, port = stack.enter_context(postgres_database()), free_port()
        first = stack.enter_context(
            RabbitmqDeployment(NODES, asked_at=port, PORTAL_DATABASE_URL=url, PORTAL_BROKER_RESTART="")
        )
        second = stack.enter_context(JoinedRabbitmqPortal(first, PORTAL_BROKER_RESTART=""))
        stack.enter_context(balanced(first.folder, port, [first, second]))
        for portal in (first, second):
            portal.wait_ready()
        yield Portals(Engine(first), Engine(second))


def test_a_device_of_one_portal_is_revoked_at_the_other_and_refused_whichever_is_asked(portals: Portals) -> None:
    device = portals.first.device()
    wait_until(lambda: portals.is_known(device))
    with device.connected() as client:
        assert client.subscribe(device.topic("#")) == SUBSCRIBED
        portals.second.revoke(device)
        assert not portals.is_admitted(device)
        client.wait_until_cut()


def test_revocations_at_both_portals_at_once_are_enforced_as_said(portals: Portals) -> None:
    devices = [(engine, engine.device()) for engine in (portals.first, portals.second) * 4]
    for _, device in devices:
        wait_until(lambda device=device: portals.is_known(device))

    def revoke(engine: Engine, device: Member) -> str:
        said = str(engine.post(f"/revoke/{device.id}")["broker"])
        assert said == "pending" or not portals.is_admitted(device)
        return said

    with ThreadPoolExecutor(len(devices)) as pool:
        said = list(pool.map(lambda one: revoke(*one), devices))
    assert "enforced" in said
    for engine, device in devices:
        wait_until(lambda engine=engine, device=device: engine.post(f"/revoke/{device.id}")["broker"] == "enforced")
        assert not portals.is_admitted(device)


# requests leaves the connections of a killed server to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_while_a_portal_is_killed_nothing_is_enforced_until_it_is_declared_away(portals: Portals) -> None:
    first, second = portals.first, portals.second
    devices = [first.device() for _ in range(3)]
    for device in devices:
        wait_until(lambda device=device: portals.is_known(device))
    name = second.deployment.folder.name
    kill(second.deployment)
    said = first.post(f"/revoke/{devices[0].id}")
    assert said["broker"] == "pending"
    assert name in said["broker_problem"]
    new = first.device()
    wait_until(lambda: portals.is_known(new))  # once haproxy has noticed
    assert not portals.is_admitted(devices[0])
    first.post(f"/brokers/{name}/away", {"reason": "its machine is lost"})
    first.revoke(devices[1])
    assert not portals.is_admitted(devices[1])
    second.deployment.start_portal()
    first.post(f"/brokers/{name}/back")
    wait_until(lambda: first.post(f"/revoke/{devices[0].id}")["broker"] == "enforced")
    second.revoke(devices[2])
    assert not any(portals.is_admitted(device) for device in devices)
    assert portals.is_known(new)
