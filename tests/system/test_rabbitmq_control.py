"""A real RabbitMQ cluster under the portal's control: what ``enforced`` means there, and what keeps it pending."""

from __future__ import annotations

import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from broker.rabbitmq.cluster import Cluster
from broker.rabbitmq.probe import NodeProbe
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from operations.own_certificates import probe_certificates
from tests.support.mqtt import MqttClient
from tests.support.rabbitmq import Node, is_installed
from tests.support.rabbitmq_site import OPERATOR, Device, RabbitmqSite

pytestmark = [
    pytest.mark.system,
    pytest.mark.long,
    pytest.mark.skipif(not is_installed(), reason="rabbitmq-server is not installed"),
]
REVOKED, ACCEPTED, REFUSED = "SSLV3_ALERT_CERTIFICATE_REVOKED", "return code 0", "return code 4"


@pytest.fixture(scope="module", params=[1, 3], ids=["one node", "three nodes"])
def site(request: pytest.FixtureRequest) -> Iterator[RabbitmqSite]:
    with RabbitmqSite(request.param) as made:
        yield made


def revoke(site: RabbitmqSite, device: Device) -> tuple[bool, str | None]:
    done = site.portal.revocations.revoke(OPERATOR, device.id, "key_compromise")
    return done.enforced, done.problem


def enforce(site: RabbitmqSite) -> str | None:
    """Bring the cluster to the newest generation; return what is wrong, if that fails."""
    reconciler = site.portal.reconciler
    return reconciler.apply(reconciler.own_state().generation, timeout=5.0).problem


@contextmanager
def stopped(node: Node) -> Iterator[None]:
    """A node that answers nobody, and goes on later as if nothing had been."""
    node.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.signal(signal.SIGCONT)


def test_a_revoked_device_is_cut_off_and_refused_everywhere_once_that_is_enforced(site: RabbitmqSite) -> None:
    device = site.device()
    first, last = site.cluster.nodes[0], site.cluster.nodes[-1]
    assert site.refusal(device, first) == ACCEPTED
    with site.client(device, last) as client:
        assert client.connect(device.id) == 0
        client.publish(f"devices/{device.id}/state")
        assert revoke(site, device) == (True, None)
        client.wait_until_cut()
    for node in site.cluster.nodes:
        assert node.get(f"/api/connections/username/{device.id}") == []
        assert site.refusal(device, node) == REVOKED


