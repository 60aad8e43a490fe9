"""Three nodes of RabbitMQ, one killed, held up or cut off while devices are revoked: what is called enforced is that.

Each device that is said to be enforced is tried at every node at once, and again at the end, when all are well.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import pytest
import requests

from tests.support.deployment import wait_until
from tests.support.engines import SUBSCRIBED, Engine, Member
from tests.support.links import LossyNamespace
from tests.support.nodes import kill
from tests.support.ports import free_port
from tests.support.rabbitmq import Node, is_installed
from tests.support.rabbitmq_deployment import RabbitmqDeployment

pytestmark = [
    pytest.mark.system,
    pytest.mark.long,
    pytest.mark.skipif(not is_installed(), reason="rabbitmq-server is not installed"),
]
HELD_UP_SECONDS = 2.0  # how long a node is tried that may be held up
RECOVERY_SECONDS = 30.0  # a third of that on a machine without other work
PATIENCE = 60.0  # of a client among a thousand


@dataclass
class Revocations:
    """Registers and revokes devices, some at once, and tries each where it may not be admitted."""

    site: Engine
    enforced: list[tuple[float, Member]] = field(default_factory=list)
    pending: list[Member] = field(default_factory=list)
    registered: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)  # although it was said to be enforced
    said: set[str] = field(default_factory=set)
    _stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def nodes(self) -> list[Node]:
        return list(cluster_of(self.site).nodes)

    def run(self, first: int) -> None:
        for node in itertools.islice(itertools.cycle(self.nodes), first, None):
            if self._stopping.is_set():
                return
            with suppress(requests.RequestException, AssertionError):  # the portal is away: nothing was said
                self.revoke_one(node)

    def revoke_one(self, node: Node) -> None:
        """Revoke a device that is connected to the node, if that can be."""
        device = self.site.device()
        self.registered.append(device.id)
        with ExitStack() as stack:
            with suppress(OSError):
                client = stack.enter_context(device.at(node.mqtt_port).tls(HELD_UP_SECONDS))
                client.seconds = HELD_UP_SECONDS
                client.connect(device.id, clean=False)
                client.subscribe(device.topic("#"))
            answer = self.site.deployment.call("POST", f"/revoke/{device.id}", {})
            if answer.status_code != 200:
                return
            self.said.add(str(answer.json().get("broker_problem")))
            if answer.json()["broker"] != "enforced":
                self.pending.append(device)
                return
            self.enforced.append((time.monotonic(), device))
            self.try_at_each(device)

    def try_at_each(self, device: Member) -> None:
        for node in self.nodes:
            if device.at(node.mqtt_port).is_admitted(HELD_UP_SECONDS):
                self.admitted.append(f"{device.id} at {node.name}")

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Revoke during the body, until one was enforced after it; see that nobody was admitted who may not be."""
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            running = [pool.submit(self.run, number) for number in range(len(self.nodes))]
            try:
                self.wait_for_one()
                yield
                ended = time.monotonic()
                self.wait_for_one()
                self.took = self.enforced[-1][0] - ended
            finally:
                self._stopping.set()
                for one in running:
                    one.result()
                self._stopping.clear()

    def wait_for_one(self) -> None:
        """Wait until one more is enforced."""
        count = len(self.enforced)
        wait_until(lambda: len(self.enforced) > count)

    def check(self) -> None:
        """See that no device was admitted after it was said to be enforced, and that what was answered is kept."""
        self.site.deployment.wait_ready()
        print(*self.said, sep="\n")
        for device in self.pending:
            wait_until(lambda one=device: self.site.post(f"/revoke/{one.id}")["broker"] == "enforced")
        for device in [*self.pending, *(device for _, device in self.enforced)]:
            self.try_at_each(device)
            assert self.site.deployment.call("GET", f"/devices/{device.id}").json()["status"] == "revoked"
        for identity in self.registered:
            assert self.site.deployment.call("GET", f"/devices/{identity}").status_code == 200
        print(
            f"{len(self.enforced)} enforced, {len(self.pending)} pending, {len(self.admitted)} admitted afterwards;"
            f" {self.took:.1f} s from the end of the fault to the next one that was enforced"
        )
        assert self.admitted == []
        assert self.took < RECOVERY_SECONDS


def cluster_of(site: Engine):  # type: ignore[no-untyped-def]
    assert isinstance(site.deployment, RabbitmqDeployment)
    return site.deployment.cluster


@pytest.fixture(scope="module")
def site() -> Iterator[Engine]:
    with RabbitmqDeployment(3, PORTAL_ENFORCE_TIMEOUT="") as deployment:
        deployment.wait_ready()
        yield Engine(deployment)


@pytest.fixture
def revocations(site: Engine) -> Revocations:
    return Revocations(site)


@pytest.fixture(scope="module")
def linked() -> Iterator[RabbitmqDeployment]:
    """Its portal and nodes reach each other by links; a node that does not run is one that does not answer there."""
    with RabbitmqDeployment(3, linked=True, PORTAL_ENFORCE_TIMEOUT="") as deployment:
        deployment.wait_ready()
        yield deployment


