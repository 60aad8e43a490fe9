"""A whole portal under the control of the guard: nothing is read again, and revocation means at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from paho.mqtt.enums import MQTTProtocolVersion as Version

from broker.files.control import BrokerFiles
from broker.guard.journal import read_position
from config import Settings
from operations.wiring import utc_now
from tests.support.crash import Victim
from tests.support.deployment import ROOT, SECONDS, Client, Deployment, Onboarded, deployed, examine, wait_until
from tests.support.guard_stub import journal_lines
from tests.support.harness import csr_pem
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.system

GRANTED = ("Success", "No matching subscribers")
REFUSED = "Not authorized"


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    """One deployment for tests that leave it as it was."""
    with deployed() as deployment:
        deployment.wait_ready()
        yield deployment


@pytest.fixture
def own() -> Iterator[Deployment]:
    """A deployment for a test that damages it."""
    with deployed() as deployment:
        deployment.wait_ready()
        yield deployment


def journal_of(deployment: Deployment) -> Path:
    return deployment.data / "broker" / "guard.journal"


def revoke(deployment: Deployment, device_id: str) -> None:
    answer = deployment.call("POST", f"/revoke/{device_id}", {})
    assert answer.json()["broker"] == "enforced", answer.text


def sleeper(device: Onboarded, version: Version = Version.MQTTv5) -> Client:
    """A client whose session outlives its connection."""
    return Client(device, session_seconds=600, version=version)


def gets_nothing(device: Onboarded) -> bool:
    """Whether a client with the device's credentials is refused by TLS, refused to publish, or ended for trying."""
    client = sleeper(device)
    try:
        client.connect()
    except OSError:
        return True
    try:
        return client.is_refused(f"devices/{device.id}/x") and client.messages.empty()
    finally:
        client.close()


# --- Who may do what -----------------------------------------------------------------------------------------------


def test_a_device_reaches_its_own_topics_and_no_other(shared: Deployment) -> None:
    device, other = shared.onboard(), shared.onboard("pump-2")
    client = device.client()
    assert client.publish(f"devices/{device.id}/x") in GRANTED
    for topic in (f"devices/{other.id}/x", "devices/x", "portal/guard/refused", "elsewhere"):
        assert client.publish(topic) == REFUSED, topic
    assert client.subscribe(f"devices/{device.id}/#") == "Granted QoS 1"
    for pattern in (f"devices/{other.id}/#", f"$share/g/devices/{other.id}/#", "$share/g/#", "$SYS/#"):
        assert client.subscribe(pattern) == REFUSED, pattern
    client.close()


def test_topics_narrower_than_the_default_need_no_setting(shared: Deployment) -> None:
    topics = [{"filter": "devices/{id}/telemetry", "access": "write"}]
    device = shared.onboard()
    answer = shared.call("PATCH", f"/devices/{device.id}", {"topics": topics})
    assert answer.status_code == 200, answer.text
    client = device.client()
    wait_until(lambda: client.publish(f"devices/{device.id}/other") == REFUSED)
    assert client.publish(f"devices/{device.id}/telemetry") in GRANTED
    client.close()


def test_a_revoked_device_is_cut_and_gets_nothing_any_more(shared: Deployment) -> None:
    device = shared.onboard()
    client = device.client()
    revoke(shared, device.id)
    client.wait_cut()
    client.close()
    assert gets_nothing(device)  # until the CRL is published TLS lets it in


@contextmanager
def console_of(deployment: Deployment) -> Iterator[Callable[..., requests.Response]]:
    """Sends requests as a browser that is logged in to the console; forms have the session's token."""
    with requests.Session() as session:
        session.trust_env, session.verify = False, deployment.session.verify
        session.headers["Sec-Fetch-Site"] = "same-origin"

        def ask(path: str, form: dict[str, str] | None = None, **headers: str) -> requests.Response:
            url = f"{deployment.url}{path}"
            if form is None:
                return session.get(url, headers=headers, timeout=SECONDS)
            if path != "/ui/login":
                form = form | {
                    "form_token": re.findall(r'name="form_token" value="(\w+)"', ask("/ui/sessions").text)[0]
                }
            return session.post(url, data=form, timeout=SECONDS)

        assert ask("/ui/login", {"token": deployment.operator["PORTAL_TOKEN"]}).url == f"{deployment.url}/ui"
        yield ask


