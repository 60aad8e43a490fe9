"""Who may ask the console for what: its own pages alone, in a session, with the role for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from urllib.parse import quote

import pytest
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import MAY, Role
from tests.support.browser import ORIGIN, Browser, logged_in_as
from tests.support.harness import ON_SQLITE, api_as
from tests.support.tenants import add_tenant
from web.console.pages import local_path
from web.console.screens import PAGES

pytestmark = ON_SQLITE
ELSEWHERE = (
    "https://evil.example/", "//evil.example", "/\\evil.example", "/ui/../..//evil.example", "/uievil", "/ui//evil",
    "/ui/%2e%2e/", "/ui\r\nSet-Cookie: a=b", "javascript:alert(1)", "/download/x", "ui", "/ui/" + "a" * 4000,
    "/ui/login?next=/ui", "\x00", "",
)  # fmt: skip
SOMETHING = {"device_id": "3f2b8c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b"}


def path_of(rule: str) -> str:
    """A path that a rule of Flask or of a page matches."""
    return re.sub(r"[<{](?:\w+:)?(\w+)[>}]", lambda part: SOMETHING.get(part[1], "0" * 16), rule)


def rules_of_console(app: Flask) -> Iterator[tuple[str, str]]:
    for rule in app.url_map.iter_rules():
        if rule.rule == "/" or rule.rule.startswith("/ui"):
            yield from ((method, rule.rule) for method in (rule.methods or set()) - {"HEAD", "OPTIONS"})


def test_nothing_of_the_console_answers_without_a_session_but_the_login_and_the_static_files(shared_app: Flask) -> None:
    stranger, seen = Browser(shared_app), 0
    for method, rule in rules_of_console(shared_app):
        if rule.startswith(("/ui/static/", "/ui/login")):
            continue
        path = path_of(rule)
        answer = stranger.get(path) if method == "GET" else stranger.post(path, token=None)
        assert answer.status_code == 303, (method, path)
        assert answer.headers["Location"].startswith(("/ui/login?next=", "/ui")), path
        assert not answer.data
        seen += 1
    assert seen > 5
    assert stranger.get("/ui").headers["Location"] == "/ui/login?next=%2Fui"


def test_the_root_leads_to_the_console(shared_app: Flask) -> None:
    answer = Browser(shared_app).get("/")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui")


def test_a_console_that_is_off_is_not_there(make_settings: Callable[..., Settings]) -> None:
    app = create_app(make_settings(PORTAL_CONSOLE="off"), background=False)
    api = api_as(app, Role.ADMIN)
    for path in ("/", "/ui", "/ui/login", "/ui/devices"):
        answer = api.get(path)
        assert (answer.status_code, answer.content_type) == (404, "application/problem+json")
    assert list(rules_of_console(app)) == []
    portal_of(app).close()


def test_the_console_is_not_served_at_the_plain_listener(shared_app: Flask) -> None:
    for path in ("/", "/ui", "/ui/login", "/ui/static/x/console.css"):
        answer = shared_app.test_client().get(path, environ_overrides={"portal.listener": "pki"})
        assert (answer.status_code, answer.content_type) == (404, "application/problem+json")


def test_each_answer_forbids_frames_other_hosts_and_being_kept(app: Flask, browser: Browser) -> None:
    pages = [Browser(app).get(path) for path in ("/ui", "/ui/login")]
    pages += [browser.get(path) for path in ("/ui/devices", "/ui/sessions", "/ui/nothing")]
    for answer in pages:
        policy = answer.headers["Content-Security-Policy"].split("; ")
        assert policy[0] == "default-src 'none'"
        assert {"script-src 'self'", "style-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= {*policy}
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://(?!localhost)", answer.text)


def test_a_form_without_the_token_of_its_session_changes_nothing(
    app: Flask, browser_of: Callable[..., Browser]
) -> None:
    browser, other = browser_of(), browser_of()
    sent = (None, "", "0" * 64, "\u00e9", other.form_token())
    for token in sent:
        answer = browser.post("/ui/sessions/end-all", token=token)
        assert answer.status_code == 403
        assert "This page is of an earlier session" in answer.text
        assert browser.get("/ui/sessions").status_code == 200
    refused = api_as(app, Role.ADMIN).get("/audit?action=POST%20/ui/sessions/end-all").json["entries"]
    assert [one["outcome"] for one in refused] == ["refused"] * len(sent)


ORIGINS: tuple[tuple[dict[str, str], bool], ...] = (
    ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, True),  # Origin says nothing more then
    ({"Sec-Fetch-Site": "cross-site", "Origin": ORIGIN}, False),
    ({"Sec-Fetch-Site": "same-site", "Origin": ORIGIN}, False),
    ({"Sec-Fetch-Site": "none", "Origin": ORIGIN}, False),
    ({"Origin": ORIGIN}, True),
    ({"Origin": "https://localhost.example"}, False),
    ({"Origin": "https://localhost:8443"}, False),
    ({"Origin": "null"}, False),
    ({"Origin": "https://[localhost"}, False),
    ({}, False),
)


def test_a_request_that_another_site_makes_is_refused_though_it_has_cookie_and_token(shared_app: Flask) -> None:
    for headers, allowed in ORIGINS:
        browser = logged_in_as(shared_app, Role.AUDITOR)
        sent = {"form_token": browser.form_token()}
        answer = browser.client.post("/ui/logout", base_url=ORIGIN, headers=headers, data=sent)
        assert answer.status_code == (303 if allowed else 403), headers


def test_a_login_that_another_site_makes_is_refused(shared_app: Flask) -> None:
    token = str(api_as(shared_app, Role.ADMIN).token)
    answer = Browser(shared_app).log_in(
        token, headers={"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    )
    assert answer.status_code == 403
    assert "Set-Cookie" not in answer.headers


def test_a_login_leads_nowhere_else(shared_app: Flask) -> None:
    token = str(api_as(shared_app, Role.ADMIN).token)
    for wanted in ELSEWHERE:
        browser = Browser(shared_app)
        assert 'name="next" value="/ui"' in browser.get(f"/ui/login?next={quote(wanted)}").text, wanted
        assert browser.log_in(token, wanted=wanted).headers["Location"] == "/ui", wanted
        assert browser.get(f"/ui/login?next={quote(wanted)}").headers["Location"] == "/ui", wanted


def test_a_login_leads_back_to_the_page_that_was_wanted(shared_app: Flask) -> None:
    browser = Browser(shared_app)
    answer = browser.get("/ui/devices?q=%C3%A4&status=active")
    assert answer.headers["Location"] == "/ui/login?next=%2Fui%2Fdevices%3Fq%3D%25C3%25A4%26status%3Dactive"
    assert local_path("/ui/devices?q=%C3%A4&status=active") == "/ui/devices?q=%C3%A4&status=active"
    answer = browser.get("/ui/devices?status=active", htmx=True)
    assert answer.status_code == 401
    assert answer.headers["HX-Redirect"] == "/ui/login?next=%2Fui%2Fdevices%3Fstatus%3Dactive"
    headers = {"HX-Request": "true", "HX-Current-URL": "https://[localhost/ui"}
    assert browser.get("/ui/devices", headers=headers).headers["HX-Redirect"] == "/ui/login?next=%2Fui"


def test_a_link_on_another_site_which_brings_no_cookie_is_opened_once_more(browser: Browser) -> None:
    arrival = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    secret = browser.cookie
    browser.client.delete_cookie("__Host-portal_session", domain="localhost")
    answer = browser.get("/ui/devices?status=active", headers=arrival)
    assert answer.status_code == 200
    assert 'http-equiv="refresh" content="0;url=/ui/devices?status=active"' in answer.text
    browser.cookie = str(secret)
    assert browser.get("/ui/devices?status=active").status_code == 200


def test_a_role_without_the_permission_is_refused_the_page_and_not_shown_the_way(
    browser_of: Callable[..., Browser],
) -> None:
    for role in Role:
        if role is Role.SYSTEM:
            continue
        browser = browser_of(role)
        shown = browser.get("/ui/sessions").text
        for page in PAGES:
            allowed = page.permission is None or page.permission in MAY[role]
            if page.method == "GET" and "{" not in page.path:
                assert (browser.get(page.path).status_code == 403) is (not allowed), (role, page.path)
                assert allowed or f'href="{page.path}"' not in shown
            elif not allowed:
                answer = browser.get(path_of(page.path)) if page.method == "GET" else browser.post(path_of(page.path))
                assert answer.status_code == 403, (role, page.path)


def test_another_tenants_ids_are_not_found(make_settings: Callable[..., Settings]) -> None:
    app = create_app(make_settings(PORTAL_BROKER_CONTROL="guard"), background=False)
    add_tenant(portal_of(app), "acme")
    device_id = api_as(app, Role.ADMIN).register()["device_id"]
    own, other = logged_in_as(app, Role.ADMIN), logged_in_as(app, Role.ADMIN, "acme")
    assert own.get(f"/ui/devices/{device_id}").status_code == 200
    answer = other.get(f"/ui/devices/{device_id}")
    assert answer.status_code == 404
    assert "pump-1" not in answer.text
    assert "pump-1" in own.get("/ui/devices").text
    assert "No devices yet" in other.get("/ui/devices").text
    portal_of(app).close()


def test_an_error_is_a_page_with_its_request_id_and_a_way_back(browser: Browser) -> None:
    answer = browser.get("/ui/devices/3f2b8c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b")
    assert answer.status_code == 404
    assert answer.content_type == "text/html; charset=utf-8"
    assert answer.headers["X-Request-Id"] in answer.text
    assert 'href="/ui"' in answer.text
    part = browser.get("/ui/devices?sort=nonsense", htmx=True)
    assert part.status_code == 422
    assert "<html" not in part.text
    assert 'role="alert"' in part.text


def test_an_error_that_was_not_foreseen_tells_nothing_of_itself(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr("workflows.devices.Inventory.devices", fail)
    answer = browser.get("/ui/devices")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
