"""Enrolment as docs/enrolment.md shows it, with curl and openssl against a real portal and a real broker."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.deployment import ROOT, Deployment, Onboarded, deployed

pytestmark = pytest.mark.system

BLOCKS = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "enrolment.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A portal where a device may renew from the first day on."""
    with deployed(PORTAL_RENEWAL_FROM="0", PORTAL_VENV=sys.prefix) as running:
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


def test_a_device_enrols_publishes_renews_is_put_out(deployment: Deployment) -> None:
    make_token, enrol, renew, _ = BLOCKS
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
    make_token, _, _, have_made = BLOCKS
    done = run(
        deployment, f"rm -f enrolment-token\n{make_token}mkdir made; mv enrolment-token made; cd made\n{have_made}"
    )
    assert done.returncode == 0, done.stderr
    folder = deployment.folder / "made"
    assert (folder / "device.key").stat().st_mode & 0o777 == 0o600
    assert not (folder / "answer").exists()
    (folder / "chain.pem").symlink_to("device.pem")
    [newest, *_] = deployment.call("GET", "/devices").json()["devices"]
    Onboarded(newest["device_id"], folder, deployment.mqtt_port).client().close()


CUTS = ("key", "request", "answer", "stored", "tried", "moved", "swapped")


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
    for cut in ("request", "answer", "stored", "moved"):  # no more: older certificates go on for a while
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
