"""An address with too many failed logins has to wait; a valid token never has to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from core.throttle import RECORDED_OF_AN_ADDRESS
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, problem_of

pytestmark = ON_SQLITE

LIMIT = 7
GUESS = "op_guess"
UNSIGNED = "/download/" + "a" * 60


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Flask]:
    built = create_app(make_settings(PORTAL_LOGIN_FAILURES=str(LIMIT)), background=False, clock=clock)
    yield built
    portal_of(built).close()


@pytest.fixture
def admin(app: Flask) -> Api:
    return api_as(app, Role.ADMIN)


def get(app: Flask, path: str = "/devices", *, token: str | None = GUESS, address: str = "192.0.2.7") -> Any:
    return Api(app.test_client(), token).get(path, environ_base={"REMOTE_ADDR": address})


def fail(app: Flask, times: int = LIMIT, **options: Any) -> None:
    for _ in range(times):
        problem_of(get(app, **options), 401, "unauthenticated")


def audited(app: Flask) -> list[Any]:
    """Return the refused logins in the audit record, newest first."""
    entries = portal_of(app).operators.audit("default", limit=200, before=None, filters={"outcome": "refused"})[0]
    return [entry for entry in entries if entry.action != "bundle:fetch"]


@pytest.mark.parametrize("token", [GUESS, None])
def test_too_many_failed_logins_get_429_with_retry_after(app: Flask, token: str | None) -> None:
    fail(app, token=token)
    answer = get(app, token=token)
    problem = problem_of(answer, 429, "too_many_attempts")
    wait = int(answer.headers["Retry-After"])
    assert 1 <= wait <= 60
    assert f"{wait} seconds" in problem["detail"]


def test_a_valid_token_is_never_throttled(app: Flask, admin: Api) -> None:
    fail(app)
    for _ in range(3):
        assert get(app).status_code == 429
        assert get(app, token=admin.token).status_code == 200


def test_a_valid_token_between_the_guesses_does_not_let_more_of_them_through(app: Flask, admin: Api) -> None:
    for _ in range(LIMIT):
        assert get(app).status_code == 401
        assert get(app, token=admin.token).status_code == 200
    assert get(app).status_code == 429


def test_bulk_work_with_a_valid_token_is_not_throttled(app: Flask, admin: Api) -> None:
    assert {get(app, token=admin.token).status_code for _ in range(5 * LIMIT)} == {200}
    assert {get(app, "/ca.pem", token=None).status_code for _ in range(5 * LIMIT)} == {200}


def test_an_address_recovers_by_itself(app: Flask, clock: Clock) -> None:
    fail(app)
    wait = int(get(app).headers["Retry-After"])
    clock.advance(seconds=wait - 30)
    assert get(app).status_code == 429
    clock.advance(seconds=31)
    fail(app)


def test_other_addresses_are_not_affected_but_those_of_the_same_64_network_are(app: Flask) -> None:
    fail(app, address="2001:db8::1")
    assert get(app, address="2001:db8::abcd").status_code == 429
    assert get(app, address="2001:db8:0:1::1").status_code == 401
    assert get(app, address="192.0.2.7").status_code == 401


def test_unknown_links_count_as_failed_logins(app: Flask, admin: Api) -> None:
    for _ in range(LIMIT):
        problem_of(get(app, UNSIGNED, token=None), 404, "link_unknown")
    problem_of(get(app, UNSIGNED, token=None), 429, "too_many_attempts")
    assert get(app).status_code == 429
    link = admin.register()["download_url"]
    assert get(app, re.sub(r"^https://[^/]+", "", link), token=None).status_code == 200


def test_used_links_do_not_count_and_do_not_fill_the_record(app: Flask, admin: Api) -> None:
    link = re.sub(r"^https://[^/]+", "", admin.register()["download_url"])
    assert get(app, link, token=None).status_code == 200
    assert {get(app, link, token=None).status_code for _ in range(3 * LIMIT)} == {410}
    assert get(app).status_code == 401
    entries = portal_of(app).operators.audit("default", limit=200, before=None, filters={"action": "bundle:fetch"})[0]
    assert len([entry for entry in entries if entry.outcome == "refused"]) == RECORDED_OF_AN_ADDRESS


def test_a_flood_leaves_a_few_entries_in_the_audit_record_and_a_summary(app: Flask, clock: Clock) -> None:
    for _ in range(200):
        get(app)
    assert len(audited(app)) == RECORDED_OF_AN_ADDRESS
    for _ in range(2):
        portal_of(app).operators.record_the_rest(portal_of(app).first_tenant)
    summary, *others = audited(app)
    assert len(others) == RECORDED_OF_AN_ADDRESS
    assert (summary.action, summary.actor, summary.outcome) == ("access:throttle", "portal", "refused")
    unrecorded = 200 - RECORDED_OF_AN_ADDRESS
    assert summary.detail == {"count": unrecorded, "most": {"192.0.2.7": unrecorded}}


def test_the_interface_says_where_429_may_come(app: Flask) -> None:
    paths = get(app, "/openapi.json", token=None).json["paths"]
    for path, methods in paths.items():
        for operation in methods.values():
            shows_secret = path.endswith(("/csrattrs", "enroll", "/serverkeygen", "/download/{token}", "/oidc/tokens"))
            takes_share = path == "/.well-known/onboarding/config"
            may = bool(operation["security"]) or shows_secret or takes_share
            assert ("429" in operation["responses"]) == may
            if may:
                assert "Retry-After" in operation["responses"]["429"]["headers"]
