"""What the command line says where something goes wrong."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from commands import client
from commands.output import clean
from tests.support.cli_session import Session
from tests.support.portal_stub import TOKEN, PortalStub, Reply, problem
from tests.support.ports import free_port

pytest_plugins = ("tests.support.cli_fixtures",)
REGISTER = ("register", "sensor-7", "--type", "thermometer", "--location", "Hall 2", "--firmware", "1.4.2")
UNKNOWN = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
EVIL = "\x1b]0;owned\x07\x1b[2Jname\r\n\u202egnp"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "malformed_request"),
        (401, "unauthenticated"),
        (403, "forbidden"),
        (404, "device_not_found"),
        (409, "conflict"),
        (410, "gone"),
        (413, "body_too_large"),
        (429, "too_many_requests"),
        (500, "internal_error"),
        (503, "unavailable"),
    ],
)
def test_a_refusal_is_a_sentence_and_a_request_id(status: int, code: str, session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/devices"] = problem(status, code, "This is why, and what to do.")
    result = session.run("list")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: This is why, and what to do.\n")
    assert result.stderr.endswith("Request id: request-1\n")
    shown = session.run("list", "--json")
    error = json.loads(shown.stderr)["error"]
    assert (error["status"], error["code"], error["request_id"]) == (status, code, "request-1")


def test_each_field_error_has_its_line(session: Session, stub: PortalStub) -> None:
    errors = [{"field": "name", "message": "is too long"}, {"field": "topics.0.filter", "message": "reaches too far"}]
    stub.replies["POST", "/register"] = problem(422, "invalid_input", "Two fields are wrong.", errors=errors)
    lines = session.run(*REGISTER, "--out", "sensor").stderr.splitlines()
    assert lines[:3] == [
        "Error: Two fields are wrong.",
        "  NAME: is too long",
        "  --topic (topics.0.filter): reaches too far",
    ]
    assert not Path("sensor").exists()


def test_field_errors_are_not_said_twice(session: Session, stub: PortalStub) -> None:
    errors = [{"field": "validity_days", "message": "must be 1 to 9"}, {"field": "location", "message": "is too long"}]
    detail = "The request has invalid fields: validity_days (must be 1 to 9), location (is too long)."
    stub.replies["POST", "/register"] = problem(422, "invalid_input", detail, errors=errors)
    assert session.run(*REGISTER, "--out", "sensor").stderr.splitlines()[:3] == [
        "Error: The portal does not accept these values:",
        "  --validity: must be 1 to 9",
        "  --location: is too long",
    ]


def test_a_field_is_never_named_after_a_connection_option(session: Session, stub: PortalStub) -> None:
    errors = [{"field": "url", "message": "must use port 443"}]
    stub.replies["POST", "/webhooks"] = problem(422, "invalid_input", "The url must use port 443.", errors=errors)
    stderr = session.run("webhook", "create", "x", "--target", "https://example.com:1", "--secret-out", "s").stderr
    assert "  --target: must use port 443\n" in stderr


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("30", "Try again in 30 seconds."),
        ("1", "Try again in 1 second."),
        (
            format_datetime(datetime(2099, 1, 2, 3, 4, 5, tzinfo=UTC), usegmt=True),
            "Try again after 2099-01-02 03:04:05 UTC.",
        ),
        ("Thu, 01 Jan 1970 00:00:00 GMT", "Try again now."),
        ("soon", None),
    ],
)
def test_retry_after_is_said(value: str, words: str | None, session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/devices"] = problem(429, "too_many", "Too many requests.", headers={"Retry-After": value})
    stderr = session.run("list").stderr
    assert (words in stderr) if words else ("Try again" not in stderr)


def test_a_refused_token_says_where_it_came_from(session: Session) -> None:
    assert "The token came from PORTAL_TOKEN." in session.run("list", env={"PORTAL_TOKEN": "wrong"}).stderr
    assert "The token came from --token." in session.run("list", "--token", "wrong").stderr


def test_a_refused_token_says_how_to_get_another(session: Session) -> None:
    assert ": . data/operator.env" in session.run("list", env={"PORTAL_TOKEN": "wrong"}).stderr
    assert "portal token create NAME" in session.run("list", "--token", "wrong").stderr


def test_a_portal_that_does_not_run_is_said_with_what_starts_it_on_this_machine(session: Session) -> None:
    here = f"https://127.0.0.1:{free_port()}"
    result = session.run("list", env={"PORTAL_URL": here})
    assert result.exit_code == 3
    assert f"The portal does not answer at {here}." in result.stderr
    assert "is started again with: scripts/run" in result.stderr


def test_a_portal_of_another_machine_is_not_started_here() -> None:
    late = requests.exceptions.ConnectTimeout()
    assert "scripts/run" not in str(client._connection_failure("https://portal.example.com", late).hints)
    assert "scripts/run" in str(client._connection_failure("https://localhost:8443", late).hints)


@pytest.mark.parametrize(
    ("reply", "exit_code"),
    [
        (Reply(200, b"<html>Log in to the hotel</html>", {"Content-Type": "text/html"}), 3),
        (Reply(200, b'{"devices": ['), 3),
        (Reply(200, b"[]"), 3),
        (Reply(200, b"\xff\xfe"), 3),
        (Reply(200, b"[" * 100_000), 3),
        (Reply(200, {"devices": "none"}), 3),
        (Reply(200, {"devices": [1]}), 3),
        (Reply(302, b"", {"Location": "https://evil.example/"}), 3),
        (Reply(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"}), 1),
        (Reply(500, b"[]", {"Content-Type": "application/problem+json"}), 1),
        (Reply(500, b"{", {"Content-Type": "application/problem+json"}), 1),
        (Reply(422, {"detail": 5, "errors": [{}, 7, {"field": None}]}), 1),
        (Reply(200, {"devices": [{}], "next_cursor": 7}, breaks_off=True), 3),
    ],
)
def test_an_answer_of_another_server_is_one_sentence(
    reply: Reply, exit_code: int, session: Session, stub: PortalStub
) -> None:
    stub.replies["GET", "/devices"] = reply
    result = session.run("list")
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.startswith("Error: ")
    assert "<html>" not in result.stderr


def test_an_answer_without_end_is_cut_off(session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER", 1000)
    stub.replies["GET", "/devices"] = Reply(200, b" " * 2000)
    assert session.run("list").exit_code == 3


def test_an_answer_that_lacks_what_is_needed_is_one_sentence(session: Session, stub: PortalStub) -> None:
    stub.replies["POST", "/register"] = Reply(201, {"device_id": UNKNOWN})
    result = session.run(*REGISTER, "--password-out", "password")
    assert result.exit_code == 3
    assert "no download_url" in result.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_portal_that_is_away_is_exit_status_3(options: tuple[str, ...], session: Session) -> None:
    result = session.run("list", "--url", "http://127.0.0.1:9", *options)
    assert result.exit_code == 3
    assert "http://127.0.0.1:9" in result.stderr


def test_an_unexpected_error_shows_no_traceback_and_no_secret(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError(TOKEN)

    monkeypatch.setattr(client.Client, "call", fail)
    result = session.run("list")
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr
    assert TOKEN not in result.output


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_no_text_of_the_portal_can_control_the_terminal(
    options: tuple[str, ...], session: Session, stub: PortalStub
) -> None:
    device_id = stub.add_device(EVIL, metadata={EVIL: EVIL}, type="\x9b31m", location="\ud800")
    stub.name_shown = EVIL
    outputs = [
        session.run(*words, *options).output
        for words in (("list",), ("show", device_id), (*REGISTER, "--password-out", "p" + "".join(options)))
    ]
    stub.replies["GET", "/devices"] = problem(422, EVIL, EVIL, errors=[{"field": EVIL, "message": EVIL}])
    outputs.append(session.run("list", *options).output)
    for output in outputs:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", output)


@pytest.mark.parametrize(
    ("dirty", "shown"),
    [
        ("plain", "plain"),
        ("Größe 漢字", "Größe 漢字"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\tb\nc\rd", r"a\tb\nc\rd"),
        ("\u202egnp", r"\u202egnp"),
        ("\x9b\x7f", r"\x9b\x7f"),
        ("\u2028\ud800", r"\u2028\ud800"),
        (None, "None"),
    ],
)
def test_clean_escapes_characters_that_control_a_terminal(dirty: object, shown: str) -> None:
    assert clean(dirty) == shown


@pytest.mark.parametrize(
    ("detail", "shown"),
    [
        (
            "No device has this id; check it with GET /devices.",
            "No device has this id; check it with portal list.",
        ),
        (
            "No token has this id; see GET /tokens.",
            "No token has this id; see portal token list.",
        ),
        ("The request cannot be read; see GET /docs for its form.", "The request cannot be read."),
        ("This device is revoked: call POST /devices/{id}/renew.", "This device is revoked."),
        ("A token is required: send it as Authorization: Bearer <token>.", "A token is required."),
        ("A sentence without a request.", "A sentence without a request."),
    ],
)
def test_a_request_that_the_portal_names_is_shown_as_a_command(
    detail: str, shown: str, session: Session, stub: PortalStub
) -> None:
    stub.replies["GET", "/devices"] = problem(404, "not_found", detail)
    assert session.run("list").stderr.startswith(f"Error: {shown}\n")