def test_a_revocation_in_the_console_shows_all_steps_once_the_client_was_cut(shared: Deployment) -> None:
    device = shared.onboard()
    client, path = device.client(), f"/ui/devices/{device.id}"
    part = {"HX-Request": "true", "HX-Request-Type": "partial"}
    with console_of(shared) as console:
        page = console(f"{path}/revoke", {"reason": "key_compromise"}).text
        assert "step-time" in page
        client.wait_cut()
        wait_until(lambda: "every 1s" not in console(f"{path}/enforcement", **part).text)
        shown = console(f"{path}/enforcement", **part).text
        assert {*re.findall("<strong>(.*?)</strong>", shown)} == {"Recorded", "Denied", "Refused", "Cut", "Enforced"}
        assert "step-pending" not in shown
        wait_until(lambda: "All is well" in console("/ui").text)
    client.close()


def test_a_revocation_is_on_the_public_crl_at_once(shared: Deployment) -> None:
    for _ in range(3):
        device = shared.onboard()
        revoke(shared, device.id)
        serial_number = x509.load_pem_x509_certificate(Path(device.file("chain.pem")).read_bytes()).serial_number
        crl = requests.get(f"{shared.pki_url}/crl/issuing-1.crl", timeout=10).content
        assert x509.load_der_x509_crl(crl).get_revoked_certificate_by_serial_number(serial_number) is not None


def refused_by_tls(device: Onboarded) -> bool:
    try:
        return bool(device.refusal())
    except AssertionError:
        return False


def test_once_the_crl_is_published_tls_refuses_a_revoked_device_too(shared: Deployment) -> None:
    device = shared.onboard()
    revoke(shared, device.id)  # so soon after its registration that the CRL is put off
    wait_until(lambda: refused_by_tls(device))
    assert shared.broker is not None
    assert "Reloading config" not in shared.broker.log


def test_a_suspended_device_comes_back(shared: Deployment) -> None:
    device = shared.onboard()
    client = device.client()
    assert shared.call("POST", f"/devices/{device.id}/suspend", {}).json()["broker"] == "enforced"
    client.wait_cut()
    client.close()
    assert shared.call("POST", f"/devices/{device.id}/resume", {}).status_code == 200
    client = device.client()
    assert client.publish(f"devices/{device.id}/x") in GRANTED
    client.close()


def test_a_superseded_certificate_is_refused_while_the_device_lives_on(shared: Deployment) -> None:
    device = shared.onboard()
    client = device.client()
    answer = shared.call("POST", f"/devices/{device.id}/renew", {"csr": csr_pem(), "overlap_hours": 0})
    assert answer.status_code == 201, answer.text
    client.wait_cut()
    client.close()
    assert gets_nothing(device)


def test_the_doctor_finds_nothing(shared: Deployment) -> None:
    shared.onboard()
    bad: dict[str, str] = {}

    def waits_for_no_crl() -> bool:
        """What was revoked before may be on no CRL yet: it is signed some seconds later."""
        nonlocal bad
        _, bad = examine(shared, "--broker-config", str(shared.data / "broker-mosquitto.conf"))
        return not any("will be on the next CRL" in said for said in bad.values())

    wait_until(waits_for_no_crl)
    assert bad == {}


# --- Who is connected ----------------------------------------------------------------------------------------------


def connection(deployment: Deployment, device: Onboarded) -> dict[str, Any] | None:
    found: dict[str, Any] | None = deployment.call("GET", f"/devices/{device.id}").json()["connection"]
    return found


def until_connected(deployment: Deployment, device: Onboarded, connected: bool | None) -> dict[str, Any]:
    """Wait until the portal says this of a device that was seen; return all that it says of its connection."""

    def said() -> bool:
        found = connection(deployment, device)
        return found is not None and found["connected"] is connected

    wait_until(said)
    found = connection(deployment, device)
    assert found is not None
    return found


@contextmanager
def subscriber(device: Onboarded) -> Iterator[subprocess.Popen[bytes]]:
    """A device that is a process of its own, which can be killed."""
    files = ("--cafile", device.file("ca.pem"), "--cert", device.file("chain.pem"), "--key", device.file("device.key"))
    to = ("-h", "localhost", "-p", str(device.port), "-i", device.id, "-t", f"devices/{device.id}/#")
    with subprocess.Popen(["mosquitto_sub", *files, *to]) as process:
        yield process
        process.kill()


