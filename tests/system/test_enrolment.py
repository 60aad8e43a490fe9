"""Enrolment as docs/enrolment.md shows it, with curl and openssl against a real portal and a real broker."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.deployment import ROOT, Deployment, Onboarded, deployed

pytestmark = pytest.mark.system

BLOCKS = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "enrolment.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A portal where a device may renew from the first day on."""
    with deployed(PORTAL_RENEWAL_FROM="0") as running:
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
    make_token, enrol, renew = BLOCKS
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
