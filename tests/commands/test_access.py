"""The commands about operator tokens, against a small portal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)
UNKNOWN = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"


def test_a_new_token_is_shown_once_and_never_in_a_pipe(session: Session, stub: PortalStub) -> None:
    create = ("token", "create", "factory", "--role", "operator")
    assert session.run(*create).exit_code == 2
    assert stub.requests == []
    result = session.run(*create, "--days", "9", "--token-out", "token")
    assert "secret-of-new-token" not in result.output
    assert Path("token").read_text() == "secret-of-new-token\n"
    assert stub.requests[0].body == {"name": "factory", "role": "operator", "expires_in_days": 9}
    assert session.json(*create)["token"] == "secret-of-new-token"


def test_a_token_that_never_expires_is_said_to(session: Session, stub: PortalStub) -> None:
    create = ("token", "create", "factory", "--role", "operator", "--token-out")
    assert "It never expires; for one that does, add --expires-in 90d.\n" in session.run(*create, "endless").stderr
    made = {
        "token_id": UNKNOWN,
        "name": "factory",
        "role": "operator",
        "expires_at": "2036-01-01T00:00:00Z",
        "token": "x",
    }
    stub.replies["POST", "/tokens"] = Reply(201, made)
    assert "never expires" not in session.run(*create, "ending").stderr


def test_creating_a_token_is_repeated_with_the_same_key_if_the_connection_breaks(
    session: Session, stub: PortalStub
) -> None:
    takes_key = {"post": {"parameters": [{"name": "Idempotency-Key", "in": "header"}]}}
    stub.replies["GET", "/openapi.json"] = Reply(body={"paths": {"/tokens": takes_key}})
    stub.replies["POST", "/tokens"] = Reply(breaks_off=True, body=b"")
    assert session.run("token", "create", "x", "--role", "admin", "--token-out", "token").exit_code == 3
    assert len(stub.calls("POST", "/tokens")) > 1
    assert len({request.headers["Idempotency-Key"] for request in stub.calls("POST", "/tokens")}) == 1
    assert not Path("token").exists()


@pytest.mark.parametrize("described", [{"paths": {"/tokens": {"post": {"parameters": []}}}}, {"paths": {}}, {}])
def test_a_portal_that_would_create_a_second_token_is_asked_once(
    described: dict[str, object], session: Session, stub: PortalStub
) -> None:
    stub.replies["GET", "/openapi.json"] = Reply(body=described)
    stub.replies["POST", "/tokens"] = Reply(breaks_off=True, body=b"")
    result = session.run("token", "create", "x", "--role", "admin", "--token-out", "token")
    assert (result.exit_code, len(stub.calls("POST", "/tokens"))) == (3, 1)
    assert "see: portal token list" in result.stderr


def test_tokens_are_listed_and_revoked(session: Session) -> None:
    assert session.run("token", "list").stdout.split("\t")[:3] == [UNKNOWN, "factory", "operator"]
    assert session.run("token", "revoke", UNKNOWN).exit_code == 2
    assert session.run("token", "revoke", UNKNOWN, "--yes").exit_code == 0


def test_whose_token_of_a_login_it_is_is_listed_last(session: Session, stub: PortalStub) -> None:
    row = {"token_id": "1" * 16, "name": "Ada Lovelace", "role": "admin", "subject": "https://sso.example.com#ada"}
    stub.replies["GET", "/tokens"] = Reply(body={"tokens": [row]})
    assert session.run("token", "list").stdout.rstrip("\n").split("\t")[-1] == "https://sso.example.com#ada"


def test_a_revocation_says_which_enrolment_tokens_are_left_and_ends_them_if_asked_to(
    session: Session, stub: PortalStub
) -> None:
    answer = {"token_id": UNKNOWN, "name": "factory", "enrolment_tokens_revoked": 0, "enrolment_tokens_left": 2}
    stub.replies["DELETE", f"/tokens/{UNKNOWN}"] = Reply(body=answer)
    assert "can still enrol: 2" in session.run("token", "revoke", UNKNOWN, "--yes").stderr
    session.run("token", "revoke", UNKNOWN, "--yes", "--with-enrolment-tokens")
    assert stub.requests[-1].query == {"enrolment_tokens": "revoke"}
