"""Sessions of the console: begun by an operator token, found by a cookie, and ended for good."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta

import pytest
import sqlalchemy as sa
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from core.tenants import TenantStatus
from operations import jobs
from store import sessions, tenants
from store.session_tables import ConsoleSession
from store.tables import Token
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.harness import Api, Clock, api_as
from tests.web.api.test_suspended_tenants import set_status
from workflows.operators import new_token

ADMIN, AUDITOR = Role.ADMIN, Role.AUDITOR


def rows(app: Flask) -> list[sa.Row[tuple[ConsoleSession]]]:
    with portal_of(app).database.snapshot() as tx:
        return list(tx.execute(sa.select(ConsoleSession.__table__)).all())


def is_logged_in(browser: Browser) -> bool:
    answer = browser.get("/ui/sessions")
    assert answer.status_code in (200, 303)
    return bool(answer.status_code == 200)


def test_a_login_sets_a_cookie_that_scripts_and_other_sites_cannot_use_and_the_row_has_its_hash_alone(
    app: Flask,
) -> None:
    browser, token = Browser(app, agent="Mozilla/5.0 (X11) Firefox/140.0" + "x" * 300), api_as(app, ADMIN).token
    answer = browser.log_in(str(token), wanted="/ui/devices?status=active")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/devices?status=active")
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith("__Host-portal_session=")
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=Strict"} <= set(cookie.split("; "))
    assert "Domain" not in cookie
    (row,) = rows(app)
    assert row.secret_hash == hashlib.sha256(str(browser.cookie).encode()).hexdigest()
    assert str(browser.cookie) not in repr(row)
    assert row.expires_at - row.created_at == timedelta(hours=8)
    assert len(row.user_agent) == 200


def test_a_wrong_token_is_told_recorded_and_throttled_as_any_requests_is(
    make_settings: Callable[..., Settings],
) -> None:
    app = create_app(make_settings(PORTAL_LOGIN_FAILURES="2"), background=False)
    browser = Browser(app)
    for _ in range(2):
        answer = browser.log_in("op_wrong")
        assert answer.status_code == 401
        assert "This token is not valid here" in answer.text
        assert "op_wrong" not in answer.text
    assert browser.log_in("op_wrong").status_code == 429
    assert Api(app.test_client(), "op_wrong").get("/devices").status_code == 429
    api = api_as(app, ADMIN)
    assert browser.log_in(str(api.token)).status_code == 303  # a valid one is never throttled
    refused = [one for one in api.get("/audit").json["entries"] if one["action"] == "session:begin"]
    assert {one["outcome"] for one in refused[1:]} == {"refused"}
    portal_of(app).close()


def test_what_cannot_be_a_token_is_refused_with_the_form(app: Flask) -> None:
    for sent in ("", "   ", "x" * 1000):
        answer = Browser(app).log_in(sent)
        assert answer.status_code == 422
        assert "Enter an operator token." in answer.text


def test_a_session_ends_after_eight_hours_and_its_row_goes(app: Flask, clock: Clock, browser: Browser) -> None:
    clock.advance(hours=7, minutes=59)
    assert is_logged_in(browser)
    clock.advance(minutes=2)
    assert not is_logged_in(browser)
    jobs.expire(portal_of(app))
    assert rows(app) == []


def test_a_session_ends_with_its_token(app: Flask, clock: Clock) -> None:
    portal = portal_of(app)
    secret, record = new_token("default", "short", ADMIN, portal.clock() + timedelta(hours=1), now=portal.clock())
    with portal.database.transaction() as tx:
        tenants.add_token(tx, record, secret=secret)
    browser = Browser(app)
    browser.log_in(secret)
    assert rows(app)[0].expires_at == record.expires_at
    clock.advance(hours=1)
    assert not is_logged_in(browser)


def test_a_revoked_token_counts_no_more_at_once(app: Flask, browser: Browser) -> None:
    (row,) = rows(app)
    api = api_as(app, ADMIN)
    assert api.delete(f"/tokens/{row.token_id}").status_code == 200
    assert not is_logged_in(browser)


def test_a_role_that_was_taken_away_counts_no_more_at_once(app: Flask, browser: Browser) -> None:
    (row,) = rows(app)
    assert "Of other operators" not in browser.get("/ui/sessions").text
    logged_in_as(app, ADMIN)
    assert "Of other operators" in browser.get("/ui/sessions").text
    with portal_of(app).database.transaction() as tx:
        tx.execute(sa.update(Token).where(Token.id == row.token_id).values(role=AUDITOR))
    assert "Of other operators" not in browser.get("/ui/sessions").text


def test_the_cookie_of_a_session_that_was_logged_out_lets_nobody_in(app: Flask, browser: Browser) -> None:
    thief = Browser(app)
    thief.cookie = str(browser.cookie)
    assert is_logged_in(thief)
    answer = browser.post("/ui/logout")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/login")
    assert browser.cookie is None
    assert not is_logged_in(thief)
    assert rows(app) == []


def test_a_made_up_cookie_is_none(app: Flask, browser: Browser) -> None:
    for cookie in ("", "x", "a" * 43, "a" * 5000, "\u00e9" * 43, "' OR 1=1 --", str(browser.cookie)[:-1]):
        stranger = Browser(app)
        assert stranger.get("/ui/devices", headers={"Cookie": f"__Host-portal_session={cookie}"}).status_code == 303


def test_several_browsers_have_sessions_of_their_own_which_each_may_end(app: Flask) -> None:
    token = str(api_as(app, AUDITOR).token)
    here, there, elsewhere = Browser(app), Browser(app, agent="Mozilla/5.0 (iPhone) Safari/605"), Browser(app)
    for one in (here, there, elsewhere):
        one.log_in(token)
    page = text_of(here.get("/ui/sessions").text)
    assert (page.count("This one"), page.count("Safari on iPhone")) == (1, 1)
    ids = {row.user_agent: row.id for row in rows(app)}
    assert here.post(f"/ui/sessions/{ids[there.agent]}/end").headers["Location"] == "/ui/sessions"
    assert (is_logged_in(here), is_logged_in(there), is_logged_in(elsewhere)) == (True, False, True)
    assert here.post("/ui/sessions/end-all").headers["Location"] == "/ui/login"
    assert (is_logged_in(here), is_logged_in(elsewhere)) == (False, False)
    assert Api(app.test_client(), token).get("/devices").status_code == 200


def test_an_admin_ends_the_sessions_of_others_of_the_tenant_and_an_auditor_its_own(
    app: Flask, browser_of: Callable[..., Browser]
) -> None:
    auditor, admin, other = browser_of(AUDITOR), browser_of(ADMIN), browser_of(AUDITOR)
    token_of = {row.id: row.token_id for row in rows(app)}
    with portal_of(app).database.snapshot() as tx:
        found = sessions.find_session(tx, str(other.cookie))
    assert found is not None
    assert token_of[found[0].id] == found[1].id
    assert auditor.post(f"/ui/sessions/{found[0].id}/end").status_code == 404
    assert is_logged_in(other)
    assert admin.post(f"/ui/sessions/{found[0].id}/end").status_code == 303
    assert not is_logged_in(other)
    assert admin.post(f"/ui/sessions/{found[0].id}/end").status_code == 404
    assert admin.post("/ui/sessions/nonsense/end").status_code == 404


def test_what_happened_to_sessions_is_in_the_audit_record(app: Flask, browser: Browser) -> None:
    (row,) = rows(app)
    browser.post("/ui/logout")
    api = api_as(app, ADMIN)
    found = api.get(f"/audit?object=session:{row.id}").json["entries"]
    assert [one["action"] for one in found] == ["session:end", "session:begin"]
    assert all(row.token_id in one["actor"] for one in found)


def test_a_session_is_recorded_as_seen_once_a_minute(app: Flask, clock: Clock, browser: Browser) -> None:
    begun = rows(app)[0].last_seen_at
    clock.advance(seconds=50)
    browser.get("/ui/sessions")
    assert rows(app)[0].last_seen_at == begun
    clock.advance(seconds=20)
    browser.get("/ui/sessions")
    assert rows(app)[0].last_seen_at > begun


def test_of_many_sessions_of_a_token_the_oldest_end(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    token = str(api_as(app, ADMIN).token)
    browsers = [Browser(app) for _ in range(4)]
    other = logged_in_as(app, ADMIN)
    for one in browsers:
        one.log_in(token)
    assert [is_logged_in(one) for one in browsers] == [False, True, True, True]
    assert is_logged_in(other)


def test_a_browser_with_a_session_of_a_suspended_tenant_can_log_in_for_another_one(app: Flask) -> None:
    token, other = api_as(app, ADMIN, "acme").token, api_as(app, ADMIN).token
    assert token
    assert other
    browser = Browser(app)
    assert browser.log_in(token).status_code == 303
    set_status(portal_of(app), TenantStatus.SUSPENDED)
    assert browser.get("/ui/devices").status_code == 403
    assert browser.get("/ui/login").status_code == 200
    assert browser.log_in(token).status_code == 303  # to a page that says why it is refused
    assert browser.get("/ui/devices").status_code == 403
    assert browser.log_in(other).status_code == 303
    assert browser.get("/ui/devices").status_code == 200
