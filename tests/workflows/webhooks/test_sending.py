"""Where events are sent, and where not, whatever a name leads to or a receiver does."""

from __future__ import annotations

import base64
import ipaddress
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputInvalid, Unavailable
from tests.support.pki import PEM, Authority
from tests.support.receiver import OK, Receiver, answer, receiving
from workflows.webhooks import addresses, sending
from workflows.webhooks.addresses import Network, may_reach, read_url
from workflows.webhooks.sending import Message, SecretSeal, Sender, Sent, new_secret, shown, signature_of

NOW = datetime(2027, 1, 1, tzinfo=UTC)
SEAL = SecretSeal(bytes(32))
SECRET = new_secret()
LOCAL: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1"))


def send(url: str, allowed: tuple[Network, ...] = LOCAL, ca_file: Path | None = None, body: str = "{}") -> Sent:
    message = Message("1" * 16, url, SEAL.seal(SECRET, "1" * 16), "event-1", body)
    return Sender(allowed, ca_file, SEAL).send(message, now=NOW)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


# --- What is sent -------------------------------------------------------------------------------------------------


def test_an_event_is_a_post_of_json_whose_signature_openssl_makes_too(receiver: Receiver, tmp_path: Path) -> None:
    body = json.dumps({"type": "registered", "name": "Pumpe Süd"})
    sent = send(receiver.url, body=body)
    assert (sent.delivered, sent.status, sent.problem) == (True, 204, None)
    (request,) = receiver.requests
    assert request.line == "POST /events?from=portal HTTP/1.1"
    assert request.headers["host"] == f"localhost:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.body == body.encode()
    signed = tmp_path / "signed"
    signed.write_bytes(f"event-1.{int(NOW.timestamp())}.".encode() + request.body)
    assert request.headers["webhook-id"] == "event-1"
    assert request.headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    command = [
        "openssl",
        "dgst",
        "-sha256",
        "-mac",
        "HMAC",
        "-macopt",
        f"hexkey:{SECRET.hex()}",
        "-binary",
        str(signed),
    ]
    digest = subprocess.run(command, check=True, capture_output=True).stdout
    encoded = subprocess.run(["openssl", "base64", "-A"], input=digest, check=True, capture_output=True).stdout
    assert request.headers["webhook-signature"] == f"v1,{encoded.decode()}"


def test_the_signature_is_that_of_the_specification() -> None:
    # The example of Standard Webhooks 1.0, as its libraries test it.
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = signature_of(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_receiver_in_the_documentation_takes_what_is_sent_and_nothing_else(receiver: Receiver) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "events.md").read_text()
    names: dict[str, Any] = {}
    exec(guide.partition("```python\n")[2].partition("```")[0], names)  # noqa: S102 - ours
    is_from_the_portal = names["is_from_the_portal"]
    message = Message("1" * 16, receiver.url, SEAL.seal(SECRET, "1" * 16), "event-1", '{"type":"test"}')
    for ago in (0, 301):
        Sender(LOCAL, None, SEAL).send(message, now=datetime.now(UTC) - timedelta(seconds=ago))
    fresh, old = receiver.requests
    headers = {name.title(): value for name, value in fresh.headers.items()}
    assert is_from_the_portal(shown(SECRET), headers, fresh.body)
    assert not is_from_the_portal(shown(SECRET), headers, fresh.body + b" ")
    assert not is_from_the_portal(shown(new_secret()), headers, fresh.body)
    assert not is_from_the_portal(shown(SECRET), headers | {"Webhook-Id": "event-2"}, fresh.body)
    assert not is_from_the_portal(shown(SECRET), {name.title(): value for name, value in old.headers.items()}, old.body)


def test_a_secret_opens_as_that_of_its_own_webhook_only() -> None:
    sealed = SEAL.seal(SECRET, "1" * 16)
    assert SECRET not in sealed
    assert SEAL.open(sealed, "1" * 16) == SECRET
    for other, key, content in (
        ("2" * 16, SEAL, sealed),
        ("1" * 16, SecretSeal(b"k" * 32), sealed),
        ("1" * 16, SEAL, b""),
    ):
        with pytest.raises(Unavailable):
            key.open(content, other)
    assert shown(SECRET).startswith("whsec_")


