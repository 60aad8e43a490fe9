"""Tenants on a real RabbitMQ: a vhost for each, by a listener of its own, and nothing of one reaches another's."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.guard import journal
from broker.guard.journal import NewJournal
from broker.rabbitmq.answers import Answers
from broker.rabbitmq.management import Management
from broker.rabbitmq.vhosts import Vhosts
from core.errors import GuardNeeded
from core.rabbitmq_nodes import RabbitmqNode
from core.setting_values import Address
from core.topics import Access
from operations.doctor.doctor import examine
from operations.wiring import utc_now
from store.scope import ALL_TENANTS
from store.tables import Tenant
from tests.support.mqtt import MqttClient, connect_tls, tls_context
from tests.support.pki import Credentials, Pki
from tests.support.rabbitmq import USER, Node, RabbitmqCluster, is_installed
from tests.support.rabbitmq_site import OPERATOR, RabbitmqSite
from tests.system.test_rabbitmq_nodes import Backend, Installation
from workflows.tenant_life import NewTenant

pytestmark = [
    pytest.mark.system,
    pytest.mark.long,
    pytest.mark.skipif(not is_installed(), reason="rabbitmq-server is not installed"),
]
TENANTS = "acme", "beta"
LONG = timedelta(days=99)


@dataclass
class Tenants:
    """A node with two further tenants, and where clients of each connect; the first one is the empty name."""

    installation: Installation
    node: Node
    vhosts: Vhosts

    def port(self, tenant: str) -> int:
        return dict(zip(TENANTS, self.node.tenant_ports, strict=True)).get(tenant, self.node.mqtt_port)

    def device(self, tenant: str) -> tuple[str, Credentials]:
        identity, credentials = self.installation.device()
        if tenant:
            self.installation.tell(journal.allow_line(identity, tenant=tenant))
        return identity, credentials

    def client(self, identity: str, credentials: Credentials, port: int) -> MqttClient:
        folder = self.installation.folder
        context = tls_context(folder / "ca.pem", *credentials.write(folder, identity))
        return MqttClient(connect_tls(port, context), 4)


def soon() -> float:
    return time.monotonic() + 10


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("rabbitmq")
    with NewJournal(folder / "journal", 1, mode=0o640, group=None) as writer:
        for tenant in TENANTS:
            writer.add(journal.tenant_line(tenant, f"{tenant}/devices"))
        writer.commit(1)
    with contextlib.ExitStack() as stack:
        backend = Backend(folder, Answers(folder / "journal", "devices"))
        stack.callback(backend.close)
        cluster = RabbitmqCluster(backend.url, tenants=len(TENANTS))
        installation, [node] = Installation(cluster, backend, Pki(), folder / "journal", folder), cluster.nodes
        (folder / "ca.pem").write_bytes(installation.pki.ca_bundle)
        installation.prepare(node)
        installation.revoke()
        stack.enter_context(cluster)
        named = RabbitmqNode(node.name, Address("127.0.0.1", node.mqtt_port), node.management_url, None)
        management = Management(named, USER, cluster.password)
        stack.callback(management.close)
        vhosts = Vhosts(lambda: [management], USER, dict(zip(TENANTS, node.tenant_ports, strict=True)))
        for tenant in TENANTS:
            vhosts.make(tenant, soon())
        assert not vhosts.problems(soon(), TENANTS)
        yield Tenants(installation, node, vhosts)


@pytest.mark.parametrize("tenant", ["", "acme", "beta"])
def test_a_device_uses_its_topics_at_the_listener_of_its_tenant_alone(tenants: Tenants, tenant: str) -> None:
    identity, credentials = tenants.device(tenant)
    topic = f"{tenant}/devices/{identity}/a".removeprefix("/")
    for port_of in ("", *TENANTS):
        with tenants.client(identity, credentials, tenants.port(port_of)) as client:
            if port_of != tenant:
                assert client.connect(identity) != 0
                continue
            assert client.connect(identity) == 0
            assert client.subscribe(topic) == 1
            client.publish(topic, b"on")
            assert client.receive().payload == b"on"


def test_what_one_tenant_publishes_reaches_nobody_elsewhere_whatever_they_were_granted(tenants: Tenants) -> None:
    """Even a filter that covers all, which the portal grants to nobody of a tenant."""
    sender, of_sender = tenants.device("acme")
    watcher, of_watcher = tenants.device("")
    tenants.installation.tell(journal.allow_line(watcher, [("#", Access.READ)]))
    with (
        tenants.client(watcher, of_watcher, tenants.port("")) as watching,
        tenants.client(sender, of_sender, tenants.port("acme")) as sending,
    ):
        assert watching.connect(watcher) == 0
        assert watching.subscribe("#") == 1
        assert sending.connect(sender) == 0
        sending.publish(f"acme/devices/{sender}/a", b"secret")  # acknowledged
        watching.ping()
        assert not watching.messages


def test_a_client_chooses_no_vhost_by_its_name(tenants: Tenants) -> None:
    identity, credentials = tenants.device("beta")
    for name in (f"acme:{identity}", f"beta:{identity}", f"/:{identity}"):
        with tenants.client(identity, credentials, tenants.port("")) as client:
            assert client.connect(identity, username=name, password="") != 0


def test_of_a_suspended_tenant_nobody_connects(tenants: Tenants) -> None:
    identity, credentials = tenants.device("beta")
    tenants.installation.tell(journal.suspend_line("beta"))
    with tenants.client(identity, credentials, tenants.port("beta")) as client:
        assert client.connect(identity) != 0
    tenants.installation.tell(journal.tenant_line("beta", "beta/devices"))
    with tenants.client(identity, credentials, tenants.port("beta")) as client:
        assert client.connect(identity) == 0


def test_the_vhost_of_a_removed_tenant_ends_its_sessions_and_keeps_its_devices_out(tenants: Tenants) -> None:
    identity, credentials = tenants.device("beta")
    with tenants.client(identity, credentials, tenants.port("beta")) as client:
        assert client.connect(identity) == 0
        tenants.vhosts.remove("beta", soon())
        client.wait_until_cut()
    with tenants.client(identity, credentials, tenants.port("beta")) as client:
        assert client.connect(identity) != 0  # it would be in the vhost of the first tenant
    tenants.vhosts.make("beta", soon())
    with tenants.client(identity, credentials, tenants.port("beta")) as client:
        assert client.connect(identity) == 0


# --- With a portal ---------------------------------------------------------------------------------------------------


def test_a_tenant_of_a_portal_gets_a_vhost_and_loses_it_with_all_that_is_in_it() -> None:
    with RabbitmqSite(tenants=["acme"], PORTAL_ENFORCE_TIMEOUT="20") as site:
        portal, node = site.portal, site.cluster.nodes[0]
        with pytest.raises(GuardNeeded, match=r'PORTAL_RABBITMQ_TENANT_PORTS, such as \{"other": 8884\}'):
            portal.tenants.add(OPERATOR, NewTenant("other"))
        assert portal.tenants.add(OPERATOR, NewTenant("acme")).state.enforced
        admin = dataclasses.replace(OPERATOR, tenant_id="acme")
        ours, theirs = site.device(), site.device(actor=admin)
        for device, tenant, other in ((ours, "", "acme"), (theirs, "acme", "")):
            assert site.refusal(device, tenant=tenant) == "return code 0"
            assert site.refusal(device, tenant=other) != "return code 0"
        with site.client(theirs, tenant="acme") as client:
            assert client.connect(theirs.id, clean=False) == 0
            assert client.subscribe(f"acme/{theirs.id}/#") == 1
            assert node.get("/api/queues/acme")
            done = portal.revocations.revoke(admin, theirs.id, "key_compromise")
            assert (done.enforced, done.problem) == (True, None)
            client.wait_until_cut()
        assert node.get("/api/queues/acme") == []
        portal.tenant_removals.remove(OPERATOR, "acme", "acme")
        with portal.database.transaction(sees=ALL_TENANTS) as tx:  # long ago, so that its rows are deleted now
            tx.execute(sa.update(Tenant).where(Tenant.id == "acme").values(changed_at=utc_now() - LONG))
        portal.tenant_removals.run()
        assert node.get("/api/vhosts/acme") is None
        assert site.refusal(ours) == "return code 0"
        assert [check.problem for check in portal.readiness.brokers()] == [None]
        assert [
            finding for finding in examine(site.settings, utc_now) if "RabbitMQ" in finding.name and finding.advice
        ] == []
        node.stop()
        [check] = portal.readiness.brokers()
        assert check.problem == f"Nobody can connect to the node {node.name}; start it."
        [up] = [gauge for gauge in portal.monitoring.gauges() if gauge.name == "portal_broker_node_up"]
        assert up.samples == [([node.name], 0.0)]
