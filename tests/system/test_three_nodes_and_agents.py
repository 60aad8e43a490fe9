"""Three nodes, two brokers with agents, and all that goes wrong: no false enforced, nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec

from pki.algorithms import private_key_pem
from pki.csr import new_request
from tests.support.databases import POSTGRES_URL
from tests.support.deployment import Onboarded, wait_until
from tests.support.edges import Edge
from tests.support.links import LossyNamespace
from tests.support.nodes import Installation, by_another_clock, installation, is_let_in, kill, leaders
from tests.support.postgres import Cluster

pytestmark = [
    pytest.mark.system,
    pytest.mark.long,
    pytest.mark.skipif(not POSTGRES_URL, reason="needs PostgreSQL"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a network namespace"),
]

RECOVERY_SECONDS = 10.0
CUT_OFF_SECONDS = 60.0


@dataclass
class Fleet:
    """Clients that register and revoke all the time, through the load balancer, and remember what they were told."""

    made: Installation
    edges: list[Edge]
    kept: list[str] = field(default_factory=list)  # acknowledged registrations
    gone: list[Onboarded] = field(default_factory=list)  # acknowledged revocations, enforced or pending
    enforced_at: list[float] = field(default_factory=list)
    pending: int = 0
    false: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def session(self) -> requests.Session:
        first, session = self.made.nodes[0], requests.Session()
        session.trust_env, session.verify = False, first.session.verify
        session.headers["Authorization"] = first.session.headers["Authorization"]
        return session

    def ports(self) -> dict[str, int]:
        """Of all brokers that count."""
        nodes = [node for node in self.made.nodes if node.broker is not None]
        return {node.folder.name: node.mqtt_port for node in nodes} | {edge.name: edge.port for edge in self.edges}

    def let_in_at(self, device: Onboarded) -> list[str]:
        """The brokers that let a device in."""
        return [name for name, port in self.ports().items() if is_let_in(Onboarded(device.id, device.folder, port))]

    def register(self, session: requests.Session) -> Onboarded:
        """Register a device with a key of its own, and keep its credentials."""
        key = ec.generate_private_key(ec.SECP256R1())
        body = {"name": f"pump-{time.monotonic_ns()}", "type": "pump", "location": "hall 1", "firmware": "1.0"}
        answer = session.post(f"{self.made.url}/register", json=body | {"csr": new_request(key)}, timeout=60)
        answer.raise_for_status()
        said: dict[str, Any] = answer.json()
        self.kept.append(said["device_id"])
        folder = self.made.nodes[0].folder / said["device_id"]
        folder.mkdir()
        (folder / "device.key").write_bytes(private_key_pem(key))
        (folder / "chain.pem").write_text(said["certificate"] + said["chain"])
        (folder / "ca.pem").write_bytes((self.made.nodes[0].data / "ca.pem").read_bytes())
        return Onboarded(said["device_id"], folder, 0)

    def revoke(self, session: requests.Session, device: Onboarded) -> None:
        """Revoke a device, and look at each broker if that is said to be enforced."""
        answer = session.post(f"{self.made.url}/revoke/{device.id}", json={}, timeout=60)
        answer.raise_for_status()
        enforced, at = answer.json()["broker"] == "enforced", time.monotonic()
        if enforced:  # nothing is waited for
            self.false += [f"{device.id} at {name}" for name in self.let_in_at(device)]
            self.enforced_at.append(at)
        else:
            self.pending += 1
        self.gone.append(device)

    def work(self) -> None:
        """Register and revoke until it is to stop; what is not acknowledged may fail."""
        while not self.stopping.is_set():
            with self.session() as session, contextlib.suppress(requests.RequestException):
                device = self.register(session)
                port = random.choice([*self.ports().values()])  # noqa: S311
                deadline = time.monotonic() + 5
                while not is_let_in(Onboarded(device.id, device.folder, port)) and time.monotonic() < deadline:
                    time.sleep(0.05)  # a grant may lag
                self.revoke(session, device)

    def recovers(self, since: float) -> float:
        """Wait for the next revocation that is enforced everywhere; return the seconds from ``since`` to that."""
        wait_until(lambda: self.enforced_at and self.enforced_at[-1] > since)
        return next(at for at in self.enforced_at if at > since) - since


@pytest.fixture(scope="module")
def namespace() -> Iterator[LossyNamespace]:
    with LossyNamespace() as made:
        yield made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as made:
        yield made


@pytest.fixture(scope="module")
def fleet(namespace: LossyNamespace, cluster: Cluster) -> Iterator[Fleet]:
    """Nodes of which the third has no broker; the agent of the second broker elsewhere is in the namespace."""
    settings = {"PORTAL_DATABASE_URL": cluster.url, "PORTAL_ENFORCE_TIMEOUT": "3"}
    with installation(3, agents=namespace.outside, brokerless=[2], **settings) as made, contextlib.ExitStack() as stack:
        edges = []
        for name in ("edge-1", "edge-2"):
            edge = Edge(made.nodes[0], name)
            stack.callback(edge.close)
            if name == "edge-2":
                edge.environment["PORTAL_BROKER_PROBE_ADDRESS"] = f"{namespace.outside}:{edge.port}"
                edge.under = ("ip", "netns", "exec", namespace.name)
            edge.start()
            edges.append(edge)
        fleet = Fleet(made, edges)
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(fleet.work) for _ in range(2)]
            try:
                fleet.recovers(time.monotonic())
                yield fleet
            finally:
                fleet.stopping.set()
            for one in running:
                one.result()


def test_the_leader_is_killed_in_the_midst_of_a_pass(fleet: Fleet) -> None:
    first, second, third = fleet.made.nodes
    for node in fleet.made.nodes:
        node.stop_portal()
    first.start_portal(others={"PORTAL_FAILPOINT": "revoke.after_commit>apply.after_install=sleep:600"})
    wait_until(lambda: len(leaders(first)) == 1)
    before = leaders(first)
    second.start_portal()
    third.start_portal()
    pending = fleet.pending
    wait_until(lambda: fleet.pending > pending + 1)  # the first node, at which one was made, sleeps before its proof
    kill(first)
    began = time.monotonic()
    wait_until(lambda: len(leaders(second)) == 1 and leaders(second) != before)
    assert time.monotonic() - began < RECOVERY_SECONDS
    first.start_portal()
    assert fleet.recovers(time.monotonic()) < RECOVERY_SECONDS


@pytest.mark.parametrize("number", [1, 2])
def test_a_node_with_a_broker_or_without_is_killed_under_load(fleet: Fleet, number: int) -> None:
    node = fleet.made.nodes[number]
    kill(node)
    if node.broker is None:  # the others go on without it
        assert fleet.recovers(time.monotonic()) < RECOVERY_SECONDS
    node.start_portal()
    assert fleet.recovers(time.monotonic()) < RECOVERY_SECONDS


def test_postgresql_is_killed(fleet: Fleet, cluster: Cluster) -> None:
    cluster.kill_at_once()
    assert fleet.recovers(time.monotonic()) < RECOVERY_SECONDS


def test_an_agent_is_cut_off_for_a_minute(fleet: Fleet, namespace: LossyNamespace) -> None:
    namespace.lost = 1.0
    began, before = time.monotonic(), fleet.pending
    threading.Event().wait(CUT_OFF_SECONDS)
    # What was on its way may have been enforced; then nothing can be.
    assert not [at for at in fleet.enforced_at if at > began + 5]
    assert fleet.pending > before
    namespace.lost = 0.0
    assert fleet.recovers(time.monotonic()) < RECOVERY_SECONDS


@pytest.mark.parametrize("ahead", ["+60s", "-60s"])
def test_the_clock_of_a_node_is_a_minute_off(fleet: Fleet, ahead: str) -> None:
    node = fleet.made.nodes[1]
    with by_another_clock(node, ahead):
        assert fleet.recovers(time.monotonic()) < RECOVERY_SECONDS
        for _ in range(5):
            fleet.recovers(time.monotonic())


def test_packets_are_lost_between_an_agent_and_the_portal(fleet: Fleet, namespace: LossyNamespace) -> None:
    namespace.lost = 0.2
    until = time.monotonic() + 20
    while time.monotonic() < until:
        fleet.recovers(time.monotonic())
    namespace.lost = 0.0
    assert fleet.recovers(time.monotonic()) < RECOVERY_SECONDS


def test_nothing_was_called_enforced_that_was_not_and_nothing_acknowledged_is_lost(fleet: Fleet) -> None:
    fleet.stopping.set()
    third = fleet.made.nodes[2]
    print(f"{len(fleet.kept)} registered, {len(fleet.enforced_at)} enforced, {fleet.pending} pending")
    assert fleet.false == []
    wait_until(lambda: all(edge.is_enforcing() for edge in fleet.edges))
    revoked = {device.id for device in [*fleet.gone]}
    for device_id in [*fleet.kept]:
        status = third.call("GET", f"/devices/{device_id}")
        assert status.status_code == 200
        assert device_id not in revoked or status.json()["status"] == "revoked"
    assert not [device.id for device in fleet.gone[-20:] if fleet.let_in_at(device)]