def test_over_tls_the_certificate_must_be_trusted_and_of_that_host(tmp_path: Path) -> None:
    authority = Authority("A receiver's CA")
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(authority.certificate.public_bytes(PEM))
    with receiving(authority.issue("receiver", server_names=["localhost"]).write(tmp_path, "good")) as receiver:
        assert send(receiver.url, ca_file=ca_file).delivered
        unknown = send(receiver.url)
        assert "not trusted" in (unknown.problem or "")
        assert len(receiver.requests) == 1
    with receiving(authority.issue("receiver", server_names=["other"]).write(tmp_path, "other")) as receiver:
        assert "not trusted" in (send(receiver.url, ca_file=ca_file).problem or "")
        assert receiver.requests == []


def test_tls_with_a_server_that_speaks_none_is_a_problem(receiver: Receiver) -> None:
    receiver.behave, receiver.reads = b"220 mail\r\n", False
    assert "TLS" in (send(receiver.url.replace("http:", "https:")).problem or "")


# --- What a receiver may do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (answer(200), None),
        (answer(202), None),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + answer(200), None),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 1_000_000, None),
        (answer(404), "The receiver answered 404."),
        (answer(500), "The receiver answered 500."),
        (answer(302, "Location: http://localhost:1/"), "which is not followed"),
        (answer(307, "Location: https://example.com/"), "which is not followed"),
        (b"", "closed the connection without an answer"),
        (b"HTTP/1.1 2", "closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\nX-Cut: of", "closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "is not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000, "is longer than"),
    ],
)
def test_a_2xx_is_success_and_nothing_else(receiver: Receiver, behaviour: bytes, problem: str | None) -> None:
    receiver.behave = behaviour
    sent = send(receiver.url)
    assert sent.delivered == (problem is None)
    assert problem is None or problem in (sent.problem or "")
    assert receiver.connections == 1


def hang(receiver: Receiver) -> Callable[[Any], None]:
    def behave(_: Any) -> None:
        receiver.stopped.wait(10)

    return behave


def drip(receiver: Receiver) -> Callable[[Any], None]:
    def behave(connection: Any) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: ":
            connection.sendall(bytes((byte,)))
        while not receiver.stopped.wait(0.02):
            connection.sendall(b"y")

    return behave


@pytest.mark.parametrize("slow", [hang, drip])
def test_a_receiver_that_hangs_or_drips_is_left(
    receiver: Receiver, slow: Callable[[Receiver], Callable[[Any], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "TOTAL_SECONDS", 0.4)
    receiver.behave = slow(receiver)
    sent = send(receiver.url)
    assert "did not answer within 0.4 seconds" in (sent.problem or "")
    assert sent.seconds < 2


def test_a_receiver_that_drips_over_tls_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "TOTAL_SECONDS", 0.6)
    authority = Authority("A receiver's CA")
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(authority.certificate.public_bytes(PEM))
    with receiving(authority.issue("receiver", server_names=["localhost"]).write(tmp_path, "good")) as receiver:
        receiver.behave = drip(receiver)
        sent = send(receiver.url, ca_file=ca_file)
    assert "did not answer within 0.6 seconds" in (sent.problem or "")
    assert sent.seconds < 2


def test_a_receiver_that_does_not_end_its_answer_is_left_with_success(receiver: Receiver) -> None:
    def behave(connection: Any) -> None:
        connection.sendall(OK.replace(b"Connection: close\r\n", b""))
        receiver.stopped.wait(10)

    receiver.behave = behave
    started = time.monotonic()
    assert send(receiver.url).delivered
    assert time.monotonic() - started < 3


def test_nobody_listening_is_a_problem(receiver: Receiver) -> None:
    with receiving() as gone:
        url = gone.url
    assert "no connection to localhost" in (send(url).problem or "")


# --- Where nothing is sent to -------------------------------------------------------------------------------------

INTERNAL = (
    "0.0.0.0",  # noqa: S104 - an address that is refused
    "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200",
    "168.63.129.16", "192.0.0.192", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "192.0.2.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "ff0e::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::1", "2001:0:1::1", "2001:db8::1", "3fff::1", "3fff:fff:ffff::1",
)  # fmt: skip


@pytest.mark.parametrize("address", INTERNAL)
def test_an_internal_address_is_not_reached(address: str) -> None:
    assert not may_reach(ipaddress.ip_address(address), ())


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "1.1.1.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"]
)
def test_an_address_of_the_internet_is_reached(address: str) -> None:
    assert may_reach(ipaddress.ip_address(address), ())


