"""The commands that suspend, resume and revoke a device, against a small portal."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply, problem

pytest_plugins = ("tests.support.cli_fixtures",)


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
def test_a_suspension_that_is_not_enforced_yet_causes_a_warning(
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


def test_a_revoked_device_is_not_resumed(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    refused = problem(409, "state_conflict", "A device that is revoked cannot become active.")
    stub.replies[("POST", f"/devices/{device_id}/resume")] = refused
    result = session.run("resume", device_id)
    assert result.exit_code == 1
    assert "revoked cannot become active" in result.stderr


def test_a_reason_that_is_not_taken_is_told(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    answer = {"device_id": device_id, "status": "revoked", "revoked_at": "2026-01-02T00:00:00Z", "broker": "enforced"}
    stub.replies["POST", f"/revoke/{device_id}"] = Reply(body=answer | {"reason": "key_compromise"})
    result = session.run("revoke", device_id, "--reason", "superseded", "--yes")
    assert "the reason stays key_compromise" in result.stderr
    assert "stays" not in session.run("revoke", device_id, "--reason", "key_compromise", "--yes").stderr


def test_a_revocation_without_a_terminal_needs_yes(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    result = session.run("revoke", device_id)
    assert (result.exit_code, stub.requests) == (2, [])
    assert "--yes" in result.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_revocation_that_is_not_enforced_yet_causes_a_warning(
    options: tuple[str, ...], session: Session, stub: PortalStub
) -> None:
    device_id = stub.add_device()
    stub.broker = "pending"
    result = session.run("revoke", device_id, "--yes", "--reason", "key_compromise", *options)
    assert result.exit_code == 0
    assert "THE BROKER DOES NOT ENFORCE THIS YET" in result.stderr
    assert stub.requests[-1].body == {"reason": "key_compromise"}


def test_an_enforced_revocation_says_so(session: Session, stub: PortalStub) -> None:
    result = session.run("revoke", stub.add_device(), "--yes")
    assert "broker\tenforced" in result.stdout
    assert "Warning" not in result.stderr
