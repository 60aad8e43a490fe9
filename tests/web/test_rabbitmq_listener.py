"""The listener for RabbitMQ: who is answered, what each question may cost, and what is answered meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flask import Flask

import db
from app import portal_of
from broker.rabbitmq import followed
from broker.rabbitmq.answers import LATE_SECONDS, Answers
from config import Settings
from core.broker_control import JOURNAL_FILE
from core.errors import DatabaseUnavailable
from core.rabbitmq_nodes import parse_rabbitmq_nodes
from core.setting_values import Address
from core.states import BrokerKind
from operations.own_certificates import OwnCertificates
from operations.wiring import Portal
from pki.csr import new_request, read_csr
from store import brokers
from store.scope import ALL_TENANTS
from tests.support.guarded import guarded_app
from tests.support.harness import Clock
from tests.support.mutual_tls import MutualTlsServer, is_ended, serving
from tests.support.pki import PEM, Authority
from tests.support.ports import free_port
from tests.workflows.test_admission import OPERATOR, request_of
from web import mutual_tls, rabbitmq_listener
from web.rabbitmq_listener import RabbitmqListener
from workflows.probe_identities import ProbeIdentities
from workflows.questioners import Questioners, Standing

NODES = """[
 {"name": "rabbit@a", "mqtt": "a.example.org:8883", "management": "http://127.0.0.1:15672", "folder": "%s"},
 {"name": "rabbit@b", "mqtt": "b.example.org:8883", "management": "http://127.0.0.1:15673", "folder": "%s"}
]"""


class Server(MutualTlsServer[RabbitmqListener]):
    """A running listener, and nodes as its clients."""

    def __init__(self, portal: Portal, folder: Path) -> None:
        self.portal = portal
        self.a, self.b = folder / "a", folder / "b"
        for node in (self.a, self.b):
            node.mkdir()
        of_cluster = {
            "rabbitmq_nodes": parse_rabbitmq_nodes(NODES % (self.a, self.b)),
            "rabbitmq_bind": Address("127.0.0.1", free_port()),
            "rabbitmq_url": "https://127.0.0.1",
        }
        self.settings = portal.settings.model_copy(update=of_cluster)
        with portal.database.snapshot(sees=ALL_TENANTS) as tx:
            [own] = brokers.list_brokers(tx)
        probes = ProbeIdentities(portal.database, "default", portal.clock)
        self.questioners = Questioners(
            self.settings, portal.database, portal.authority, portal.clock, "default", probes, own.id
        )
        self.own = OwnCertificates(
            self.settings,
            portal.database,
            portal.authority,
            portal.broker,
            portal.reconciler,
            portal.clock,
            "default",
            self.questioners,
        )
        self.own.renew()
        super().__init__(RabbitmqListener(self.settings, self.questioners), portal.agents.portal_ca, folder)

    def node(self, folder: Path | None = None) -> ssl.SSLContext:
        """What a node connects with."""
        folder = folder or self.a
        return self.context((folder / "node.pem", folder / "node.key"))

    def ask(self, context: ssl.SSLContext, question: str = "user", **fields: str) -> tuple[int, str]:
        with self.connected(context) as connection:
            return ask(connection, question, **fields)


def ask(connection: http.client.HTTPConnection, question: str = "user", **fields: str) -> tuple[int, str]:
    connection.request("POST", f"/broker/rabbitmq/{question}", urlencode(fields))
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    agents = {"PORTAL_AGENTS_BIND": "127.0.0.1:8444"}
    settings = make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_REQUEST_TIMEOUT="1", **agents)
    with guarded_app(settings, clock, monkeypatch) as built:
        yield built


@pytest.fixture
def server(app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(mutual_tls, "LOOK_SECONDS", 0.05)
    running = Server(portal_of(app), tmp_path)
    with serving(running.listener):
        yield running


@pytest.fixture
def device(server: Server) -> str:
    """A device that the journal allows."""
    registered = server.portal.registrations.register(OPERATOR, request_of(1, csr=False))
    server.portal.reconciler.install()
    return registered.device_id


# --- What is answered ------------------------------------------------------------------------------------------------


def test_a_node_is_answered_about_a_device_until_that_is_revoked(server: Server, device: str) -> None:
    with server.connected(server.node()) as connection:
        assert ask(connection, username=device) == (200, "allow")
        assert ask(connection, username="00000000-0000-7000-8000-000000000000") == (200, "deny")
        assert ask(connection, "vhost", username=device, vhost="/", client_id=device) == (200, "allow")
        own = f"mqtt-subscription-{device}qos0"
        queue = {"vhost": "/", "resource": "queue", "name": own, "permission": "read", "client_id": device}
        assert ask(connection, "resource", username=device, **queue) == (200, "allow")
        topic = {"vhost": "/", "resource": "topic", "name": "amq.topic", "permission": "write"}
        key = {"routing_key": f"devices.{device}.up", "variable_map.client_id": device}
        assert ask(connection, "topic", username=device, **topic, **key) == (200, "allow")
        server.portal.revocations.revoke(OPERATOR, device, "key_compromise")
        assert ask(connection, username=device) == (200, "deny")


def test_a_device_that_gives_a_password_is_denied(server: Server, device: str) -> None:
    assert server.ask(server.node(), username=device, password="") == (200, "deny")


def test_a_connection_is_kept_for_longer_than_its_node_keeps_it(server: Server, device: str) -> None:
    with server.connected(server.node()) as connection:
        assert ask(connection, username=device) == (200, "allow")
        [(kept, until)] = server.listener._open.items()
        assert kept.gettimeout() == rabbitmq_listener.IDLE_SECONDS > 120
        assert until > time.monotonic() + 120


def test_each_node_is_answered(server: Server, device: str) -> None:
    assert server.ask(server.node(server.b), username=device) == (200, "allow")


def test_what_a_probe_asks_for_too_late_is_answered_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    held, allowed = list[float](), [True, True, False]
    monkeypatch.setattr(server.listener.stopping, "wait", held.append)
    monkeypatch.setattr(server.listener, "allows", lambda *_: allowed.pop(0))
    with server.connected(server.node()) as connection:
        assert ask(connection, "topic", routing_key="portal.late.1") == (200, "allow")
        assert ask(connection, "topic", routing_key="portal.until.1") == (200, "allow")
        assert ask(connection, "topic", routing_key="portal.late.1") == (200, "deny")  # of who may not ask that
    assert held == [LATE_SECONDS]


def test_a_long_journal_is_read_beside_the_answers(
    server: Server, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    class Slow(Answers):
        def follow(self, most: int | None = None) -> bool:
            if most is None:
                begun.set()
                assert may_end.wait(10)
            return super().follow(most)

    monkeypatch.setattr(followed, "SHORT_BYTES", 0)
    journal = server.portal.settings.broker_file(JOURNAL_FILE)
    answers = followed.FollowedAnswers(lambda: Slow(journal, "devices"))
    assert not answers.allows("user", {"username": device})  # it is not read yet
    assert begun.wait(10)
    assert not answers.allows("user", {"username": device})
    may_end.set()
    for thread in threading.enumerate():
        if thread.name == "rabbitmq journal":
            thread.join(10)
    assert answers.allows("user", {"username": device})


def test_answers_outlive_the_database(server: Server, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node = server.node()
    assert server.ask(node, username=device) == (200, "allow")
    monkeypatch.setattr(rabbitmq_listener, "SURE_SECONDS", 0.0)

    def away(*_arguments: object) -> str:
        raise DatabaseUnavailable("The database is away.")

    monkeypatch.setattr(Questioners, "node_of", away)
    assert server.ask(node, username=device) == (200, "allow")
    assert server.ask(server.node(server.b), username=device)[0] == 503  # it was not known before


# --- A portal without which changes are enforced ---------------------------------------------------------------------


@pytest.fixture
def another_broker(server: Server) -> str:
    """The name of this portal's own broker, which is not the only one."""
    with server.portal.database.transaction(sees=ALL_TENANTS) as tx:
        [own] = brokers.list_brokers(tx)
        brokers.add_broker(tx, "edge", BrokerKind.AGENT, at=server.portal.clock(), joined=True)
    return own.name


