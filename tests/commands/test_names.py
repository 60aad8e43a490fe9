"""A device is named by what people call it."""

from __future__ import annotations

import pytest

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)

ANSWER = {"status": "active", "broker": "enforced", "suspended_at": None, "download_url": "x", "bundle_password": "p"}


@pytest.mark.parametrize(
    ("command", "method", "path"),
    [
        ("show", "GET", "/devices/{}"),
        ("update --location there", "PATCH", "/devices/{}"),
        ("certificates", "GET", "/devices/{}/certificates"),
        ("suspend", "POST", "/devices/{}/suspend"),
        ("resume", "POST", "/devices/{}/resume"),
        ("revoke --yes", "POST", "/revoke/{}"),
        ("renew --json", "POST", "/devices/{}/renew"),
        ("reject --yes", "POST", "/devices/{}/reject"),
    ],
)
def test_every_command_takes_a_name_an_external_id_and_the_beginning_of_an_id(
    session: Session, stub: PortalStub, command: str, method: str, path: str
) -> None:
    device_id = stub.add_device("pump 1", external_id="line-4/1")
    stub.add_device("pump 2")
    stub.replies[method, path.format(device_id)] = Reply(body=ANSWER | {"device_id": device_id, "certificates": []})
    for name in ("pump 1", "line-4/1", device_id[:8], device_id, device_id.upper()):
        first, *options = command.split()
        assert session.run(first, name, *options).exit_code == 0
    assert len(stub.calls(method, path.format(device_id))) == 5


def test_an_ambiguous_name_lists_the_candidates_and_changes_nothing(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device("pump", external_id=f"line-4/{number}") for number in range(2)]
    result = session.run("revoke", "pump", "--yes")
    assert result.exit_code == 1
    assert [f"{device_id}  pump  line-4/{number}" in result.stderr for number, device_id in enumerate(ids)] == [
        True
    ] * 2
    assert [request.method for request in stub.requests] == ["GET"]


def test_a_name_that_no_device_has_is_not_repeated(session: Session, stub: PortalStub) -> None:
    result = session.run("show", "perhaps-a-secret")
    assert result.exit_code == 1
    assert "No device has this name" in result.stderr
    assert "perhaps-a-secret" not in result.stderr
    assert session.run("show", "a\x1b[2J").exit_code == 2
    assert session.run("show", " ").exit_code == 2
    assert len(stub.requests) == 1


def test_an_answer_without_a_device_id_is_not_acted_on(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/devices"] = Reply(body={"devices": [{"name": "pump", "device_id": "../tokens"}]})
    assert session.run("revoke", "pump", "--yes").exit_code == 1
    assert [request.method for request in stub.requests] == ["GET"]


def test_devices_of_one_name_are_told_apart_by_place_and_status(session: Session, stub: PortalStub) -> None:
    stub.add_device("pump", location="Hall 1", status="revoked")
    stub.add_device("pump", location="Hall 2")
    said = session.run("show", "pump").stderr
    assert "Hall 1  revoked" in said
    assert "Hall 2  active" in said


@pytest.mark.parametrize(("command", "said"), [("suspend", "Suspended pump"), ("revoke --yes", "Revoked pump")])
def test_what_was_done_names_the_device_as_it_was_named(
    session: Session, stub: PortalStub, command: str, said: str
) -> None:
    device_id = stub.add_device("pump")
    for path in (f"/devices/{device_id}/suspend", f"/revoke/{device_id}"):
        stub.replies["POST", path] = Reply(body=ANSWER | {"device_id": device_id})
    first, *options = command.split()
    assert said in session.run(first, "pump", *options).stderr
