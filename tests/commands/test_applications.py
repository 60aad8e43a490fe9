"""The commands about applications, against a small portal."""

from __future__ import annotations

import pytest

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply, build_bundle, device_files, problem

pytest_plugins = ("tests.support.cli_fixtures",)

ID = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
PATH = f"/applications/{ID}"
APPLICATION = {
    "application_id": ID,
    "name": "store",
    "status": "active",
    "expires_at": "2036-01-01T00:00:00Z",
    "topics": [{"filter": "devices/+/telemetry", "access": "read"}],
    "connection": None,
}


def test_add_sends_name_and_topics_and_shows_link_and_password(session: Session, stub: PortalStub) -> None:
    issued = {"download_url": f"{stub.url}/download/x", "bundle_password": "a secret"}
    stub.replies["POST", "/applications"] = Reply(201, APPLICATION | issued)
    result = session.run(
        "application", "add", "store", "--topic", "devices/+/telemetry:read", "--topic", "devices/+/command:write",
        "--key-type", "ed25519", "--password-out", "password",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    [request] = stub.calls("POST", "/applications")
    assert request.body == {
        "name": "store",
        "key_type": "ed25519",
        "topics": [
            {"filter": "devices/+/telemetry", "access": "read"},
            {"filter": "devices/+/command", "access": "write"},
        ],
    }
    assert len(request.headers["Idempotency-Key"]) >= 16
    assert f"application_id\t{ID}" in result.stdout
    assert f"download_url\t{stub.url}/download/x" in result.stdout


def test_what_is_unpacked_is_called_an_application(session: Session, stub: PortalStub) -> None:
    link = stub.add_link(build_bundle(device_files(stub.pki, ID), password="a secret"))
    stub.replies["POST", "/applications"] = Reply(
        201, APPLICATION | {"download_url": link, "bundle_password": "a secret"}
    )
    result = session.run("application", "add", "store", "--topic", "devices/#:read", "--out", "back-end")
    assert result.exit_code == 0, result.stderr
    assert f"application_id\t{ID}" in result.stdout
    assert "device_id" not in result.stdout


@pytest.mark.parametrize("topics", [(), ("--topic", "devices/#"), ("--topic", "devices/#:all")])
def test_add_needs_topics_with_their_access(session: Session, stub: PortalStub, topics: tuple[str, ...]) -> None:
    result = session.run("application", "add", "store", *topics)
    assert (result.exit_code, stub.requests) == (2, [])
    assert "--topic" in result.stderr


def test_a_refusal_is_shown_in_the_portals_words(session: Session, stub: PortalStub) -> None:
    said = "topics.0.filter must begin with devices/ and have a level after it."
    stub.replies["POST", "/applications"] = problem(422, "topic_refused", said)
    result = session.run("application", "add", "store", "--topic", "#:read", "--password-out", "password")
    assert result.exit_code == 1
    assert said in result.stderr


def test_a_list_is_a_line_each_in_a_pipe_and_the_answer_as_json(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/applications"] = Reply(body={"applications": [APPLICATION], "next_cursor": None})
    line = f"{ID}\tstore\tactive\t2036-01-01T00:00:00Z\tnever\tdevices/+/telemetry:read\n"
    assert session.run("application", "list").stdout == line
    assert session.json("application", "list")["applications"] == [APPLICATION]
    session.run("application", "list", "--status", "revoked", "--q", "x")
    query = stub.calls("GET", "/applications")[-1].query
    assert (query["status"], query["q"]) == ("revoked", "x")


def test_an_update_sends_what_is_to_change_and_needs_something(session: Session, stub: PortalStub) -> None:
    stub.replies["PATCH", PATH] = Reply(body=APPLICATION | {"broker": "pending"})
    result = session.run("application", "update", ID, "--topic", "devices/#:read")
    assert stub.calls("PATCH", PATH)[0].body == {"topics": [{"filter": "devices/#", "access": "read"}]}
    assert "The broker does not enforce this yet." in result.stderr
    assert session.run("application", "update", ID).exit_code == 2


@pytest.mark.parametrize(("broker", "warned"), [("enforced", False), ("pending", True)])
def test_a_revocation_gives_the_reason_and_says_whether_it_is_enforced(
    session: Session, stub: PortalStub, broker: str, warned: bool
) -> None:
    answer = APPLICATION | {"status": "revoked", "reason": "key_compromise", "broker": broker}
    stub.replies["DELETE", PATH] = Reply(body=answer)
    assert session.run("application", "revoke", ID).exit_code == 2  # without a terminal it needs --yes
    result = session.run("application", "revoke", ID, "--reason", "key_compromise", "--yes")
    assert result.exit_code == 0
    assert stub.calls("DELETE", PATH)[0].query == {"reason": "key_compromise"}
    assert f"application_id\t{ID}" in result.stdout
    assert ("the application may still be connected" in result.stderr) is warned


def test_an_application_is_called_by_its_name_or_the_beginning_of_its_id(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", PATH] = Reply(body=APPLICATION)
    stub.replies["GET", "/applications/-"] = Reply(body=APPLICATION)
    assert session.json("application", "show", "store")["application_id"] == ID
    assert stub.calls("GET", "/applications/-")[0].query == {"name": "store"}
    stub.replies["GET", "/applications/-"] = problem(404, "application_not_found", "No application has this name.")
    stub.replies["GET", f"/applications/{ID[:8]}"] = Reply(body=APPLICATION)
    assert session.json("application", "show", ID[:8])["application_id"] == ID
    result = session.run("application", "show", "nobody")
    assert (result.exit_code, "No application has this name." in result.stderr) == (1, True)
    stub.replies["GET", "/applications/-"] = problem(409, "name_ambiguous", f"Several applications ({ID}).")
    assert ID in session.run("application", "revoke", "store", "--yes").stderr
    assert stub.calls("DELETE", PATH) == []
