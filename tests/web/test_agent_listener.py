"""The listener for agents: who is let in, what each request may cost, and what is given and believed."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flask import Flask

from app import portal_of
from broker.guard.feed import PageReader, ReadPage, split_lines
from config import Settings
from core.states import PresenceState
from operations.wiring import Portal
from pki.csr import new_request
from store import brokers
from store.presences import presence_of
from store.scope import ALL_TENANTS
from tests.support.guarded import guarded_app
from tests.support.harness import ON_SQLITE, Clock
from tests.support.mutual_tls import MutualTlsServer, is_ended, is_ended_while_it_sends, serving
from tests.support.pki import PEM, Authority
from tests.support.ports import free_port
from tests.workflows.agents.test_agents import der
from tests.workflows.test_admission import OPERATOR, request_of
from web import agent_listener, mutual_tls
from web.agent_listener import AgentListener
from workflows.agents import feed
from workflows.agents.agents import AgentCertificate


class Agent(NamedTuple):
    """An agent that has joined: what it connects with, and its certificate (DER)."""

    context: ssl.SSLContext
    certificate: bytes


class Server(MutualTlsServer[AgentListener]):
    """A running listener, and agents as its clients."""

    def __init__(self, portal: Portal, folder: Path) -> None:
        self.portal = portal
        super().__init__(AgentListener(portal), portal.agents.portal_ca, folder)

    def agent(self, name: str = "edge") -> Agent:
        """An agent that has joined."""
        key = new_key()
        added = self.portal.agents.add(OPERATOR, name, "edge.example.org")
        chain = self.portal.agents.join(added.code, new_request(key)).chain
        return Agent(self.client(key, chain), der(chain))

    def certified(self, agent: Agent, kind: AgentCertificate) -> ssl.SSLContext:
        """What a client connects with that has a certificate of another kind."""
        key = new_key()
        record = self.portal.agents.shown(agent.certificate)
        chains = self.portal.agents.certify(record, {kind: new_request(key)}).chains
        return self.client(key, chains[kind])

    def ask(self, context: ssl.SSLContext, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        with self.connected(context) as connection:
            return ask(connection, method, path, body)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    content = answer.read()
    return answer.status, json.loads(content) if "json" in answer.headers["Content-Type"] else content


def page_of(content: bytes) -> ReadPage:
    reader = PageReader()
    for line in split_lines([content]):
        reader.read(line)
    assert reader.page is not None
    return reader.page


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    settings = make_settings(
        PORTAL_BROKER_CONTROL="guard", PORTAL_AGENTS_BIND=f"127.0.0.1:{free_port()}", PORTAL_REQUEST_TIMEOUT="1"
    )
    with guarded_app(settings, clock, monkeypatch) as built:
        yield built


@pytest.fixture
def server(app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(mutual_tls, "LOOK_SECONDS", 0.05)
    running = Server(portal_of(app), tmp_path)
    with serving(running.listener):
        yield running


CHANGES, REPORT = "/broker-agents/changes", "/broker-agents/report"


# --- Who is let in ---------------------------------------------------------------------------------------------------


def test_an_agent_is_answered(server: Server) -> None:
    status, content = server.ask(server.agent().context, "GET", CHANGES)
    assert status == 200
    assert page_of(content).since == 0


def test_runs_of_an_agent_are_told_apart_and_two_that_go_on_are_refused(server: Server) -> None:
    agent, runs = server.agent(), ("1" * 32, "2" * 32)
    with server.connected(agent.context) as connection:
        assert ask(connection, "GET", f"{CHANGES}?run=x")[0] == 422
        assert ask(connection, "POST", REPORT, {"generation": 0, "digest": "", "problem": "x", "run": 1})[0] == 422
        answers = [ask(connection, "GET", f"{CHANGES}?run={run}")[0] for run in (*runs, runs[0], runs[0], runs[0])]
        assert answers == [200, 200, 409, 409, 200]
        told = {"session": "0" * 32, "number": 1, "at": 0, "part": None, "known": True}
        for path, body in ((REPORT, {"generation": 0, "digest": "", "problem": "x", "run": runs[1]}), (PRESENCE, told)):
            status, problem = ask(connection, "POST", path, body)
            assert (status, "Two agents" in problem["detail"]) == (409, True)


def test_who_shows_no_certificate_is_refused_by_tls(server: Server) -> None:
    assert server.refuses(server.context())


def test_a_certificate_of_another_ca_is_refused_by_tls(server: Server) -> None:
    other = Authority("Other").issue("agent+edge")
    assert server.refuses(server.client(other.key, other.certificate.public_bytes(PEM).decode()))


def test_the_certificate_of_a_broker_is_refused_by_tls(server: Server) -> None:
    assert server.refuses(server.certified(server.agent(), AgentCertificate.SERVER))


def test_a_certificate_like_that_of_a_device_is_refused(server: Server) -> None:
    context = server.certified(server.agent(), AgentCertificate.GOOD)  # named by a UUID, and of the same CA
    status, problem = server.ask(context, "GET", CHANGES)
    assert (status, problem["code"]) == (403, "client_certificate_refused")


def test_a_removed_agent_is_refused_with_its_next_request(server: Server) -> None:
    with server.connected(server.agent().context) as connection:
        assert ask(connection, "GET", CHANGES)[0] == 200
        with server.portal.database.transaction(sees=ALL_TENANTS) as tx:
            brokers.remove_broker(tx, brokers.get_broker(tx, "edge"), at=server.portal.clock())
        status, problem = ask(connection, "GET", CHANGES)
        assert (status, problem["code"]) == (403, "client_certificate_refused")


def test_an_agent_that_was_removed_while_it_waited_is_given_nothing(server: Server) -> None:
    agent, answers = server.agent(), list[tuple[int, Any]]()
    page = page_of(server.ask(agent.context, "GET", CHANGES)[1])
    names = server.portal.agent_feed.names()
    path = f"{CHANGES}?since={page.mark.generation}&digest={page.mark.digest}&cas={names.cas}&crls={names.crls}&wait=30"
    waiting = threading.Thread(target=lambda: answers.append(server.ask(agent.context, "GET", path)))
    waiting.start()
    with server.portal.database.transaction(sees=ALL_TENANTS) as tx:
        brokers.remove_broker(tx, brokers.get_broker(tx, "edge"), at=server.portal.clock())
    server.portal.registrations.register(OPERATOR, request_of(1, csr=False))
    waiting.join(20)
    assert [status for status, _ in answers] == [403]


# --- What it is given, and what is believed ---------------------------------------------------------------------------


def test_a_report_of_the_page_that_was_given_is_believed(server: Server) -> None:
    with server.connected(server.agent().context) as connection:
        mark = page_of(ask(connection, "GET", CHANGES)[1]).mark
        assert ask(connection, "POST", REPORT, {"generation": mark.generation, "digest": mark.digest})[0] == 200
    with server.portal.database.snapshot(sees=ALL_TENANTS) as tx:
        assert brokers.get_broker(tx, "edge").applied_generation == mark.generation


def test_a_page_whose_last_line_was_not_sent_was_not_given(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_arguments: object) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(server.portal.agent_feed, "given", lost)
    agent = server.agent()
    with pytest.raises(http.client.IncompleteRead) as cut:
        server.ask(agent.context, "GET", CHANGES)
    content = cut.value.partial
    assert content.startswith(b"changes 0 ")
    body = {"generation": server.portal.reconciler.applied_generation(), "digest": sha256(content).hexdigest()}
    assert server.ask(agent.context, "POST", REPORT, body)[0] == 409


def test_what_an_agent_says_is_wrong_may_have_any_letters(server: Server) -> None:
    said = {"generation": 0, "digest": "", "problem": "a\0b\ud800\x1b[2J"}
    assert server.ask(server.agent().context, "POST", REPORT, said)[0] == 200
    with server.portal.database.snapshot(sees=ALL_TENANTS) as tx:
        assert brokers.get_broker(tx, "edge").problem == "a?b??[2J"


def test_an_agent_that_asks_for_certificates_again_and_again_fills_no_crl(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_listener, "MAX_CERTIFIED", 2)
    agent, other = server.agent(), server.agent("other")
    asked = {"revoked": new_request(new_key())}
    answers = [server.ask(agent.context, "POST", "/broker-agents/certificates", asked)[0] for _ in range(3)]
    assert answers == [200, 200, 503]
    assert server.ask(other.context, "POST", "/broker-agents/certificates", asked)[0] == 200
    monkeypatch.setattr(agent_listener, "CERTIFIED_SECONDS", 0.0)
    assert server.ask(agent.context, "POST", "/broker-agents/certificates", asked)[0] == 200


def test_a_long_page_on_a_slow_link_has_time_for_as_long_as_it_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, given = server.agent(), list[float]()
    for number in range(5):
        server.portal.registrations.register(OPERATOR, request_of(number, csr=False))
    monkeypatch.setattr(agent_listener, "BLOCK", 64)
    monkeypatch.setattr(server.listener, "extend", lambda _client, seconds: given.append(seconds))
    status, content = server.ask(agent.context, "GET", CHANGES)
    assert status == 200
    assert given.count(agent_listener.ANSWER_SECONDS) > len(content) // 64


def test_who_waits_is_answered_once_something_changes(server: Server) -> None:
    agent, answers = server.agent(), list[tuple[int, Any]]()
    mark, names = page_of(server.ask(agent.context, "GET", CHANGES)[1]).mark, server.portal.agent_feed.names()
    path = f"{CHANGES}?since={mark.generation}&digest={mark.digest}&cas={names.cas}&crls={names.crls}&wait=60"
    waiting = threading.Thread(target=lambda: answers.append(server.ask(agent.context, "GET", path)))
    waiting.start()
    device = server.portal.registrations.register(OPERATOR, request_of(1, csr=False)).device_id
    waiting.join(30)
    [(status, content)] = answers
    assert status == 200
    assert f"allow {device}".encode() in content


@ON_SQLITE
def test_who_waits_is_woken_and_does_not_look(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "LOOK_SECONDS", 3600.0)
    advance = server.portal.registrations
    advance.register(OPERATOR, request_of(1, csr=False))  # the follower waits for an hour from now on
    agent, answers = server.agent(), list[tuple[int, Any]]()
    page = page_of(server.ask(agent.context, "GET", CHANGES)[1])
    names = server.portal.agent_feed.names()
    path = f"{CHANGES}?since={page.mark.generation}&digest={page.mark.digest}&cas={names.cas}&crls={names.crls}&wait=60"
    waiting = threading.Thread(target=lambda: answers.append(server.ask(agent.context, "GET", path)))
    waiting.start()
    device = advance.register(OPERATOR, request_of(2, csr=False)).device_id
    waiting.join(30)
    [(_, content)] = answers
    assert f"allow {device}".encode() in content
    monkeypatch.undo()
    advance.register(OPERATOR, request_of(3, csr=False))


def test_the_cas_and_crls_have_the_names_that_pages_tell(server: Server) -> None:
    with server.connected(server.agent().context) as connection:
        connection.request("GET", "/broker-agents/trust")
        answer = connection.getresponse()
        said, tag = json.loads(answer.read()), answer.headers["ETag"]
        page = page_of(ask(connection, "GET", CHANGES)[1])
    assert tag == f'"{page.names.cas}{page.names.crls}"'
    assert {"ca", "crl", "tenants", "portal_ca", "settings"} == said.keys()


SESSION = "a" * 32
PRESENCE = "/broker-agents/presence"
TOLD = {"session": SESSION, "number": 1, "at": 1.0, "part": {"after": "", "upto": None}, "known": True}


def test_who_is_connected_is_told_and_a_report_says_whether_that_is_known(server: Server) -> None:
    with server.connected(server.agent().context) as connection:
        mark = page_of(ask(connection, "GET", CHANGES)[1]).mark
        report = {"generation": mark.generation, "digest": mark.digest, "presence": SESSION}
        assert ask(connection, "POST", REPORT, report) == (200, {"presence": False})
        device = server.portal.registrations.register(OPERATOR, request_of(1, csr=False)).device_id
        assert ask(connection, "POST", PRESENCE, {**TOLD, "connected": [[device, 1]]}) == (200, {"upto": None})
        assert ask(connection, "POST", REPORT, report) == (200, {"presence": True})
    with server.portal.database.snapshot(sees=ALL_TENANTS) as tx:
        known = presence_of(tx, "default", device)
    assert known is not None
    assert known.state is PresenceState.CONNECTED


DEVICE = "0" * 8 + "-0000-0000-0000-" + "0" * 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"session": "A" * 32},
        {"session": None},
        {"number": -1},
        {"number": 1 << 63},
        {"number": True},
        {"at": -1},
        {"at": 1e300},
        {"at": True},
        {"at": "1"},
        {"part": {}},
        {"part": {"after": "x", "upto": None}},
        {"part": {"after": "", "upto": "zzz"}},
        {"known": None},
        {"connected": [["not an id", 1]]},
        {"connected": [[DEVICE, -1]]},
        {"connected": [[DEVICE, 1 << 70]]},
        {"connected": [[DEVICE, True]]},
        {"connected": [DEVICE]},
        {"connected": {DEVICE: 1}},
        {"disconnected": [[DEVICE, 1, 1]]},
        {"disconnected": [[DEVICE, 1]] * 4001},
    ],
    ids=repr,
)
def test_what_is_no_message_about_clients_is_refused(server: Server, wrong: dict[str, Any]) -> None:
    assert server.ask(server.agent().context, "POST", PRESENCE, TOLD | wrong)[0] == 422


# --- What it may cost ------------------------------------------------------------------------------------------------


def test_who_does_not_begin_a_handshake_is_ended(server: Server) -> None:
    with socket.create_connection(server.address, 30) as silent:
        assert is_ended(silent)


def test_a_request_that_does_not_arrive_is_ended(server: Server) -> None:
    with server.tls(server.agent().context) as slow:
        slow.sendall(b"GET /broker-agents/changes HTTP/1.1\r\nX-Slow: ")
        assert is_ended(slow)


def test_a_request_that_arrives_byte_by_byte_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_listener, "IDLE_SECONDS", 1.0)
    with server.tls(server.agent().context) as slow:
        assert is_ended_while_it_sends(slow)


def test_more_connections_than_there_may_be_are_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = server.agent()
    monkeypatch.setattr(mutual_tls, "MAX_CONNECTIONS", 1)
    with server.connected(agent.context) as connection:
        assert ask(connection, "GET", CHANGES)[0] == 200
        with socket.create_connection(server.address, 30) as further:
            assert is_ended(further)
        assert ask(connection, "GET", CHANGES)[0] == 200


def test_an_address_without_a_certificate_keeps_nobody_else_out(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutual_tls, "MAX_UNKNOWN_OF_ADDRESS", 2)
    agent = server.agent()
    with contextlib.ExitStack() as stack, server.connected(agent.context) as connection:
        assert ask(connection, "GET", CHANGES)[0] == 200
        silent = [stack.enter_context(socket.create_connection(server.address, 30)) for _ in range(3)]
        assert is_ended(silent[2])  # at once
        assert ask(connection, "GET", CHANGES)[0] == 200  # who was there before stays
        elsewhere = stack.enter_context(socket.create_connection(server.address, 30, ("127.0.0.2", 0)))
        known = stack.enter_context(agent.context.wrap_socket(elsewhere, server_hostname=server.address[0]))
        known.sendall(b"GET /broker-agents/changes HTTP/1.1\r\nHost: x\r\n\r\n")
        assert known.recv(12) == b"HTTP/1.1 200"
        assert is_ended(silent[0])  # their time is over
    assert server.ask(agent.context, "GET", CHANGES)[0] == 200


def test_the_certificate_of_a_device_gives_no_more_connections_than_none(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutual_tls, "MAX_UNKNOWN_OF_ADDRESS", 2)
    agent = server.agent()
    device = server.certified(agent, AgentCertificate.GOOD)  # named by a UUID, and of the same CA
    with contextlib.ExitStack() as stack, server.connected(agent.context) as connection:
        assert ask(connection, "GET", CHANGES)[0] == 200
        for _ in range(2):
            stack.enter_context(server.tls(device))  # it has shown its certificate, and asks for nothing
        assert server.refuses(device)
        assert ask(connection, "GET", CHANGES)[0] == 200


def test_half_a_handshake_holds_a_connection_no_longer_than_none(server: Server) -> None:
    hello, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = server.context()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(hello, outgoing, server_hostname=server.address[0]).do_handshake()
    with socket.create_connection(server.address, 30) as silent:
        silent.sendall(outgoing.read())
        while silent.recv(65536):
            pass  # what the server says of itself, and then the end


def test_an_idle_connection_of_an_agent_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_listener, "IDLE_SECONDS", 0.2)
    with server.tls(server.agent().context) as idle:
        idle.sendall(b"GET /broker-agents/elsewhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(12) == b"HTTP/1.1 404"
        while idle.recv(65536):
            pass


def test_an_agent_that_holds_many_connections_keeps_no_other_out(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AgentListener, "max_of_client", 3)
    monkeypatch.setattr(mutual_tls, "MAX_CONNECTIONS", 5)
    agent, other = server.agent(), server.agent("other")
    with contextlib.ExitStack() as stack:
        held = []
        for _ in range(6):
            held.append(stack.enter_context(server.tls(agent.context)))
            held[-1].sendall(b"GET /broker-agents/elsewhere HTTP/1.1\r\nHost: x\r\n\r\n")
            assert held[-1].recv(12) == b"HTTP/1.1 404"
            if len(held) > 3:
                while held[len(held) - 4].recv(65536):
                    pass  # the oldest is ended
        assert server.ask(other.context, "GET", CHANGES)[0] == 200
        held[-1].sendall(b"GET /broker-agents/elsewhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert held[-1].recv(65536)


def test_a_body_of_a_client_that_does_not_count_has_no_more_time_than_its_handshake(server: Server) -> None:
    agent = server.agent()
    device = server.certified(agent, AgentCertificate.GOOD)
    with server.tls(device) as slow:
        slow.sendall(b"POST /broker-agents/report HTTP/1.1\r\nContent-Length: 100000\r\n\r\n")
        assert is_ended_while_it_sends(slow)


@pytest.mark.parametrize("fault", ["no thread", "no descriptor"])
def test_when_the_system_has_no_more_to_give_those_that_are_served_stay(
    server: Server, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    agent, start, left = server.agent(), threading.Thread.start, [1]

    def fails(of: threading.Thread) -> None:
        if of.name == "agents" and left.pop():
            raise RuntimeError("can't start new thread")
        start(of)

    def refuses(_listener: AgentListener, client: socket.socket) -> None:
        monkeypatch.undo()
        client.close()
        raise OSError(errno.EMFILE, "Too many open files")

    with server.connected(agent.context) as connection:
        assert ask(connection, "GET", CHANGES)[0] == 200
        if fault == "no thread":
            monkeypatch.setattr(threading.Thread, "start", fails)
        else:
            monkeypatch.setattr(AgentListener, "_accept", refuses)
        with socket.create_connection(server.address, 30) as refused:
            assert is_ended(refused)
        monkeypatch.undo()
        assert ask(connection, "GET", CHANGES)[0] == 200
        assert server.ask(agent.context, "GET", CHANGES)[0] == 200


def test_an_agent_has_a_few_requests_at_a_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_listener, "MAX_OF_AGENT", 1)
    agent, other = server.agent(), server.agent("other")
    record = server.portal.agents.shown(agent.certificate)
    with server.listener.counted(record.broker_id, 1):
        assert server.ask(agent.context, "GET", CHANGES)[0] == 503
        assert server.ask(other.context, "GET", CHANGES)[0] == 200
    assert server.ask(agent.context, "GET", CHANGES)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/broker-agents/elsewhere", None, 404),
        ("GET", "/devices", None, 404),
        ("POST", CHANGES, {}, 404),
        ("GET", f"{CHANGES}?since=-1", None, 422),
        ("GET", f"{CHANGES}?since={'9' * 30}", None, 422),
        ("GET", f"{CHANGES}?digest=xyz", None, 422),
        ("GET", f"{CHANGES}?wait=1e9", None, 422),
        ("POST", REPORT, [], 400),
        ("POST", REPORT, {}, 422),
        ("POST", REPORT, {"generation": True, "digest": "0" * 64}, 422),
        ("POST", REPORT, {"generation": 1, "digest": 7}, 422),
        ("POST", REPORT, {"generation": 1, "digest": "", "problem": 7}, 422),
        ("POST", REPORT, {"generation": 1, "digest": "", "problem": "x" * 3000}, 422),
        ("POST", REPORT, {"generation": 1, "digest": "0" * 64}, 409),
        ("POST", REPORT, {"generation": 0, "digest": ""}, 409),
        ("POST", "/broker-agents/certificates", {}, 422),
        ("POST", "/broker-agents/certificates", {"root": "x"}, 422),
        ("POST", "/broker-agents/certificates", {"agent": "x"}, 422),
        ("POST", "/broker-agents/certificates", {"agent": ["x"]}, 422),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    server: Server, method: str, path: str, body: Any, status: int
) -> None:
    answer, problem = server.ask(server.agent().context, method, path, body)
    assert answer == status
    assert problem["detail"].endswith(".")
    assert "Traceback" not in problem["detail"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Length: 999999\r\n\r\n", b"413"),
        (b"Content-Length: -1\r\n\r\n", b"400"),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"Content-Length: 1\r\n\r\n{", b"400"),
        (b"Content-Length: 100000\r\n\r\n" + b"[" * 100000, b"400"),
    ],
)
def test_a_body_has_a_length_and_is_json(server: Server, head: bytes, status: bytes) -> None:
    with server.tls(server.agent().context) as client:
        client.sendall(b"POST /broker-agents/report HTTP/1.1\r\nHost: x\r\n" + head)
        assert client.recv(12)[9:] == status