def test_the_portal_says_who_is_connected_whoever_is_killed_or_restarted(shared: Deployment) -> None:
    here, killed, never = shared.onboard(), shared.onboard("pump-2"), shared.onboard("pump-3")
    client = here.client()
    client.subscribe(f"devices/{here.id}/#")
    since = until_connected(shared, here, True)["since"]
    with subscriber(killed) as process:
        until_connected(shared, killed, True)
        listed = shared.call("GET", "/devices?connected=true").json()["devices"]
        assert {one["device_id"] for one in listed} == {here.id, killed.id}
        process.send_signal(signal.SIGKILL)
        until_connected(shared, killed, False)
    assert connection(shared, never) is None

    kill_with_workers(shared)
    shared.start_portal()
    assert until_connected(shared, here, True)["since"] == since

    shared.stop_broker()
    seen = until_connected(shared, here, None)["last_seen"]
    shared.start_broker()
    assert until_connected(shared, here, False)["last_seen"] == seen
    client.close()

    client = here.client()
    client.publish(f"devices/{here.id}/x")
    until_connected(shared, here, True)
    revoke(shared, here.id)
    until_connected(shared, here, False)
    client.close()
    shared.wait_ready()
    assert never.id in shared.cli("list", "--never-seen").stdout


def retained(device: Onboarded) -> bytes:
    """Have a device leave a retained message with the broker; return what it says."""
    client, said = device.client(), f"said by {device.id}".encode()
    assert client.publish(f"devices/{device.id}/a/b", said, retain=True) in GRANTED
    client.close()
    return said


def is_kept(deployment: Deployment, message: bytes) -> bool:
    """Whether the broker keeps a message, by what it writes to its disk when it is asked to (SIGUSR1)."""
    assert deployment.broker is not None
    database = deployment.data / "broker" / "mosquitto.db"
    database.unlink(missing_ok=True)
    os.kill(deployment.broker.pid, signal.SIGUSR1)
    wait_until(database.exists)
    return message in database.read_bytes()


def test_retained_messages_are_cleared_on_revocation_and_kept_on_suspension(shared: Deployment) -> None:
    device = shared.onboard()
    said = retained(device)
    assert shared.call("POST", f"/devices/{device.id}/suspend", {}).json()["broker"] == "enforced"
    assert is_kept(shared, said)
    revoke(shared, device.id)
    assert not is_kept(shared, said)


# --- Applications --------------------------------------------------------------------------------------------------


def test_two_consumers_of_a_shared_subscription_lose_nothing_to_a_device_that_tries_to_join(shared: Deployment) -> None:
    group = "$share/store/devices/+/telemetry"
    consumers = [shared.add_application(f"consumer-{number}", "devices/+/telemetry:read").client() for number in (1, 2)]
    assert [consumer.subscribe(group) for consumer in consumers] == ["Granted QoS 1"] * 2
    device, thief = shared.onboard(), shared.onboard("thief").client()
    speaker = device.client()
    for number in range(40):
        if number % 10 == 0:
            for pattern in (group, "devices/+/telemetry", "$share/store/devices/#"):
                thief.subscribe(pattern)
        assert speaker.publish(f"devices/{device.id}/telemetry", str(number).encode()) == "Success"
    assert thief.subscribe(group) == REFUSED
    wait_until(lambda: sum(consumer.messages.qsize() for consumer in consumers) >= 40)
    taken = [[int(payload) for _, payload in list(consumer.messages.queue)] for consumer in consumers]
    assert sorted(taken[0] + taken[1]) == list(range(40))
    assert all(taken)
    assert thief.messages.empty()
    for client in (*consumers, thief, speaker):
        client.close()


def test_an_application_does_what_its_topics_say_until_they_are_taken_away_and_nothing_once_revoked(
    shared: Deployment,
) -> None:
    device = shared.onboard()
    application = shared.add_application("control", "devices/+/telemetry:read", "devices/+/command:write")
    speaker, client = device.client(), application.client()
    assert client.subscribe("devices/+/telemetry") == "Granted QoS 1"
    for pattern in ("devices/+/command", "$SYS/#", "$share/g/#", "portal/guard/#"):
        assert client.subscribe(pattern) == REFUSED, pattern
    assert client.publish(f"devices/{device.id}/command") in GRANTED
    assert client.publish(f"devices/{device.id}/telemetry") == REFUSED
    assert speaker.publish(f"devices/{device.id}/telemetry") == "Success"
    assert client.messages.get(timeout=30) == (f"devices/{device.id}/telemetry", b"hello")
    body = {"topics": [{"filter": "devices/+/command", "access": "write"}]}
    answer = shared.call("PATCH", f"/applications/{application.id}", body)
    assert answer.json()["broker"] == "enforced", answer.text
    client.wait_cut()
    client.close()
    client = application.client()
    assert client.subscribe("devices/+/telemetry") == REFUSED
    assert client.publish(f"devices/{device.id}/command") in GRANTED
    assert shared.call("DELETE", f"/applications/{application.id}").json()["broker"] == "enforced"
    client.wait_cut()
    client.close()
    speaker.close()
    assert gets_nothing(application)