def test_a_portal_that_is_declared_away_answers_no_more_until_it_is_back(
    server: Server, device: str, another_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_listener, "SURE_SECONDS", 0.0)
    with server.connected(server.node()) as connection:
        assert ask(connection, username=device) == (200, "allow")
        server.portal.brokers.declare_away(OPERATOR, another_broker, "its machine is lost")
        status, said = ask(connection, username=device)
        assert (status, "portal broker back" in said) == (409, True)
    server.portal.brokers.declare_back(OPERATOR, another_broker)
    assert server.ask(server.node(), username=device) == (200, "allow")


@pytest.mark.parametrize("is_alone", [True, False])
def test_without_the_database_a_portal_that_may_have_been_declared_away_refuses_sooner(
    server: Server, device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, is_alone: bool
) -> None:
    if not is_alone:
        request.getfixturevalue("another_broker")
    node = server.node()
    assert server.ask(node, username=device) == (200, "allow")
    monkeypatch.setattr(rabbitmq_listener, "SURE_SECONDS", 0.0)
    monkeypatch.setattr(rabbitmq_listener, "UNSURE_OF_SEVERAL_SECONDS", 0.0)

    def away(*_arguments: object) -> Standing:
        raise DatabaseUnavailable("The database is away.")

    monkeypatch.setattr(Questioners, "standing", away)
    assert server.ask(node, username=device)[0] == (200 if is_alone else 503)


