"""The control by files does no harm: sleeping devices keep their messages, and nobody who is out comes back."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator

import pytest

from broker.session import Session
from tests.support.deployment import SECONDS, Deployment, Onboarded, deployed, examine, wait_until
from tests.support.harness import csr_pem

pytestmark = pytest.mark.system

SHARED = ("--topic", "devices/{id}/#:readwrite", "--topic", "devices/line/#:readwrite")


def mosquitto(program: str, device: Onboarded, *options: str) -> str:
    """Run a client of Mosquitto's own with the device's bundle."""
    lines = (device.folder / "mosquitto-client.conf").read_text().splitlines()
    own = [word for line in lines if not line.startswith("#") for word in line.split(" ", 1)]
    done = subprocess.run(
        [program, *own, "-q", "1", *options],
        cwd=device.folder, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    return done.stdout


def wake(device: Onboarded, version: str, *, messages: int = 0) -> list[str]:
    """Let the device come back to its session for some messages, or for none, and leave."""
    until = ["-C", str(messages)] if messages else ["-E"]
    expiry = ["-x", "3600"] if version == "mqttv5" else []
    options = ["-V", version, "-c", *expiry, "-t", "devices/line/#", "-W", "20", *until]
    return mosquitto("mosquitto_sub", device, *options).split()


@pytest.mark.parametrize("style", [pytest.param("per-device", marks=pytest.mark.long), "pattern"])
def test_a_sleeping_device_gets_its_messages_whatever_happens_to_others(style: str) -> None:
    with deployed(PORTAL_BROKER_CONTROL="files", PORTAL_ACL_STYLE=style) as deployment:
        assert deployment.broker is not None
        sender = deployment.onboard("sender", *SHARED)
        sleepers = {version: deployment.onboard(version, *SHARED) for version in ("mqttv311", "mqttv5")}
        for version, sleeper in sleepers.items():
            wake(sleeper, version)
        for number in range(3):
            gone = deployment.onboard(f"gone-{number}")
            assert deployment.call("POST", f"/revoke/{gone.id}").json()["broker"] == "enforced"
            assert gone.refusal()
            deployment.call("POST", f"/devices/{sender.id}/suspend")
            assert deployment.call("POST", f"/devices/{sender.id}/resume").json()["broker"] == "enforced"
            mosquitto("mosquitto_pub", sender, "-V", "mqttv5", "-t", "devices/line/x", "-m", f"hello-{number}")
            for version, sleeper in sleepers.items():
                assert wake(sleeper, version, messages=1) == [f"hello-{number}"]
                for _ in range(3):
                    wake(sleeper, version)
        assert "Reloading config" not in deployment.broker.log
        deployment.broker.restart()  # it ends with status 0: damage shows at the end at the latest


# --- TLS sessions that began before --------------------------------------------------------------------------------


def connect(
    device: Onboarded, version: ssl.TLSVersion, session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLSession | None, bool]:
    """Connect the device, which may resume a session; return what it may resume next, and whether it has resumed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if session is None else _contexts[device.id]
    if session is None:
        context.minimum_version = context.maximum_version = version
        context.load_verify_locations(device.file("ca.pem"))
        context.load_cert_chain(device.file("chain.pem"), device.file("device.key"))
        _contexts[device.id] = context
    deadline = time.monotonic() + SECONDS
    with (
        socket.create_connection(("localhost", device.port), timeout=SECONDS) as plain,
        context.wrap_socket(plain, server_hostname="localhost", session=session) as secure,
        Session(secure, deadline) as client,
    ):
        assert client.connect("") == 0
        return secure.session, bool(secure.session_reused)


_contexts: dict[str, ssl.SSLContext] = {}  # OpenSSL resumes a session in the context that it began in


@pytest.fixture(scope="module")
def by_hand() -> Iterator[Deployment]:
    """A broker that accepts TLS 1.2, and that the portal has no command to restart: what waits for that waits long."""
    quick = {"PORTAL_BROKER_RESTART": "", "PORTAL_ENFORCE_TIMEOUT": "3"}
    with deployed(PORTAL_BROKER_CONTROL="files", PORTAL_MQTT_TLS="1.2", **quick) as running:
        yield running