def test_what_the_setting_allows_is_reached_in_every_spelling() -> None:
    allowed = (ipaddress.ip_network("10.0.0.0/8"),)
    for address in ("10.1.2.3", "::ffff:10.1.2.3"):
        assert may_reach(ipaddress.ip_address(address), allowed)
    assert not may_reach(ipaddress.ip_address("127.0.0.1"), allowed)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001", "017700000001"])
def test_a_name_that_leads_inside_is_refused_once_it_is_resolved(receiver: Receiver, host: str) -> None:
    sent = send(f"https://{host}:{receiver.port}/", allowed=())
    assert "127.0.0.1, which is internal" in (sent.problem or ""), sent
    assert receiver.connections == 0


def test_a_name_with_one_internal_address_among_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(*_: object, **__: object) -> list[Any]:
        return [(0, 0, 0, "", (address, 443)) for address in ("1.1.1.1", "10.0.0.1")]

    monkeypatch.setattr("socket.getaddrinfo", resolved)
    assert "10.0.0.1, which is internal" in (send("https://example.com/", allowed=()).problem or "")


def test_the_connection_is_made_to_the_address_that_was_checked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["127.0.0.1"])  # asked a second time, the name would lead elsewhere: there is no second time

    def resolved(host: str, *_: object, **__: object) -> list[Any]:
        if host == "rebinding.example":
            return [(0, 0, 0, "", (next(answers), 0))]
        return [(2, 1, 6, "", (host, receiver.port))]  # an address, as create_connection asks for it

    monkeypatch.setattr("socket.getaddrinfo", resolved)
    assert send(f"http://rebinding.example:{receiver.port}/").delivered
    assert receiver.requests[0].headers["host"] == f"rebinding.example:{receiver.port}"


def test_a_resolver_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch, receiver: Receiver) -> None:
    monkeypatch.setattr(sending, "RESOLVE_SECONDS", 0.2)

    def hang(*_: object, **__: object) -> list[Any]:
        receiver.stopped.wait(10)
        return []

    monkeypatch.setattr("socket.getaddrinfo", hang)
    assert "was not resolved within 0.2 seconds" in (send("https://example.com/").problem or "")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://example.com/", "https://"),
        ("https://", "host"),
        ("//example.com", "https://"),
        ("https://user:secret@example.com/", "name or password"),
        ("https://example.com/#part", "fragment"),
        ("https://example.com:22/", "port"),
        ("https://example.com:0/", "port"),
        ("https://example.com:99999/", "cannot be read"),
        ("https://exa mple.com/", "ASCII"),
        ("https://example.com/\r\nX: y", "ASCII"),
        ("https://example.com/ü", "ASCII"),
        ("https://example.com\\@127.0.0.1/", "ASCII"),
        ("https://[::1", "cannot be read"),
        ("https://[fe80::1%25eth0]/", "internal"),
        ("https://127.0.0.1/", "internal"),
        ("https://[::ffff:10.0.0.1]/", "internal"),
        ("https://169.254.169.254/latest/meta-data/", "internal"),
        ("http://example.com/", "http is for"),
        ("https://example.com/" + "a" * 2048, "2048"),
    ],
)
def test_a_url_of_another_form_is_refused(url: str, problem: str) -> None:
    with pytest.raises(InputInvalid) as caught:
        read_url(url, ())
    assert problem in caught.value.detail


def test_http_is_for_what_the_setting_allows(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_look_up", lambda *_: [ipaddress.ip_address("1.1.1.1")])
    assert "https is needed" in (send("http://example.com/").problem or "")
    with pytest.raises(InputInvalid):
        read_url("http://1.1.1.1/", LOCAL)
    assert not read_url("http://127.0.0.1/", LOCAL).https
