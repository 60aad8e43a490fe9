"""A real RabbitMQ, configured as rabbitmq/ has it, that asks about its clients and is given CRLs.

The answers are those of ``broker.rabbitmq.answers`` from a journal.
"""

from __future__ import annotations

import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from broker.capath import name_hash
from broker.guard import journal
from broker.guard.journal import JournalAppend, NewJournal, read_position
from broker.rabbitmq.answers import Answers, read_form
from core.topics import Access
from tests.support.mqtt import MqttClient, Will, connect_tls, tls_context
from tests.support.pki import PEM, Authority, Credentials, Pki
from tests.support.ports import free_port
from tests.support.rabbitmq import Node, RabbitmqCluster, is_installed

pytestmark = [
    pytest.mark.system,
    pytest.mark.long,
    pytest.mark.skipif(not is_installed(), reason="rabbitmq-server is not installed"),
]
CACHED_SECONDS = 1.0  # auth_cache.cache_ttl in rabbitmq/rabbitmq.conf


class Backend:
    """Answers over mutual TLS, to the nodes alone."""

    def __init__(self, folder: Path, answers: Answers) -> None:
        self.authority = Authority("Answers")
        self.is_silent = False  # whether it closes each connection in place of an answer
        lock, backend = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                form = read_form(self.rfile.read(int(self.headers["Content-Length"])))
                if backend.is_silent:
                    self.close_connection = True
                    return
                with lock:
                    allowed = form is not None and answers.allows(self.path.rpartition("/")[2], form)
                answer = b"allow" if allowed else b"deny"
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_arguments: object) -> None:
                pass

        own = self.authority.issue("portal", server_names=["localhost"]).write(folder, "answers")
        ca = folder / "answers-ca.pem"
        ca.write_bytes(self.authority.certificate.public_bytes(PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*own)
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
        self._server = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class Installation:
    cluster: RabbitmqCluster
    backend: Backend
    pki: Pki
    journal: Path
    folder: Path

    def tell(self, *lines: str) -> None:
        position = read_position(self.journal)
        writer = JournalAppend(self.journal, position)
        for line in lines:
            writer.add(line)
        writer.commit(position.generation + 1)

    def device(self) -> tuple[str, Credentials]:
        """A device that is admitted."""
        identity = str(uuid.uuid4())
        self.tell(journal.allow_line(identity))
        return identity, self.pki.issuing.issue(identity)

    def revoke(self, *credentials: Credentials) -> None:
        """Write a CRL of all that are revoked for each node."""
        crl = self.pki.issuing.crl(*credentials)
        name = name_hash(self.pki.issuing.certificate.subject) + ".r0"
        for node in self.cluster.nodes:
            written = node.portal_folder / "crls" / f"{name}.new"
            written.write_bytes(crl)
            written.rename(written.with_name(name))

    def prepare(self, node: Node) -> None:
        """Write what the node is configured to read."""
        folder = node.portal_folder
        (folder / "crls").mkdir()
        (folder / "ca.pem").write_bytes(self.pki.ca_bundle)
        (folder / "portal-ca.pem").write_bytes(self.backend.authority.certificate.public_bytes(PEM))
        self.backend.authority.issue("node").write(folder, "node")
        certificate, _ = self.pki.issuing.issue("broker", server_names=["localhost"]).write(folder, "server")
        certificate.write_bytes(certificate.read_bytes() + self.pki.issuing.certificate.public_bytes(PEM))

    def client(self, node: Node, credentials: Credentials) -> MqttClient:
        """A client that has done its handshake; RabbitMQ 3.10 speaks MQTT 3.1.1."""
        context = tls_context(self.folder / "ca.pem", *credentials.write(self.folder, uuid.uuid4().hex))
        return MqttClient(connect_tls(node.mqtt_port, context), 4)

    def refusal(self, node: Node, identity: str, credentials: Credentials) -> str:
        """Connect a client that is refused; return why."""
        try:
            with self.client(node, credentials) as client:
                return f"return code {client.connect(identity)}"
        except ssl.SSLError as error:
            return error.reason or ""


@pytest.fixture(scope="module", params=[1, 3], ids=["one node", "three nodes"])
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("rabbitmq")
    with NewJournal(folder / "journal", 1, mode=0o640, group=None) as writer:
        writer.commit(1)
    backend = Backend(folder, Answers(folder / "journal", "devices"))
    try:
        cluster = RabbitmqCluster(backend.url, request.param)
        made = Installation(cluster, backend, Pki(), folder / "journal", folder)
        (folder / "ca.pem").write_bytes(made.pki.ca_bundle)
        for node in cluster.nodes:
            made.prepare(node)
        made.revoke()
        with cluster:
            yield made
    finally:
        backend.close()


def test_a_device_uses_its_own_topics_and_is_cut_off_at_another(installation: Installation) -> None:
    identity, credentials = installation.device()
    node = installation.cluster.nodes[0]
    with installation.client(node, credentials) as client:
        assert client.connect(identity) == 0
        assert client.subscribe(f"devices/{identity}/+/state") == 1
        client.publish(f"devices/{identity}/a/state", b"on")
        assert client.receive().payload == b"on"
        with pytest.raises(ConnectionError):
            client.publish("devices/another/state")
    with installation.client(node, credentials) as client:
        assert client.connect(identity) == 0
        with suppress(ConnectionError):  # 3.10 ends it, 4.3 answers
            assert client.subscribe("devices/#") == 0x80


def test_nobody_takes_the_name_or_the_session_of_another(installation: Installation) -> None:
    node = installation.cluster.nodes[0]
    identity, credentials = installation.device()
    _, of_other = installation.device()
    with installation.client(node, credentials) as client:
        assert client.connect(identity) == 0
        for password in (None, "", "x", "none"):
            with installation.client(node, of_other) as other:
                assert other.connect(identity, username=identity, password=password) != 0
        with installation.client(node, of_other) as other:
            assert other.connect(identity) != 0
        client.ping()


def test_a_denied_device_publishes_on_until_it_is_cut_which_publishes_no_will(installation: Installation) -> None:
    identity, credentials = installation.device()
    watcher, of_watcher = installation.device()
    first, last = installation.cluster.nodes[0], installation.cluster.nodes[-1]
    installation.tell(journal.allow_line(watcher, [("devices/#", Access.READ)]))
    with installation.client(last, of_watcher) as watching, installation.client(first, credentials) as client:
        assert watching.connect(watcher) == 0
        assert watching.subscribe("devices/#") == 1
        assert client.connect(identity, will=Will(f"devices/{identity}/gone", b"will")) == 0
        client.publish(f"devices/{identity}/a", b"before")
        assert watching.receive().payload == b"before"
        installation.tell(journal.deny_line(identity))
        until = time.monotonic() + 2 * CACHED_SECONDS
        while time.monotonic() < until:  # one that pauses is asked about again
            client.publish(f"devices/{identity}/a", b"after")
            assert watching.receive().payload == b"after"
        last.ask("DELETE", f"/api/connections/username/{identity}")
        client.wait_until_cut()
        watching.ping()
        assert not watching.messages
        for node in installation.cluster.nodes:
            assert node.get(f"/api/connections/username/{identity}") == []
            assert installation.refusal(node, identity, credentials) == "return code 4"


def test_a_crl_counts_at_every_node_from_the_next_handshake_on(installation: Installation) -> None:
    identity, credentials = installation.device()
    for node in installation.cluster.nodes:
        with installation.client(node, credentials) as client:
            assert client.connect(identity) == 0
    installation.revoke(credentials)
    for node in installation.cluster.nodes:
        assert installation.refusal(node, identity, credentials) == "SSLV3_ALERT_CERTIFICATE_REVOKED"
    installation.revoke()
    for node in installation.cluster.nodes:
        assert installation.refusal(node, identity, credentials) == "return code 0"


def test_without_a_crl_nobody_connects(installation: Installation) -> None:
    identity, credentials = installation.device()
    node = installation.cluster.nodes[0]
    (crl,) = (node.portal_folder / "crls").iterdir()
    content = crl.read_bytes()
    try:
        for damaged in (b"", content[:100], b"no CRL"):
            crl.write_bytes(damaged)
            assert "ALERT" in installation.refusal(node, identity, credentials)
        crl.unlink()
        assert "ALERT" in installation.refusal(node, identity, credentials)
    finally:
        crl.write_bytes(content)


def test_a_tls_session_is_not_resumed(installation: Installation) -> None:
    identity, credentials = installation.device()
    node = installation.cluster.nodes[0]
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        files = credentials.write(installation.folder, f"{identity}-{version}")
        context = tls_context(installation.folder / "ca.pem", *files)
        context.minimum_version = context.maximum_version = version
        with MqttClient(connect_tls(node.mqtt_port, context), 4) as client:
            assert client.connect(identity) == 0
            session = client.socket.session  # type: ignore[attr-defined]
        with connect_tls(node.mqtt_port, context, session) as again:
            assert not again.session_reused


@pytest.mark.parametrize("by", ["a missing journal", "no answer"])
def test_new_clients_are_refused_while_nobody_answers(installation: Installation, by: str) -> None:
    identity, credentials = installation.device()
    node = installation.cluster.nodes[-1]
    away = installation.journal.with_name("away")
    assert installation.refusal(node, identity, credentials) == "return code 0"
    if by == "no answer":
        installation.backend.is_silent = True
    else:
        installation.journal.rename(away)
    try:
        time.sleep(1.5 * CACHED_SECONDS)  # as above
        assert installation.refusal(node, identity, credentials) == "return code 4"
    finally:
        installation.backend.is_silent = False
        if away.exists():
            away.rename(installation.journal)
    assert installation.refusal(node, identity, credentials) == "return code 0"


def test_a_sleeping_session_gets_what_its_device_may_not_read_any_more_until_its_queue_is_deleted(
    installation: Installation,
) -> None:
    identity, credentials = installation.device()
    sender, of_sender = installation.device()
    topic = f"devices/{sender}/news"
    node = installation.cluster.nodes[0]
    installation.tell(journal.allow_line(identity, [(topic, Access.READ)]))
    with installation.client(node, credentials) as client:
        assert client.connect(identity, clean=False) == 0
        assert client.subscribe(topic) == 1
    installation.tell(journal.allow_line(identity))
    with installation.client(node, of_sender) as sending:
        assert sending.connect(sender) == 0
        sending.publish(topic, b"secret")
    with installation.client(node, credentials) as client:
        assert client.connect(identity, clean=False) == 0
        assert client.receive().payload == b"secret"
    node.ask("DELETE", f"/api/queues/%2F/mqtt-subscription-{identity}qos1")
    with installation.client(node, credentials) as client:
        assert client.connect(identity, clean=False) == 0
        assert not client.session_present


def test_a_retained_message_outlives_its_device_where_it_was_taken_until_it_is_cleared_there(
    installation: Installation,
) -> None:
    identity, credentials = installation.device()
    other, of_other = installation.device()
    topic, first = f"devices/{identity}/state", installation.cluster.nodes[0]
    with installation.client(first, credentials) as client:
        assert client.connect(identity) == 0
        client.publish(topic, b"kept", retain=True)
    installation.tell(journal.deny_line(identity), journal.allow_line(other, [("devices/#", Access.READWRITE)]))
    first.ask("DELETE", f"/api/connections/username/{identity}")

    def retained(node: Node, asked: str) -> list[bytes]:
        with installation.client(node, of_other) as client:
            assert client.connect(other) == 0
            assert client.subscribe(asked) == 1
            client.ping()
            return [message.payload for message in client.messages]

    assert retained(first, topic) == [b"kept"]
    assert retained(first, f"devices/{identity}/+") == []  # 3.10 looks for the topic that is named
    for node in installation.cluster.nodes[1:]:
        assert retained(node, topic) == []
    with installation.client(first, of_other) as client:
        assert client.connect(other) == 0
        client.publish(topic, b"", retain=True)
    assert retained(first, topic) == []


def test_the_session_of_a_client_that_is_away_ends_after_a_day(installation: Installation) -> None:
    identity, credentials = installation.device()
    node = installation.cluster.nodes[0]
    with installation.client(node, credentials) as client:
        assert client.connect(identity, clean=False) == 0
        assert client.subscribe(f"devices/{identity}/news") == 1
    queue = node.get(f"/api/queues/%2F/mqtt-subscription-{identity}qos1")
    assert queue["arguments"]["x-expires"] == 24 * 60 * 60 * 1000