def test_a_revocation_is_pending_while_the_device_can_resume_a_session(by_hand: Deployment) -> None:
    assert by_hand.broker is not None
    device = by_hand.onboard("old")
    session, _ = connect(device, ssl.TLSVersion.TLSv1_2)
    answer = by_hand.call("POST", f"/revoke/{device.id}").json()
    assert answer["broker"] == "pending"
    assert "resuming a TLS session" in answer["broker_problem"]
    assert device.refusal()
    assert connect(device, ssl.TLSVersion.TLSv1_2, session)[1]  # past the CRL
    status, bad = examine(by_hand)
    assert status == 1
    assert "TLS sessions that began before a revocation can be resumed" in bad["broker"]
    by_hand.broker.restart()
    wait_until(lambda: by_hand.call("POST", f"/revoke/{device.id}").json()["broker"] == "enforced")
    with pytest.raises(ssl.SSLError, match="revoked"):
        connect(device, ssl.TLSVersion.TLSv1_2, session)
    by_hand.wait_ready()


def test_topics_of_its_own_wait_for_a_restart_and_doctor_says_so(by_hand: Deployment) -> None:
    assert by_hand.broker is not None
    before = by_hand.onboard("before")
    device = by_hand.onboard("wide", *SHARED)
    client = device.client()
    assert client.publish(f"devices/{device.id}/x") in ("Success", "No matching subscribers")
    assert client.publish("devices/line/x") == "Not authorized"
    client.close()
    assert "it does not have the topics of some devices yet. Do it at a quiet time" in examine(by_hand)[1]["broker"]
    wait_until(lambda: "restart the broker at a quiet time" in by_hand.log.read_text())
    other = by_hand.onboard("other")
    topics = [{"filter": pattern, "access": "readwrite"} for pattern in ("devices/{id}/#", "devices/news/#")]
    assert by_hand.register(name="narrow", topics=topics, csr=csr_pem())["broker"] == "pending"
    assert "broker" not in by_hand.register(name="default", csr=csr_pem())  # in style pattern
    assert by_hand.call("PATCH", f"/devices/{other.id}", {"topics": topics}).json()["broker"] == "pending"
    said = {one.id: by_hand.call("GET", f"/devices/{one.id}").json()["broker"] for one in (before, device, other)}
    assert said == {before.id: "enforced", device.id: "pending", other.id: "pending"}
    by_hand.broker.restart()
    assert by_hand.call("GET", f"/devices/{device.id}").json()["broker"] == "enforced"
    client = device.client()
    assert client.publish("devices/line/x") in ("Success", "No matching subscribers")
    client.close()
    assert "broker" not in examine(by_hand)[1]
    client = other.client()
    assert client.publish(f"devices/{other.id}/x") in ("Success", "No matching subscribers")
    client.close()


def test_a_broker_that_does_not_read_new_crls_is_not_taken_for_one_that_does(by_hand: Deployment) -> None:
    assert by_hand.broker is not None
    text = by_hand.broker.configuration_text()
    by_hand.stop_broker()
    broker = by_hand.start_broker()
    broker.configuration_text = lambda: re.sub("\\ncapath .*", "", text)  # type: ignore[method-assign]
    broker.restart()
    device = by_hand.onboard("late")
    answer = by_hand.call("POST", f"/revoke/{device.id}").json()
    assert answer["broker"] == "pending"
    assert "accepts a revoked certificate" in answer["broker_problem"]
    by_hand.stop_broker()
    by_hand.start_broker()
    wait_until(lambda: by_hand.call("POST", f"/revoke/{device.id}").json()["broker"] == "enforced")


def test_no_session_of_tls_1_3_can_be_resumed() -> None:
    with deployed(PORTAL_BROKER_CONTROL="files") as deployment:
        device = deployment.onboard("new")
        session, _ = connect(device, ssl.TLSVersion.TLSv1_3)
        assert session is None or not session.has_ticket
        with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
            connect(device, ssl.TLSVersion.TLSv1_2)
        assert deployment.call("POST", f"/revoke/{device.id}").json()["broker"] == "enforced"
        assert device.refusal()
