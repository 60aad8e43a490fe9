"""Spans of time are written in one form, whatever unit the portal counts in."""

from __future__ import annotations

import pytest

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)
TOKEN = {"token_id": "1e66977361d81fe2", "enrolment_token_id": "1e66977361d81fe2", "token": "secret", "name": "x"}


@pytest.mark.parametrize(
    ("command", "path", "field", "sent"),
    [
        ("token create x --role admin --expires-in 90d", "/tokens", "expires_in_days", 90),
        ("token create x --role admin --expires-in 48h", "/tokens", "expires_in_days", 2),
        ("token create x --role admin --days 90", "/tokens", "expires_in_days", 90),
        ("enrolment create x --expires-in 3d", "/enrolment-tokens", "expires_in_hours", 72),
        ("enrolment create x --hours 72", "/enrolment-tokens", "expires_in_hours", 72),
        ("enrolment create x --validity 2w", "/enrolment-tokens", "validity_days", 14),
        ("profile add x --max-validity 90d --default-validity 720h", "/profiles", "max_days", 90),
    ],
)
def test_a_span_is_sent_in_the_portal_s_unit(
    session: Session, stub: PortalStub, command: str, path: str, field: str, sent: int
) -> None:
    stub.replies["POST", path] = Reply(201, TOKEN)
    session.run(*command.split(), "--json")
    assert stub.calls("POST", path)[-1].body[field] == sent


@pytest.mark.parametrize("span", ["12h", "0d", "36501d", "1.5d", "d", "-3d", "90 d", "٩d", "9999999d"])
def test_what_is_no_whole_number_of_days_is_refused(session: Session, stub: PortalStub, span: str) -> None:
    result = session.run("profile", "add", "x", "--max-validity", span)
    assert (result.exit_code, stub.requests) == (2, [])
    assert "use " in result.stderr