def test_a_sleeping_application_that_loses_topics_gets_none_of_their_messages_and_takes_none_from_others(
    shared: Deployment,
) -> None:
    group = "$share/store/devices/+/telemetry"
    consumer = shared.add_application("consumer", "devices/+/telemetry:read").client()
    loser = shared.add_application("loser", "devices/+/telemetry:read", "devices/+/state:read")
    keeper = shared.add_application("keeper", "devices/+/telemetry:read", "devices/+/state:write")
    for application in (loser, keeper):
        client = sleeper(application)
        client.connect()
        if application is loser:
            assert client.subscribe(group) == "Granted QoS 1"
        assert client.subscribe("devices/+/telemetry") == "Granted QoS 1"
        client.close()
    device = shared.onboard()
    speaker, topic = device.client(), f"devices/{device.id}/telemetry"
    assert speaker.publish(topic, b"before") == "Success"
    narrower = {"topics": [{"filter": "devices/+/state", "access": "read"}]}
    assert shared.call("PATCH", f"/applications/{loser.id}", narrower).json()["broker"] == "enforced"
    narrower = {"topics": [{"filter": "devices/+/telemetry", "access": "read"}]}
    assert shared.call("PATCH", f"/applications/{keeper.id}", narrower).json()["broker"] == "enforced"

    assert consumer.subscribe(group) == "Granted QoS 1"
    for number in range(6):  # of a group in which the stored session still was every other one would be lost
        assert speaker.publish(topic, str(number).encode()) == "Success"
    assert [consumer.messages.get(timeout=30)[1] for _ in range(6)] == [b"0", b"1", b"2", b"3", b"4", b"5"]

    client = sleeper(loser)
    client.connect()
    assert not client.session_present
    assert client.subscribe("devices/+/state") == "Granted QoS 1"
    assert client.messages.empty()
    client.close()
    client = sleeper(keeper)
    client.connect()
    assert client.session_present  # it could write less, and reads on
    assert [client.messages.get(timeout=30)[1] for _ in range(7)] == [b"before", b"0", b"1", b"2", b"3", b"4", b"5"]
    for one in (client, consumer, speaker):
        one.close()
    for application in (loser, keeper):  # whose stored sessions other tests would take for somebody who listens
        assert shared.call("DELETE", f"/applications/{application.id}").json()["broker"] == "enforced"


def test_topics_that_a_group_loses_are_refused_to_all_its_members_before_the_answer(shared: Deployment) -> None:
    own, news = {"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/news", "access": "read"}
    members, other = [shared.onboard(f"member-{number}") for number in range(3)], shared.onboard("other")
    assert shared.call("POST", "/groups", {"name": "readers", "topics": [own, news]}).status_code == 201
    answer = shared.call("POST", "/groups/readers/members", {"add": [device.id for device in members]})
    assert answer.json()["broker"] == "enforced", answer.text
    clients = [device.client() for device in members]
    assert {client.subscribe("devices/news") for client in clients} == {"Granted QoS 1"}
    with_own = other.client()
    assert with_own.subscribe("devices/news") == REFUSED
    editor = shared.add_application("editor", "devices/news:write").client()
    assert editor.publish("devices/news", b"before") == "Success"
    assert [client.messages.get(timeout=30)[1] for client in clients] == [b"before"] * 3

    assert shared.call("PATCH", "/groups/readers", {"topics": [own]}).json()["broker"] == "enforced"
    assert editor.publish("devices/news", b"after") == "No matching subscribers"
    for device, client in zip(members, clients, strict=True):
        assert client.messages.empty()
        client.close()
        again = device.client()
        assert again.subscribe("devices/news") == REFUSED
        assert again.publish(f"devices/{device.id}/x") in GRANTED
        again.close()
    for client in (with_own, editor):
        client.close()


