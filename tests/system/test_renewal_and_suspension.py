"""Devices suspended, resumed and renewed while they talk to the real broker."""

from __future__ import annotations

import json
import time

import pytest

from tests.support.deployment import Deployment, Onboarded

pytestmark = pytest.mark.system


def test_a_suspended_device_is_cut_off_and_comes_back_within_a_second(deployment: Deployment) -> None:
    device, other = deployment.onboard("lost"), deployment.onboard("other")
    client, stays = device.client(), other.client()
    assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
    deployment.wait_ready()

    done = deployment.cli("suspend", device.id)
    assert "broker\tenforced" in done.stdout
    client.wait_cut()
    client.close()
    assert device.refusal()
    assert stays.publish(f"devices/{other.id}/up") in ("Success", "No matching subscribers")

    started = time.monotonic()
    assert deployment.call("POST", f"/devices/{device.id}/resume").json()["broker"] == "enforced"
    client = device.client()
    assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
    assert time.monotonic() - started < 1
    client.close()

    assert deployment.call("POST", f"/devices/{device.id}/suspend").json()["broker"] == "enforced"
    assert deployment.call("POST", f"/revoke/{device.id}").json()["broker"] == "enforced"
    assert deployment.call("POST", f"/devices/{device.id}/resume").status_code == 409
    assert device.refusal()
    stays.close()


def test_a_device_renews_while_it_is_connected_and_both_certificates_work(deployment: Deployment) -> None:
    device = deployment.onboard("renewed")
    client = device.client()
    out = deployment.folder / f"renewed-{device.id}"
    deployment.cli("renew", device.id, "--out", str(out))
    newer = Onboarded(device.id, out, deployment.mqtt_port)
    assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
    client.close()
    for held in (newer, device):
        client = held.client()
        assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
        client.close()

    # Again, and the older ones end at once: the session that one of them began is cut, the newest continues.
    client = device.client()
    out = deployment.folder / f"again-{device.id}"
    answer = deployment.cli("renew", device.id, "--overlap-hours", "0", "--out", str(out), "--json").stdout
    assert json.loads(answer)["broker"] == "enforced"
    client.wait_cut()
    client.close()
    for held in (device, newer):
        assert held.refusal()
    client = Onboarded(device.id, out, deployment.mqtt_port).client()
    assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
    client.close()