def test_a_device_is_refused_at_every_node_once_it_is_enforced(site: Engine, revocations: Revocations) -> None:
    for node in revocations.nodes * 3:
        revocations.revoke_one(node)
    assert len(revocations.enforced) == 9
    assert revocations.admitted == []


def test_a_node_is_killed_and_comes_back(site: Engine, revocations: Revocations) -> None:
    node = revocations.nodes[1]
    with revocations.going_on():
        node.kill()
        started = time.monotonic()
        revocations.wait_for_one()
        print(f"{time.monotonic() - started:.1f} s without it")
        node.launch()
        node.wait()
    revocations.check()


def test_a_node_is_held_up_and_goes_on_as_if_nothing_had_been(site: Engine, revocations: Revocations) -> None:
    node = revocations.nodes[2]
    with revocations.going_on():
        node.signal(signal.SIGSTOP)
        try:
            pending = len(revocations.pending)
            wait_until(lambda: len(revocations.pending) > pending)
            enforced = len(
                revocations.enforced
            )  # from now on none is: it may still serve devices, for all that is known
            wait_until(lambda: len(revocations.pending) > pending + 2)
            assert len(revocations.enforced) == enforced
        finally:
            node.signal(signal.SIGCONT)
    revocations.check()


# requests leaves the connections of a killed server to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_portal_is_killed_and_started_again(site: Engine, revocations: Revocations) -> None:
    with revocations.going_on():
        kill(site.deployment)
        site.deployment.start_portal()
    revocations.check()


def test_a_thousand_clients_at_three_nodes_get_no_message_of_another(site: Engine) -> None:
    count, at_once = 1000, 8
    nodes = cluster_of(site).nodes
    with ThreadPoolExecutor(at_once) as pool, ExitStack() as stack:
        devices = list(pool.map(lambda _: site.device(), range(count)))

        def connect(number: int):  # type: ignore[no-untyped-def]
            device = devices[number].at(nodes[number % len(nodes)].mqtt_port)
            client = device.tls(PATIENCE)
            client.seconds = PATIENCE
            assert client.connect(device.id) == 0
            assert client.subscribe(device.topic("#")) == SUBSCRIBED
            return client

        clients = [stack.enter_context(client) for client in pool.map(connect, range(count))]

        def speak(number: int) -> int:
            device, client = devices[number], clients[number]
            for message in range(5):
                client.publish(device.topic(f"{message}"), device.id.encode())
                assert client.receive().payload == device.id.encode()
            return len(client.messages)

        assert sum(pool.map(speak, range(count))) == 0
        for number in range(0, count, 50):  # some try to take the session of the one before them, and to hear all
            device = devices[number].at(nodes[number % len(nodes)].mqtt_port)
            with device.tls(PATIENCE) as intruder:
                intruder.seconds = PATIENCE
                assert intruder.connect(devices[number - 1].id) != 0
            with suppress(ConnectionError):
                assert clients[number].subscribe("devices/#") != SUBSCRIBED
        for number, client in enumerate(clients):
            if number % 50:
                client.ping()
            assert not client.messages


def test_the_portal_cannot_reach_a_node(linked: RabbitmqDeployment) -> None:
    revocations = Revocations(Engine(linked))
    links = linked.links_to(linked.cluster.nodes[0])
    with revocations.going_on():
        for link in links:
            link.cut()
        pending = len(revocations.pending)
        wait_until(lambda: len(revocations.pending) > pending + 1)
        for link in links:
            link.join()
    revocations.check()


def test_the_nodes_cannot_reach_the_portal(linked: RabbitmqDeployment) -> None:
    revocations = Revocations(Engine(linked))
    assert linked.answers_link is not None
    with revocations.going_on():
        linked.answers_link.cut()
        pending = len(revocations.pending)
        wait_until(lambda: len(revocations.pending) > pending)
        linked.answers_link.join()
    revocations.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a network namespace")
def test_on_a_link_that_loses_packets_between_portal_and_nodes() -> None:
    with LossyNamespace() as namespace:
        made = RabbitmqDeployment(
            3,
            at=namespace.outside,
            answers_at=namespace.inside,
            PORTAL_BIND=f"{namespace.inside}:{free_port()}",
            PORTAL_SERVER_NAMES=f"localhost,{namespace.inside}",
            PORTAL_BROKER_NAMES=f"localhost,{namespace.outside}",
            PORTAL_ENFORCE_TIMEOUT="",
        )
        made.url = f"https://{made.environment['PORTAL_BIND']}"
        made.under = ("ip", "netns", "exec", namespace.name)
        with made as deployment:
            deployment.wait_ready()
            revocations = Revocations(Engine(deployment))
            with revocations.going_on():
                namespace.lost = 0.1
                for _ in range(10):
                    revocations.wait_for_one()
                namespace.lost = 0.0
            revocations.check()