def test_a_device_is_registered_and_connects_while_the_revocation_of_another_one_is_being_proven(
    site: RabbitmqSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, begun, over = site.device(), threading.Event(), threading.Event()
    running = Cluster.running

    def held_up(self: Cluster, deadline: float) -> Set[str]:
        begun.set()
        over.wait()
        return running(self, time.monotonic() + 5)

    monkeypatch.setattr(Cluster, "running", held_up)
    with ThreadPoolExecutor(1) as pool:
        revoking = pool.submit(revoke, site, device)
        begun.wait()
        try:
            assert site.refusal(site.device()) == ACCEPTED
            assert not revoking.done()
        finally:
            over.set()
        revoking.result()
    monkeypatch.undo()
    assert enforce(site) is None
    assert site.refusal(device) == REVOKED


def test_a_suspended_device_comes_back_when_it_is_resumed(site: RabbitmqSite) -> None:
    device = site.device()
    assert site.portal.revocations.suspend(OPERATOR, device.id).enforced
    assert site.refusal(device) == REVOKED
    site.portal.revocations.resume(OPERATOR, device.id)
    assert enforce(site) is None
    assert site.refusal(device) == ACCEPTED


def test_a_device_that_may_read_less_loses_its_sleeping_session(site: RabbitmqSite) -> None:
    device = site.device()
    with site.client(device) as client:
        assert client.connect(device.id, clean=False) == 0
        assert client.subscribe(f"devices/{device.id}/news") == 1
    site.portal.registrations.update(OPERATOR, device.id, {}, [(f"devices/{device.id}/state", "write")])
    assert enforce(site) is None
    with site.client(device, site.cluster.nodes[-1]) as client:
        assert client.connect(device.id, clean=False) == 0
        assert not client.session_present
        client.publish(f"devices/{device.id}/state")
        with pytest.raises(ConnectionError):
            client.subscribe(f"devices/{device.id}/news")


def test_a_client_that_comes_back_at_once_by_what_the_nodes_believe_is_cut_again(site: RabbitmqSite) -> None:
    """It has done handshakes before, which no CRL ends, and has had the nodes ask about it until just now."""
    for _ in range(3):  # since what a node believes was answered by chance just now or nearly a second ago
        _come_back(site)


def _come_back(site: RabbitmqSite) -> None:
    device = site.device()
    begun, over = threading.Event(), threading.Event()
    came_back, stayed = list[float](), list[float]()

    def insist(node: Node) -> None:
        waiting = [site.client(device, node) for _ in range(30)]
        while not begun.is_set():
            use(node, site.client(device, node), lambda: True)
        while waiting:
            use(node, waiting.pop(), over.is_set)
            time.sleep(0.02)

    def use(node: Node, client: MqttClient, is_enough: Callable[[], bool]) -> None:
        with client, suppress(ConnectionError, ssl.SSLError, TimeoutError):
            if client.connect(device.id) == 0:
                came_back.append(time.monotonic())
                while True:
                    client.publish(f"devices/{device.id}/{node.name.partition('@')[0]}")
                    if is_enough():
                        break
                if over.is_set():
                    stayed.append(time.monotonic())

    threads = [threading.Thread(target=insist, args=(node,)) for node in site.cluster.nodes]
    for thread in threads:
        thread.start()
    site.cluster.wait_for(lambda: len(came_back) > 10 * len(threads))
    begun.set()
    assert revoke(site, device) == (True, None)
    over.set()
    for thread in threads:
        thread.join()
    assert not stayed


def test_the_probe_may_say_what_is_true_and_nothing_else(site: RabbitmqSite) -> None:
    good = probe_certificates(site.settings).good
    one = NodeProbe(site.settings.rabbitmq_nodes[0], site.settings)
    generation = site.portal.reconciler.own_state().generation
    one.prove(good, generation, site.soon())
    with pytest.raises(BrokerUnavailable):
        one.prove(good, generation + 1000, site.soon(1))
    own = Device(one._client_id(good), (good.certificate, good.key))
    for topic in ("portal/other/1", f"devices/{own.id}/state", f"portal/until/{int(time.time() * 1000) + 60_000}"):
        with site.client(own) as client:
            assert client.connect(own.id) == 0
            with pytest.raises(ConnectionError):
                client.publish(topic)
    with site.client(own) as client:
        assert client.connect(own.id) == 0
        with pytest.raises(ConnectionError):
            client.subscribe("portal/#")
    with site.client(own) as client:
        assert client.connect("another") != 0


def test_a_device_may_not_say_what_the_probe_may(site: RabbitmqSite) -> None:
    device = site.device()
    with site.client(device) as client:
        assert client.connect(device.id) == 0
        with pytest.raises(ConnectionError):
            client.publish("portal/prove/1")


def test_a_node_that_still_believes_an_answer_is_waited_for(site: RabbitmqSite) -> None:
    good = probe_certificates(site.settings).good
    one = NodeProbe(site.settings.rabbitmq_nodes[0], site.settings)
    generation = site.portal.reconciler.own_state().generation

    def was_believed() -> bool:  # on a machine that is slow it may be forgotten before it is asked about
        believed = one.prove(good, generation, site.soon())
        time.sleep(max(0.0, believed.ends / 1000 - time.time()) + 0.05)  # it is true no more
        return not one.see_forgotten(good, believed, site.soon())

    assert any(was_believed() for _ in range(5))
    believed = one.prove(good, generation, site.soon())
    time.sleep(1.1)
    assert one.see_forgotten(good, believed, site.soon())


def test_a_node_that_the_settings_do_not_name_is_found_out(site: RabbitmqSite) -> None:
    if len(site.cluster.nodes) == 1:
        pytest.skip("needs several nodes")
    some = site.settings.model_copy(update={"rabbitmq_nodes": site.settings.rabbitmq_nodes[:-1]})
    with pytest.raises(BrokerNotEnforcing, match="PORTAL_RABBITMQ_NODES does not name"):
        Cluster(some).running(site.soon())
    other = site.settings.rabbitmq_nodes[0]._replace(name="rabbit@nowhere")
    more = site.settings.model_copy(update={"rabbitmq_nodes": (*site.settings.rabbitmq_nodes, other)})
    with pytest.raises(BrokerNotEnforcing, match="rabbit@nowhere is not in the cluster"):
        Cluster(more).running(site.soon())


def test_who_is_connected_is_listed(site: RabbitmqSite) -> None:
    device = site.device()
    cluster = Cluster(site.settings)
    with site.client(device, site.cluster.nodes[-1]) as client:
        assert client.connect(device.id) == 0
        site.cluster.wait_for(lambda: device.id in cluster.connected(site.soon()), 15)
        assert abs(cluster.connected(site.soon())[device.id].timestamp() - time.time()) < 20


def test_a_node_that_is_paused_keeps_a_revocation_pending_until_it_has_proven_it(site: RabbitmqSite) -> None:
    device, node = site.device(), site.cluster.nodes[-1]
    with site.client(device, node) as client:
        assert client.connect(device.id) == 0
        with stopped(node):
            enforced, problem = revoke(site, device)
            assert not enforced
            assert node.name in (problem or "")
        assert enforce(site) is None
        client.wait_until_cut()
    assert site.refusal(device, node) == REVOKED


def test_a_node_that_has_ended_keeps_nobody_waiting_and_begins_with_nothing(site: RabbitmqSite) -> None:
    if len(site.cluster.nodes) == 1:
        pytest.skip("needs several nodes")
    device, late, node = site.device(), site.device(), site.cluster.nodes[-1]
    with site.client(device, node) as client:
        assert client.connect(device.id) == 0
        node.kill()
        client.wait_until_cut()
    site.cluster.wait_for(lambda: node.name not in site.cluster.running_at(site.cluster.nodes[0]))
    assert revoke(site, device) == (True, None)
    node.launch()
    node.wait()
    assert {site.refusal(device, one) for one in site.cluster.nodes} == {REVOKED}
    assert site.refusal(late, node) == ACCEPTED


def test_a_node_that_has_ended_may_have_kept_what_a_device_may_not_read_any_more(site: RabbitmqSite) -> None:
    if len(site.cluster.nodes) == 1:
        pytest.skip("needs several nodes")
    device, node = site.device(), site.cluster.nodes[-1]
    with site.client(device, node) as client:  # whose queue is at this node
        assert client.connect(device.id, clean=False) == 0
        assert client.subscribe(f"devices/{device.id}/news") == 1
    node.kill()
    site.cluster.wait_for(lambda: node.name not in site.cluster.running_at(site.cluster.nodes[0]))
    site.portal.registrations.update(OPERATOR, device.id, {}, [(f"devices/{device.id}/state", "write")])
    assert f"{node.name} does not run" in (enforce(site) or "")
    node.launch()
    node.wait()
    assert enforce(site) is None
    with site.client(device, node) as client:
        assert client.connect(device.id, clean=False) == 0
        assert not client.session_present


def test_a_pass_for_more_than_there_is_time_for_goes_on_in_the_next(
    site: RabbitmqSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, asked = Cluster.see_none, list[str]()
    devices = [site.device() for _ in range(6)]

    def slowly(self: Cluster, identity: str, names: Set[str], deadline: float) -> None:
        if len(asked) >= 4:
            raise BrokerUnavailable("There is no time left.")
        asked.append(identity)
        seen(self, identity, names, deadline)

    monkeypatch.setattr(Cluster, "see_none", slowly)
    for device in devices:
        site.portal.revocations.revoke(OPERATOR, device.id, "key_compromise", waits=False)
    assert enforce(site) == "There is no time left."
    done, asked[:] = {*asked}, []
    assert enforce(site) is None
    assert done | {*asked} >= {device.id for device in devices}
    assert not done & {*asked}


def test_without_any_node_a_revocation_is_pending_and_devices_can_be_registered(site: RabbitmqSite) -> None:
    if len(site.cluster.nodes) > 1:
        pytest.skip("one is enough")
    device, (node,) = site.device(), site.cluster.nodes
    node.kill()
    enforced, problem = revoke(site, device)
    assert not enforced
    assert problem is not None
    new = site.device()
    node.launch()
    node.wait()
    assert enforce(site) is None
    assert site.refusal(device) == REVOKED
    assert site.refusal(new) == ACCEPTED