def test_the_programs_of_the_page_about_back_ends_get_what_devices_send(shared: Deployment) -> None:
    page = (ROOT / "docs" / "how-to" / "connect-your-back-end.md").read_text()
    [program] = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    [command] = re.findall(r"^    (mosquitto_sub .*)$", page, re.MULTILINE)
    device = shared.onboard()
    speaker = device.client()
    for words in (["bash", "-c", f"exec {command}"], [sys.executable, "-c", program]):
        folder = shared.folder / f"program-{Path(words[0]).name}"
        shared.add_application("telemetry-store", "devices/+/telemetry:read", out=folder / "back-end")
        words[-1] = words[-1].replace("broker.example.com", "localhost").replace("8883", str(shared.mqtt_port))
        with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            end = threading.Timer(SECONDS, process.kill)
            end.start()
            wait_until(lambda: speaker.publish(f"devices/{device.id}/telemetry") == "Success")  # somebody has it
            assert process.stdout is not None
            assert any(f"devices/{device.id}/telemetry" in line and "hello" in line for line in process.stdout)
            process.kill()
            end.cancel()
    speaker.close()


# --- Nothing is read again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [Version.MQTTv311, Version.MQTTv5], ids=["MQTT 3.1.1", "MQTT 5"])
def test_a_sleeper_that_comes_and_goes_gets_every_message_whatever_the_portal_does_and_over_a_restart(
    shared: Deployment, version: Version
) -> None:
    device, speaker = shared.onboard(), shared.onboard("pump-2")
    topics = [{"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/all/#", "access": "write"}]
    answer = shared.call("PATCH", f"/devices/{speaker.id}", {"topics": topics})
    assert answer.status_code == 200, answer.text
    answer = shared.call("PATCH", f"/devices/{device.id}", {"topics": [{"filter": "devices/all/#", "access": "read"}]})
    assert answer.status_code == 200, answer.text
    sent, arrived = 0, []
    client = sleeper(device, version)
    client.connect()
    client.subscribe("devices/all/#")
    for number in range(4):
        client.close()  # it sleeps
        voice = speaker.client()
        for _ in range(3):
            victim = shared.register()
            assert voice.publish("devices/all/news", str(sent).encode()) == "Success"
            sent += 1
            revoke(shared, victim["device_id"])
        voice.close()
        if number == 2:  # as PORTAL_BROKER_RESTART does, for a new server certificate
            shared.stop_broker()  # by SIGTERM, with status 0
            shared.start_broker()
        client = sleeper(device, version)
        client.connect()
        arrived += [client.messages.get(timeout=30)[1] for _ in range(3)]
    client.close()
    assert arrived == [str(number).encode() for number in range(sent)]
    assert shared.broker is not None
    assert "Reloading config" not in shared.broker.log


def test_a_revoked_sleeper_gets_nothing_when_it_wakes(shared: Deployment) -> None:
    device = shared.onboard()
    client = sleeper(device)
    client.connect()
    client.subscribe(f"devices/{device.id}/#")
    client.close()
    revoke(shared, device.id)
    assert gets_nothing(device)


# --- Faults --------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a bit flipped": _flip,
}


def kill_with_workers(own: Deployment) -> None:
    """Kill the portal's processes at once: a worker that outlives its master could repair what a test damages."""
    pids = [own.processes[0].pid]
    for pid in pids:
        pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    own.stop_portal(signal.SIGKILL)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_damaged_journal_opens_nothing_and_is_repaired_by_itself(own: Deployment, kind: str) -> None:
    device, revoked = own.onboard(), own.onboard("pump-2")
    revoke(own, revoked.id)
    epoch = read_position(journal_of(own)).epoch
    kill_with_workers(own)
    FAULTS[kind](journal_of(own))
    client = device.client()
    wait_until(lambda: client.publish(f"devices/{device.id}/x") == REFUSED)
    own.start_portal()
    wait_until(lambda: client.publish(f"devices/{device.id}/x") in GRANTED)
    client.close()
    own.wait_ready()
    assert read_position(journal_of(own), whole=True).epoch > epoch
    assert gets_nothing(revoked)


def test_an_older_journal_that_is_put_back_while_all_runs_is_noticed(own: Deployment) -> None:
    device = own.onboard()
    older = journal_of(own).read_bytes()
    revoke(own, device.id)
    journal_of(own).write_bytes(older)
    assert gets_nothing(device)
    wait_until(lambda: f"deny {device.id}" in journal_lines(journal_of(own)))
    own.wait_ready()
    assert gets_nothing(device)


