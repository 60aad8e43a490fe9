"""Tokens in the console: made, with the secret shown once, listed, and revoked by those who may."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import pytest
from flask import Flask
from markupsafe import escape

from app import portal_of
from core.roles import Role
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.est import Device, certificates_of, csr_der
from tests.support.harness import ON_SQLITE, Api
from tests.support.tenants import add_tenant
from tests.web.console.test_device import hidden
from tests.web.console.test_fleet import HIDDEN, STORED

pytestmark = ON_SQLITE
ACCESS = "/ui/access"
TOKENS, ENROLMENT = f"{ACCESS}/tokens", f"{ACCESS}/enrolment"
SECRET = re.compile(r'<code id="secret">(.*?)</code>')


def secret_in(page: str) -> str:
    return html.unescape(SECRET.findall(page)[0])


def filled(browser: Browser, path: str, **fields: str) -> dict[str, str]:
    return {"once": hidden(browser.get(path).text, "once"), **fields}


def test_the_screen_leads_to_what_the_role_may_see(browser_of: Callable[..., Browser]) -> None:
    for role, first, absent in (
        (Role.ADMIN, TOKENS, []),
        (Role.OPERATOR, ENROLMENT, ["Operator tokens"]),
        (Role.AUDITOR, ENROLMENT, ["Operator tokens"]),
        (Role.SYSTEM, TOKENS, []),
    ):
        browser = browser_of(role)
        assert browser.get(ACCESS).headers["Location"] == first
        shown = text_of(browser.get(first).text)
        assert "Enrolment tokens" in shown
        for title in absent:
            assert title not in shown


# --- Operator tokens ----------------------------------------------------------------------------------------------


def test_a_token_is_shown_once_logs_in_and_is_revoked(app: Flask, api: Api, browser: Browser) -> None:
    form = filled(browser, f"{TOKENS}/new", name="CI", role="operator", expires_in_days="30")
    made = browser.post(f"{TOKENS}/new", form)
    assert (made.status_code, made.headers["Cache-Control"]) == (201, "no-store")
    secret = secret_in(made.text)
    assert Browser(app).log_in(secret).status_code == 303
    [record] = [one for one in api.get("/tokens").json["tokens"] if one["name"] == "CI"]
    assert record["role"] == "operator"
    page = browser.get(TOKENS).text
    assert secret not in page
    assert record["token_id"] in page
    for _ in range(2):
        assert browser.post(f"{TOKENS}/{record['token_id']}/revoke").status_code == 303
    assert Browser(app).log_in(secret).status_code == 401
    assert record["token_id"] not in browser.get(TOKENS).text
    assert record["token_id"] in browser.get(f"{TOKENS}?all=yes").text
    assert len(api.get("/audit?action=token:revoke").json["entries"]) == 1


def test_a_form_that_is_sent_twice_makes_one_token_with_one_secret(api: Api, browser: Browser) -> None:
    for path, fields in ((f"{TOKENS}/new", {"role": "auditor"}), (f"{ENROLMENT}/new", {})):
        form = filled(browser, path, name="twice", **fields)
        first, again = (browser.post(path, form) for _ in range(2))
        assert secret_in(first.text) == secret_in(again.text)
        changed = browser.post(path, form | {"name": "thrice"})
        assert changed.status_code == 409
        assert "sent before with other values" in text_of(changed.text)
    assert [one["name"] for one in api.get("/tokens").json["tokens"]].count("twice") == 1
    assert len(api.get("/enrolment-tokens").json["enrolment_tokens"]) == 1


def test_the_last_admin_token_goes_only_by_force(app: Flask) -> None:
    add_tenant(portal_of(app), "other")
    browser = logged_in_as(app, Role.ADMIN, "other")
    path = f"{TOKENS}/{browser_token_id(browser)}/revoke"
    refused = browser.post(path)
    assert refused.status_code == 409
    assert "last valid admin token" in text_of(refused.text)
    gone = browser.post(path, {"force": "yes"})
    assert gone.headers["Location"] == "/ui/login"
    assert browser.get(TOKENS).headers["Location"].startswith("/ui/login")


def hidden_ids(page: str, path: str) -> list[str]:
    return re.findall(rf'action="{path}/([0-9a-f]{{16}})/revoke"', page)


def browser_token_id(browser: Browser) -> str:
    page = browser.get(TOKENS).text
    row = page[: page.index("Yours")].rpartition("<tr>")[2] + page[page.index("Yours") :]
    return str(re.findall(r"<code>([0-9a-f]{16})</code>", row)[0])


def test_a_token_is_revoked_with_the_enrolment_tokens_it_has_made(
    app: Flask, api: Api, browser: Browser, browser_of: Callable[..., Browser]
) -> None:
    other = browser_of(Role.ADMIN)
    other.post(f"{ENROLMENT}/new", filled(other, f"{ENROLMENT}/new", name="line 3"))
    token_id = browser_token_id(other)
    assert browser.post(f"{TOKENS}/{token_id}/revoke", {"enrolment_tokens": "revoke"}).status_code == 303
    [enrolment] = api.get("/enrolment-tokens").json["enrolment_tokens"]
    assert enrolment["revoked_at"] is not None
    assert other.get(TOKENS).headers["Location"].startswith("/ui/login")


def test_nobody_gives_more_than_they_may(browser: Browser, browser_of: Callable[..., Browser]) -> None:
    page = browser.get(f"{TOKENS}/new").text
    assert 'value="system"' not in page
    refused = browser.post(f"{TOKENS}/new", filled(browser, f"{TOKENS}/new", name="x", role="system"))
    assert refused.status_code == 403
    assert "role system" in text_of(refused.text)
    assert not SECRET.findall(refused.text)
    for role in (Role.OPERATOR, Role.AUDITOR):
        lesser = browser_of(role)
        assert lesser.get(TOKENS).status_code == 403
        assert lesser.post(f"{TOKENS}/new", {"name": "x", "role": "admin"}).status_code == 403
        assert lesser.post(f"{TOKENS}/{'0' * 16}/revoke").status_code == 403


# --- Enrolment tokens ---------------------------------------------------------------------------------------------


def test_where_there_is_no_enrolment_token_the_page_says_what_it_is_for(
    browser: Browser, browser_of: Callable[..., Browser]
) -> None:
    for one, may in ((browser, True), (browser_of(Role.AUDITOR), False)):
        page = one.get(ENROLMENT).text
        assert "No enrolment tokens" in page
        assert (f'href="{ENROLMENT}/new"' in page) is may


def test_a_device_enrols_with_a_token_as_its_profile_says_until_it_is_revoked(api: Api, browser: Browser) -> None:
    fields = {"name": "line 3", "count": "9", "expires_in_hours": "48", "type": "valve", "name_template": "v-{serial}"}
    made = browser.post(f"{ENROLMENT}/new", filled(browser, f"{ENROLMENT}/new", **fields))
    assert made.status_code == 201
    one = Device(api, secret_in(made.text))
    certificates_of(one.enrol(csr_der(None, "7")))
    [device] = api.get("/devices").json["devices"]
    assert (device["name"], device["type"], device["location"]) == ("v-7", "valve", "unknown")
    [token_id] = hidden_ids(browser.get(ENROLMENT).text, ENROLMENT)
    assert "1 of 9" in text_of(browser.get(ENROLMENT).text)
    for _ in range(2):
        assert browser.post(f"{ENROLMENT}/{token_id}/revoke").status_code == 303
    assert one.enrol(csr_der(None, "8")).status_code == 403
    assert "Revoked" in text_of(browser.get(f"{ENROLMENT}?all=yes").text)


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        (TOKENS, {"name": HIDDEN, "role": "operator"}, "name"),
        (TOKENS, {"name": "", "role": "operator"}, "name"),
        (TOKENS, {"name": "x", "role": "operator", "expires_in_days": "0"}, "expires_in_days"),
        (TOKENS, {"name": "x", "role": "operator", "expires_in_days": "1.5"}, "expires_in_days"),
        (ENROLMENT, {"name": "x", "count": "many"}, "count"),
        (ENROLMENT, {"name": "x", "expires_in_hours": "8761"}, "expires_in_hours"),
        (ENROLMENT, {"name": "x", "device_id": "pump-1"}, "device_id"),
        (ENROLMENT, {"name": "x", "name_template": "a\tb"}, "name_template"),
    ],
)
def test_a_form_with_something_wrong_comes_back_with_what_was_entered(
    browser: Browser, path: str, fields: dict[str, str], field: str
) -> None:
    answer = browser.post(f"{path}/new", filled(browser, f"{path}/new", **fields))
    assert answer.status_code == 422
    wrong = re.findall(r'<input id="field-([a-z_]+)"[^>]*aria-invalid="true"', answer.text)
    assert wrong == [field]
    assert f'value="{escape(fields[field])}"' in answer.text
    assert not SECRET.findall(answer.text)


def test_more_than_the_role_may_make_and_unknown_devices_are_refused_at_the_form(
    browser_of: Callable[..., Browser],
) -> None:
    browser = browser_of(Role.OPERATOR)
    for fields, status in (
        ({"count": "1001"}, 403),
        ({"device_id": "3f2b8c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b"}, 404),
        ({"profile": "nothing"}, 422),
    ):
        sent = filled(browser, f"{ENROLMENT}/new", name="x", **fields)
        answer = browser.post(f"{ENROLMENT}/new", sent)
        assert answer.status_code == status, fields
        assert 'name="once"' in answer.text
    assert "No enrolment tokens" in browser.get(ENROLMENT).text


# --- Both ---------------------------------------------------------------------------------------------------------


def test_tokens_of_another_tenant_are_not_there(app: Flask, api: Api, browser: Browser) -> None:
    browser.post(f"{ENROLMENT}/new", filled(browser, f"{ENROLMENT}/new", name="line 3"))
    add_tenant(portal_of(app), "other")
    stranger = logged_in_as(app, Role.ADMIN, "other")
    for path in (TOKENS, ENROLMENT):
        [first, *_] = hidden_ids(browser.get(path).text, path)
        assert first not in stranger.get(f"{path}?all=yes").text
        assert stranger.post(f"{path}/{first}/revoke").status_code == 404
        assert first in browser.get(path).text


def test_a_change_needs_the_form_s_token(browser: Browser) -> None:
    for path in (f"{TOKENS}/new", f"{ENROLMENT}/new", f"{TOKENS}/{'0' * 16}/revoke"):
        assert browser.post(path, {"name": "x", "role": "admin"}, token=None).status_code == 403


def test_stored_texts_are_shown_and_never_run(api: Api, browser: Browser) -> None:
    for name in STORED[:5]:
        api.post("/tokens", {"name": name, "role": "auditor"})
        api.post("/enrolment-tokens", {"name": name, "type": name})
    for path in (TOKENS, ENROLMENT):
        page = browser.get(path).text
        for name in STORED[:5]:
            assert str(escape(name)) in page
        assert "<script>alert" not in page
