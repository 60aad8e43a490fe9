"""Devices that enrol over EST, by curl and openssl as the documentation has it and by their own tool; a real broker."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import PublicFormat

from tests.support.deployment import ROOT, Deployment, Onboarded, deployed
from tests.support.device_tool import Connection, Device
from tests.support.evidence_program import script
from tests.support.pki import PEM, key_pem

pytestmark = pytest.mark.system

BLOCKS = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "enrolment.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A portal where a device may renew from the first day on, and has done with a certificate once the next is used.

    It has one worker, since a TLS session is resumed at the one that it began with.
    """
    with deployed(
        PORTAL_RENEWAL_FROM="0",
        PORTAL_RENEWAL_REVOKE_PREVIOUS="when_used",
        PORTAL_WORKERS="1",
        PORTAL_VENV=sys.prefix,
    ) as running:
        (running.folder / "portal").symlink_to(ROOT / "portal")
        running.wait_ready()
        yield running


def run(deployment: Deployment, block: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=deployment.folder,
        env=deployment.environment | deployment.operator,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_device_enrols_publishes_renews_and_is_revoked(deployment: Deployment) -> None:
    make_token, enrol, renew, *_ = BLOCKS
    for block in (make_token, enrol):
        done = run(deployment, block)
        assert done.returncode == 0, done.stderr
    folder = deployment.folder
    first = (folder / "device.pem").read_text()
    subject = ["openssl", "x509", "-noout", "-subject", "-nameopt", "multiline", "-in", "device.pem"]
    shown = subprocess.run(subject, cwd=folder, check=True, capture_output=True, text=True).stdout
    device_id = shown.rpartition("= ")[2].strip()
    (folder / "chain.pem").symlink_to("device.pem")
    device = Onboarded(device_id, folder, deployment.mqtt_port)
    client = device.client()
    assert client.publish(f"devices/{device_id}/hello") in ("Success", "No matching subscribers")
    done = run(deployment, renew)  # while it is connected
    assert done.returncode == 0, done.stderr
    assert (folder / "device.pem").read_text() != first
    assert client.publish(f"devices/{device_id}/hello") in ("Success", "No matching subscribers")
    client.close()
    client = device.client()  # with the new certificate
    assert deployment.call("POST", f"/devices/{device_id}/suspend").json()["broker"] == "enforced"
    client.close()
    assert "403" in run(deployment, renew).stderr
    assert deployment.call("POST", f"/devices/{device_id}/resume").status_code == 200
    device.client().close()
    assert run(deployment, renew).returncode == 0
    assert deployment.call("POST", f"/revoke/{device_id}", {}).json()["broker"] == "enforced"
    device.refusal()
    assert "403" in run(deployment, renew).stderr


def test_a_device_has_its_key_made(deployment: Deployment) -> None:
    *_, make_token, have_made = BLOCKS
    done = run(deployment, f"{make_token}mkdir made; mv other-token made; cd made\n{have_made}")
    assert done.returncode == 0, done.stderr
    folder = deployment.folder / "made"
    assert (folder / "device.key").stat().st_mode & 0o777 == 0o600
    assert not (folder / "answer").exists()
    (folder / "chain.pem").symlink_to("device.pem")
    [newest, *_] = deployment.call("GET", "/devices").json()["devices"]
    Onboarded(newest["device_id"], folder, deployment.mqtt_port).client().close()


CUTS = ("key", "request", "answer", "stored", "tried", "configured", "moved", "swapped")


def tool(deployment: Deployment, *options: str, cut: str = "") -> subprocess.CompletedProcess[str]:
    folder = deployment.folder / "tool"
    command = [str(ROOT / "device" / "enrol"), "--dir", str(folder), "--url", deployment.url, "--serial", "sn-9"]
    command += [
        "--ca",
        str(deployment.data / "ca.pem"),
        "--token-file",
        str(deployment.folder / "tool-token"),
        *options,
    ]
    environment = deployment.environment | {"ENROL_CUT_OFF_AT": cut}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_device_s_tool_survives_being_cut_off_at_any_step(deployment: Deployment) -> None:
    wanted = {"name": "a tool", "count": 1, "approval": "operator"}
    token = deployment.call("POST", "/enrolment-tokens", wanted).json()["token"]
    (deployment.folder / "tool-token").write_text("en_wrong")
    assert tool(deployment).returncode == 1
    (deployment.folder / "tool-token").write_text(token)
    assert tool(deployment).returncode == 75  # an operator has yet to approve it
    [pending] = deployment.call("GET", "/devices?status=pending").json()["devices"]
    path = f"/devices/{pending['device_id']}"
    assert deployment.call("POST", f"{path}/approve").status_code == 200
    current = deployment.folder / "tool" / "current"
    for cut in CUTS:  # each run begins where the one before was cut off
        assert tool(deployment, cut=cut).returncode == -9, cut
    assert tool(deployment).returncode == 0
    for cut in ("request", "answer", "stored", "moved"):  # no more: older certificates keep working for a while
        before = (current / "device.pem").read_text()
        assert tool(deployment, "--renew", cut=cut).returncode == -9, cut
        verify = ["openssl", "verify", "-CAfile", "ca.pem", "device.pem"]
        subprocess.run(verify, cwd=current, check=True, capture_output=True)
        assert tool(deployment).returncode == 0
        assert (current / "device.pem").read_text() != before
    assert (current / "device.key").stat().st_mode & 0o777 == 0o600
    (deployment.folder / "tool" / "current" / "chain.pem").symlink_to("device.pem")
    device = Onboarded(pending["device_id"], current, deployment.mqtt_port)
    device.client().close()


def test_the_device_s_tool_writes_what_mosquitto_s_client_needs_and_asks_again_after_a_day(device: Device) -> None:
    current = device.folder / "current"
    options = [word for line in (current / "mosquitto-client.conf").read_text().splitlines() for word in line.split()]
    options = options[options.index("-h") :]
    topic = f"devices/{device.id}/up"
    command = ["mosquitto_pub", *options, "-t", topic, "-m", "hello", "-q", "1", "-V", "mqttv5"]
    done = subprocess.run(command, cwd=current, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads((current / "config.json").read_text())
    assert said["publish"] == [f"devices/{device.id}/#"]
    assert {path.stat().st_mode & 0o777 for path in current.iterdir() if not path.is_symlink()} == {0o600}
    changed = {"topics": [{"filter": "devices/{id}/up/#", "access": "write"}]}
    assert device.deployment.call("PATCH", f"/devices/{device.id}", changed).status_code == 200
    assert device.enrol() == 0
    assert json.loads((current / "config.json").read_text()) == said
    yesterday = time.time() - 86401
    os.utime(current / "config.json", (yesterday, yesterday))
    assert device.enrol() == 0
    assert json.loads((current / "config.json").read_text())["publish"] == [f"devices/{device.id}/up/#"]


@pytest.mark.parametrize("kind", ["eat-jwt", "psa"])
def test_a_device_shows_evidence_that_a_program_of_its_own_makes(
    deployment: Deployment, tmp_path: Path, kind: str
) -> None:
    root_of_trust = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "root.pem").write_bytes(key_pem(root_of_trust))
    anchor = root_of_trust.public_key().public_bytes(PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    policy = {"mode": "require", "types": [kind], "anchors": [anchor], "on_renewal": True}
    answer = deployment.call("POST", "/enrolment-tokens", {"name": kind, "attestation": policy})
    (tmp_path / "token").write_text(answer.json()["token"])
    device = Device(deployment, tmp_path / "device")
    options = ("--attest", kind, "--evidence-program", str(script(tmp_path, kind, tmp_path / "root.pem")))
    assert device.enrol("--token-file", str(tmp_path / "token"), *options) == 0
    assert device.enrol("--renew") == 1  # evidence is required
    assert device.enrol("--renew", *options) == 0


# --- A device's whole life, by its own tool -----------------------------------------------------------------------

PUBLISHED = ("Success", "No matching subscribers")


@pytest.fixture
def device(deployment: Deployment, tmp_path: Path) -> Device:
    """A device that has enrolled by a token."""
    answer = deployment.call("POST", "/enrolment-tokens", {"name": "a batch", "name_template": "pump {serial}"})
    (tmp_path / "token").write_text(answer.json()["token"])
    one = Device(deployment, tmp_path / "device")
    assert one.enrol("--token-file", str(tmp_path / "token")) == 0
    subject = one.openssl("x509", "-in", "current/device.pem", "-noout", "-subject", "-nameopt", "multiline").stdout
    one.id = subject.rpartition("= ")[2].strip()
    return one


def test_a_device_lives_and_what_openssl_hears_of_it_agrees_at_every_step(
    deployment: Deployment, device: Device
) -> None:
    first = device.keep("first")
    assert deployment.call("GET", f"/devices/{device.id}").json()["name"] == "pump sn-7"
    client = device.connect()
    assert client.publish(f"devices/{device.id}/up") in PUBLISHED
    assert device.verdict(first) == "good"

    assert device.enrol("--renew") == 0  # while it is connected; the tool shows the new certificate to the portal
    second = device.keep("second")
    client.wait_cut()  # the session began with the certificate that has ended
    client.close()
    assert (device.verdict(first), device.verdict(second)) == ("superseded", "good")

    client = device.connect()
    client.close()
    assert device.enrol("--renew") == 0
    third = device.keep("third")
    assert (device.verdict(second), device.verdict(third)) == ("superseded", "good")
    client = device.connect()
    assert client.publish(f"devices/{device.id}/up") in PUBLISHED

    assert deployment.call("POST", f"/devices/{device.id}/suspend").json()["broker"] == "enforced"
    client.wait_cut()
    client.close()
    assert device.refusal()
    assert device.verdict(third) == "certificateHold"
    assert device.enrol("--renew") == 1

    assert deployment.call("POST", f"/devices/{device.id}/resume").json()["broker"] == "enforced"
    assert device.verdict(third) == "good"
    client = device.connect()
    assert client.publish(f"devices/{device.id}/up") in PUBLISHED

    answer = deployment.call("POST", f"/revoke/{device.id}", {"reason": "key_compromise"}).json()
    assert answer["broker"] == "enforced"
    client.wait_cut()
    client.close()
    assert device.refusal()
    assert [device.verdict(item) for item in (first, second, third)] == ["superseded", "superseded", "keyCompromise"]
    assert device.enrol("--renew") == 1


# --- TLS sessions -------------------------------------------------------------------------------------------------


def test_a_certificate_that_is_revoked_after_the_handshake_gets_nowhere_resumed_or_not(
    deployment: Deployment, device: Device
) -> None:
    certificate = device.keep("kept")
    context = ssl.create_default_context(cafile=str(deployment.data / "ca.pem"))
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    client = Connection(deployment, context)
    device.openssl("req", "-new", "-key", "kept.key", "-subj", f"/CN={device.id}", "-out", "kept.csr")
    request = (device.folder / "kept.csr").read_bytes()

    stays = client.open()
    assert client.ask(stays, "cacerts") == 200
    session = stays.session
    with client.open(session) as resumed:
        assert resumed.session_reused
        assert client.ask(resumed, "simplereenroll", request) == 200
        session = resumed.session or session
    assert deployment.call("POST", f"/revoke/{device.id}", {}).json()["broker"] == "enforced"

    assert client.ask(stays, "simplereenroll", request) == 403
    assert client.ask(stays, "serverkeygen", request) == 403
    stays.close()
    with client.open(session) as resumed:
        assert resumed.session_reused
        assert client.ask(resumed, "simplereenroll", request) == 403
    with client.open() as again:
        assert client.ask(again, "simplereenroll", request) == 403


def test_a_certificate_that_is_shown_in_a_resumed_session_counts_as_used(
    deployment: Deployment, device: Device
) -> None:
    first = device.keep("first")
    device.openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "new.key")
    device.openssl("req", "-new", "-key", "new.key", "-subj", f"/CN={device.id}", "-out", "new.csr")
    curl = ["curl", "-sS", "--fail", "--noproxy", "*", "--cacert", str(deployment.data / "ca.pem")]
    curl += ["--cert", "first.pem", "--key", "first.key", "-H", "Content-Type: application/pkcs10"]
    curl += ["--data-binary", "@new.csr", "-o", "new.b64", f"{deployment.url}/.well-known/est/simplereenroll"]
    subprocess.run(curl, cwd=device.folder, check=True, timeout=20)
    device.openssl("base64", "-d", "-in", "new.b64", "-out", "new.p7")
    device.openssl("pkcs7", "-inform", "DER", "-in", "new.p7", "-print_certs", "-out", "new.pem")
    context = ssl.create_default_context(cafile=str(deployment.data / "ca.pem"))
    context.load_cert_chain(device.folder / "new.pem", device.folder / "new.key")
    client = Connection(deployment, context)
    assert device.verdict(first) == "good"  # nobody has shown the new one yet
    with client.open() as began:
        assert client.ask(began, "nothing") == 404
        session = began.session
    assert device.verdict(first) == "good"  # nothing was asked that looks at a certificate
    with client.open(session) as resumed:
        assert resumed.session_reused
        assert client.ask(resumed, "cacerts") == 200
    assert device.verdict(first) == "superseded"
