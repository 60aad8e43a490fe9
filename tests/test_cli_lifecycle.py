"""The commands for a device's way through its life, against a small portal."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli_session import Session
from tests.portal_stub import PortalStub, Reply, problem

pytest_plugins = ("tests.cli_fixtures",)


def suspension(device_id: str, **changed: Any) -> Reply:
    answer = {"device_id": device_id, "status": "suspended", "suspended_at": "2026-01-02T00:00:00Z"}
    return Reply(body=answer | {"broker": "enforced", "broker_problem": None} | changed)


def test_a_suspension_says_that_it_is_enforced(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    stub.replies[("POST", f"/devices/{device_id}/suspend")] = suspension(device_id)
    result = session.run("suspend", device_id)
    assert "status\tsuspended" in result.stdout
    assert "Warning" not in result.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_suspension_that_is_not_enforced_yet_is_loud(
    options: tuple[str, ...], session: Session, stub: PortalStub
) -> None:
    device_id = stub.add_device()
    reply = suspension(device_id, broker="pending", broker_problem="The broker is not there.")
    stub.replies[("POST", f"/devices/{device_id}/suspend")] = reply
    result = session.run("suspend", device_id, *options)
    assert result.exit_code == 0
    assert "THE BROKER DOES NOT ENFORCE THIS YET" in result.stderr
    assert "The broker is not there." in result.stderr


def test_a_device_is_resumed(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    reply = suspension(device_id, status="active", suspended_at=None)
    stub.replies[("POST", f"/devices/{device_id}/resume")] = reply
    assert session.run("resume", device_id).stdout.splitlines()[1:] == ["status\tactive", "broker\tenforced"]


def test_a_revoked_device_stays_out(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    refused = problem(409, "state_conflict", "A device that is revoked cannot become active.")
    stub.replies[("POST", f"/devices/{device_id}/resume")] = refused
    result = session.run("resume", device_id)
    assert result.exit_code == 1
    assert "revoked cannot become active" in result.stderr