@pytest.mark.parametrize("step", ["apply.begin", "journal.written", "apply.before_proof", "apply.after_reload"])
def test_a_portal_killed_at_any_step_finishes_after_its_start(step: str) -> None:
    with Victim(PORTAL_WORKERS="1") as victim:
        victim.wait_ready()
        device = victim.onboard()
        said = retained(device)
        victim.kill_portal()
        victim.start_portal(others={"PORTAL_FAILPOINT": f"revoke.after_commit>{step}=killgroup"})
        victim.wait_ready()
        with pytest.raises(requests.ConnectionError):
            victim.call("POST", f"/revoke/{device.id}", {})
        victim.kill_portal()
        victim.start_portal()
        victim.wait_ready()
        read_position(journal_of(victim), whole=True)
        assert f"deny {device.id}" in journal_lines(journal_of(victim))
        assert gets_nothing(device)
        assert not is_kept(victim, said)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("journal.written", marks=pytest.mark.long),
        "apply.before_proof",
        pytest.param("apply.after_reload", marks=pytest.mark.long),
    ],
)
def test_a_broker_killed_at_any_step_of_a_revocation_obeys_after_its_start(step: str) -> None:
    with deployed(PORTAL_FAILPOINT=f"revoke.after_commit>{step}=sleep:2", PORTAL_WORKERS="1") as deployment:
        deployment.wait_ready()
        device = deployment.onboard()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(deployment.call, "POST", f"/revoke/{device.id}", {})
            wait_until(lambda: f"deny {device.id}" in journal_lines(journal_of(deployment)))
            assert deployment.broker is not None
            os.kill(deployment.broker.pid, signal.SIGKILL)
            deployment.stop_broker()
            deployment.start_broker()
            assert answer.result().status_code == 200
        assert gets_nothing(device)
        wait_until(lambda: deployment.call("POST", f"/revoke/{device.id}", {}).json()["broker"] == "enforced")
        deployment.wait_ready()


def test_a_broker_without_the_plugin_is_never_believed() -> None:
    with deployed(PORTAL_ENFORCE_TIMEOUT="3") as own:
        own.wait_ready()
        device = own.onboard()
        own.stop_broker()
        variables = {key: value for key, value in own.environment.items() if key.startswith("PORTAL_")}
        settings = Settings.from_env(variables)
        BrokerFiles(settings, utc_now).password()  # with the file of it that such a broker has
        settings.broker_file("acl").write_text("topic readwrite #\n")
        settings.broker_file("acl").chmod(0o644)
        own.broker = Mosquitto(settings.broker_dir, own.mqtt_port).start()
        answer = own.call("POST", f"/revoke/{device.id}", {})
        assert answer.json()["broker"] == "pending"
        assert "guard" in answer.json()["broker_problem"]


# --- Going over and back -------------------------------------------------------------------------------------------


def test_an_installation_goes_over_to_the_guard_with_one_restart_and_back() -> None:
    with deployed(PORTAL_BROKER_CONTROL="files") as deployment:
        deployment.wait_ready()
        device, revoked = deployment.onboard(), deployment.onboard("pump-2")
        revoke(deployment, revoked.id)
        for control in ("guard", "files"):
            deployment.stop_portal()
            deployment.stop_broker()
            deployment.environment["PORTAL_BROKER_CONTROL"] = control
            deployment.run_flask("init")
            deployment.start_broker()
            deployment.start_portal()
            deployment.wait_ready()
            record = json.loads((deployment.data / "broker" / "projection.json").read_text())
            assert record.get("control", "files") == control
            assert record["style"] == "pattern"
            client = device.client()
            assert client.publish(f"devices/{device.id}/x") in GRANTED
            client.close()
            assert gets_nothing(revoked)
            revoke(deployment, deployment.register()["device_id"])


def test_a_restored_backup_begins_a_new_journal(own: Deployment) -> None:
    backup = own.folder / "backup.zip"
    early = own.onboard()
    own.run_flask("backup", str(backup))
    late = own.onboard("pump-2")
    epoch = read_position(journal_of(own)).epoch
    own.stop_portal()
    done: subprocess.CompletedProcess[str] = own.run_flask("restore", str(backup), "--replace")
    assert done.returncode == 0
    own.start_portal()
    own.wait_ready()
    assert read_position(journal_of(own)).epoch > epoch
    lines = journal_lines(journal_of(own))
    assert f"allow {early.id}" in lines
    assert f"allow {late.id}" not in lines
    assert gets_nothing(late)
