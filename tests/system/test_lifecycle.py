"""Devices suspended, resumed and renewed while they talk to the real broker."""

from __future__ import annotations

import time

import pytest

from tests.deployment import Deployment

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