def test_a_portal_that_was_removed_answers_no_more(
    server: Server, device: str, another_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_listener, "SURE_SECONDS", 0.0)
    with server.portal.database.transaction(sees=ALL_TENANTS) as tx:
        brokers.remove_broker(tx, brokers.get_broker(tx, another_broker), at=server.portal.clock())
    assert server.ask(server.node(), username=device)[0] == 409


def test_by_a_journal_that_lacks_what_was_enforced_everybody_is_denied(
    server: Server, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a folder was restored from a snapshot, or while a portal that was away catches up."""
    monkeypatch.setattr(rabbitmq_listener, "SURE_SECONDS", 0.0)
    node = server.node()
    assert server.ask(node, username=device) == (200, "allow")
    with server.portal.database.transaction(sees=ALL_TENANTS) as tx:  # the journal is not written
        [own] = brokers.list_brokers(tx)
        newest = db.next_generation(tx, at=server.portal.clock())
        brokers.set_applied_generation(tx, own.id, newest, applied_at=server.portal.clock())
    assert server.ask(node, username=device) == (200, "deny")


# --- Who is let in ---------------------------------------------------------------------------------------------------


def test_who_shows_no_certificate_is_refused_by_tls(server: Server) -> None:
    assert server.refuses(server.context())


def test_a_certificate_of_another_ca_is_refused_by_tls(server: Server) -> None:
    other = Authority("Other").issue("rabbitmq+rabbit@a")
    assert server.refuses(server.client(other.key, other.certificate.public_bytes(PEM).decode()))


def refused(server: Server, context: ssl.SSLContext) -> str:
    """The sentence in which a client is refused that TLS has let in."""
    status, said = server.ask(context, username="x")
    assert status == 403
    return said


def test_the_certificate_of_a_device_is_refused(server: Server) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = dataclasses.replace(request_of(2, csr=True), csr=read_csr(new_request(key)))
    registered = server.portal.registrations.register(OPERATOR, request)
    assert "PORTAL_RABBITMQ_NODES" in refused(server, server.client(key, registered.certificate or ""))


def test_the_certificate_of_an_agent_is_refused(server: Server) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    added = server.portal.agents.add(OPERATOR, "edge", "edge.example.org")
    chain = server.portal.agents.join(added.code, new_request(key)).chain
    assert "PORTAL_RABBITMQ_NODES" in refused(server, server.client(key, chain))


def test_the_certificates_of_servers_are_refused_by_tls(server: Server) -> None:
    tls = server.settings.tls_dir
    assert server.refuses(server.context((tls / "rabbitmq.pem", tls / "rabbitmq.key")))


def test_a_revoked_certificate_of_a_node_is_refused_on_open_connections_too(
    server: Server, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_listener, "SURE_SECONDS", 0.0)
    stolen = server.node()
    with server.connected(stolen) as connection:
        assert ask(connection, username=device) == (200, "allow")
        assert server.questioners.revoke(OPERATOR, "rabbit@a") == 1
        assert ask(connection, username=device)[0] == 403
    assert "revoked" in refused(server, stolen)
    assert server.ask(server.node(server.b), username=device) == (200, "allow")
    assert server.own.renew() == ["certificate of rabbit@a"]
    assert server.ask(server.node(), username=device) == (200, "allow")


def test_a_certificate_counts_until_it_has_expired_whatever_was_issued_since(
    server: Server, device: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_listener, "SURE_SECONDS", 0.0)
    before = server.node()
    with server.connected(before) as connection:
        assert ask(connection, username=device) == (200, "allow")
        server.questioners.issue("rabbit@a")
        assert ask(connection, username=device) == (200, "allow")
        clock.advance(days=91)
        assert ask(connection, username=device)[0] == 403


# --- What it may cost ------------------------------------------------------------------------------------------------


def test_who_does_not_begin_a_handshake_is_ended(server: Server) -> None:
    with socket.create_connection(server.address, 30) as silent:
        assert is_ended(silent)


def test_a_device_that_sends_nothing_is_ended(server: Server) -> None:
    probes = server.settings.data_dir / "canaries"
    with server.tls(server.context((probes / "good.pem", probes / "good.key"))) as silent:
        assert is_ended(silent)


def test_a_question_that_arrives_slowly_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq_listener, "ANSWER_SECONDS", 1.0)
    with server.tls(server.node()) as slow:
        slow.sendall(b"POST /broker/rabbitmq/user HTTP/1.1\r\nContent-Length: 20\r\n\r\nusername=")
        assert is_ended(slow)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Length: 524289\r\n\r\n", b"413"),
        (b"Content-Length: -1\r\n\r\n", b"400"),
        (b"Content-Length: 5\r\nContent-Length: 50\r\n\r\na=b&c", b"400"),
        (b"Content-Length : 3\r\n\r\na=b", b"400"),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\na=b", b"400"),
        (b"\r\n", b"400"),
        (b"X: " + b"x" * 70000 + b"\r\n\r\n", b"431"),
        (b"".join(b"X-%d: x\r\n" % number for number in range(200)) + b"\r\n", b"431"),
    ],
)
def test_what_is_no_form_is_refused_and_ends_the_connection(server: Server, head: bytes, status: bytes) -> None:
    smuggled = b"POST /broker/rabbitmq/user HTTP/1.1\r\nContent-Length: 10\r\n\r\nusername=x"
    with server.tls(server.node()) as client:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            client.sendall(b"POST /broker/rabbitmq/user HTTP/1.1\r\nHost: x\r\n" + head + smuggled)
        answered = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while part := client.recv(4096):
                answered += part
    assert answered[9:12] == status
    assert answered.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "body",
    [
        b"%zz",
        b"username=a&username=b",
        b"username=a&client_id=%ff%fe",
        b"username=" + b"a" * 4096,
        b"client_id=" + b"%41" * 65535 + b"&routing_key=" + b"%41" * 65535,  # the longest
    ],
    ids=["no form", "a field twice", "no UTF-8", "too long", "the longest"],
)
def test_a_client_with_an_odd_name_is_denied_and_takes_no_connection_from_its_node(
    server: Server, device: str, body: bytes
) -> None:
    with server.connected(server.node()) as connection:
        for question in ("user", "vhost", "topic"):
            connection.request("POST", f"/broker/rabbitmq/{question}", body)
            answer = connection.getresponse()
            assert (answer.status, answer.read(), answer.will_close) == (200, b"deny", False)
        assert ask(connection, username=device) == (200, "allow")


@pytest.mark.parametrize(
    "line",
    [
        b"GET /broker/rabbitmq/user?username=x",
        b"POST /broker/rabbitmq/users",
        b"POST /broker/rabbitmq/",
        b"POST /broker/rabbitmq/user?username=x",
        b"POST user",
        b"POST /devices",
    ],
)
def test_another_question_is_not_answered(server: Server, line: bytes) -> None:
    with server.tls(server.node()) as client:
        client.sendall(line + b" HTTP/1.1\r\nContent-Length: 10\r\n\r\nusername=x")
        assert client.recv(12) == b"HTTP/1.1 404"


def test_questions_that_come_at_once_are_answered_in_their_order(server: Server, device: str) -> None:
    def question(username: str) -> bytes:
        body = b"username=" + username.encode()
        return b"POST /broker/rabbitmq/user HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    answered = b""
    with server.tls(server.node()) as client:
        client.sendall(question(device) + question("x") + question(device))
        while answered.count(b"\r\n\r\n") < 3 or not answered.endswith(b"allow"):
            answered += client.recv(4096)
    assert [part[:5].rstrip(b"H") for part in answered.split(b"\r\n\r\n")[1:]] == [b"allow", b"deny", b"allow"]


def test_no_password_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    assert server.ask(server.node(), username="x", password="secret-of-x") == (200, "deny")
    assert server.ask(server.node(), "other", username="x", password="secret-of-x")[0] == 404
    assert "secret-of-x" not in caplog.text


def test_a_node_has_so_many_connections(server: Server, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq_listener, "MAX_OF_NODE", 1)
    with server.connected(server.node()) as connection:
        assert ask(connection, username=device) == (200, "allow")
        assert server.refuses(server.node())
        assert server.ask(server.node(server.b), username=device) == (200, "allow")
        assert ask(connection, username=device) == (200, "allow")


def test_others_keep_no_node_out(server: Server, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual_tls, "MAX_UNKNOWN", 2)
    monkeypatch.setattr(mutual_tls, "MAX_UNKNOWN_OF_ADDRESS", 2)
    node, elsewhere = server.node(), ("127.0.0.2", 0)
    assert server.ask(node, username=device) == (200, "allow")  # from 127.0.0.1
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(server.address, 30, elsewhere)) for _ in range(3)]
        assert is_ended(silent[2])  # at once
        assert server.ask(node, username=device) == (200, "allow")


def test_a_node_that_was_not_seen_yet_is_let_in_though_others_hold_all_connections(
    server: Server, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutual_tls, "MAX_UNKNOWN", 2)
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(server.address, 30, (f"127.0.0.{host}", 0))) for host in (2, 3)
        ]
        assert server.ask(server.node(), username=device) == (200, "allow")
        assert is_ended(silent[0])


def test_a_node_makes_many_connections_at_once(server: Server, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual_tls, "MAX_UNKNOWN", 1)
    monkeypatch.setattr(mutual_tls, "MAX_UNKNOWN_OF_ADDRESS", 1)
    node = server.node()
    assert server.ask(node, username=device) == (200, "allow")  # so that its address is known
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # whose handshakes are under way
            stack.enter_context(socket.create_connection(server.address, 30))
        assert server.ask(node, username=device) == (200, "allow")
