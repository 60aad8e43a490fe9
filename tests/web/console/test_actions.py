"""Many devices are suspended, resumed or revoked in the console: what was previewed, and nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from markupsafe import escape
from werkzeug.datastructures import MultiDict

from app import portal_of
from core.roles import Role
from tests.support.brokers import obeys
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.harness import ON_SQLITE, Api
from tests.support.tenants import add_tenant
from tests.web.console.test_fleet import STORED
from web.console import actions

pytestmark = ON_SQLITE
PATH = "/ui/devices/actions"
SUMS = re.compile(r'<div class="sum[^"]*"><strong>([\d,]+)</strong>')
SENT = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')


@pytest.fixture(autouse=True)
def _broker_obeys(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    obeys(portal_of(app), monkeypatch)


def status_of(api: Api, device_id: str) -> str:
    return str(api.get(f"/devices/{device_id}").json["status"])


def registered(api: Api, *names: str, **fields: Any) -> list[str]:
    return [api.register(name=name, **fields)["device_id"] for name in names]


def send(browser: Browser, path: str, fields: list[tuple[str, str]]) -> Any:
    """Send a form, of which a field may be there several times."""
    form: Any = MultiDict([*fields, ("form_token", browser.form_token())])
    headers = {"Sec-Fetch-Site": "same-origin"}
    return browser.client.post(path, base_url="https://localhost", headers=headers, data=form)


def preview(browser: Browser, action: str, ids: list[str], **filters: str) -> Any:
    of = "all" if filters else "selected"
    fields = [("action", action), ("of", of), *filters.items(), *(("ids", one) for one in ids)]
    return send(browser, f"{PATH}/preview", fields)


def confirm(browser: Browser, page: str, **fields: str) -> Any:
    form = page.partition(f'action="{PATH}"')[2]
    sent = [(name, html.unescape(value)) for name, value in SENT.findall(form) if name != "form_token"]
    return send(browser, PATH, [*sent, *fields.items()])


def test_a_preview_says_what_would_happen_and_changes_nothing(api: Api, browser: Browser) -> None:
    first, second, third = registered(api, "a", "b", "c")
    api.post(f"/devices/{second}/suspend", {})
    api.post(f"/revoke/{third}", {})
    for action, sums in (("suspend", ["1", "1", "1"]), ("resume", ["1", "1", "1"]), ("revoke", ["2", "1", "0"])):
        page = preview(browser, action, [first, second, third])
        assert page.status_code == 200
        assert SUMS.findall(page.text) == sums, action
    assert [status_of(api, one) for one in (first, second, third)] == ["active", "suspended", "revoked"]


def test_the_selected_are_suspended_and_resumed_and_no_others(api: Api, browser: Browser) -> None:
    first, second, other = registered(api, "a", "b", "c")
    page = confirm(browser, preview(browser, "suspend", [first, second]).text)
    assert page.status_code == 200
    assert "2 devices suspended" in text_of(page.text)
    assert [status_of(api, one) for one in (first, second, other)] == ["suspended", "suspended", "active"]
    confirm(browser, preview(browser, "resume", [first]).text)
    assert [status_of(api, one) for one in (first, second)] == ["active", "suspended"]


def test_all_that_match_are_revoked_once_their_number_was_entered(api: Api, browser: Browser) -> None:
    pumps, [valve] = registered(api, "a", "b", type="pump"), registered(api, "v", type="valve")
    page = preview(browser, "revoke", [], type="pump").text
    assert "Revoke 2 devices?" in text_of(page)
    for wrong in ({}, {"count": "1"}, {"count": "02"}):
        refused = confirm(browser, page, **wrong)
        assert refused.status_code == 409
        assert "enter how many" in refused.text
    assert [status_of(api, one) for one in pumps] == ["active", "active"]
    done = confirm(browser, page, count="2", reason="key_compromise")
    assert "2 devices revoked" in text_of(done.text)
    assert [api.get(f"/devices/{one}").json["revocation_reason"] for one in pumps] == ["key_compromise"] * 2
    assert status_of(api, valve) == "active"


def test_what_matches_since_is_not_touched_before_it_was_previewed(api: Api, browser: Browser) -> None:
    [first] = registered(api, "a", type="pump")
    page = preview(browser, "suspend", [], type="pump").text
    [second] = registered(api, "b", type="pump")
    again = confirm(browser, page)
    assert again.status_code == 409
    assert "has changed since" in again.text
    assert SUMS.findall(again.text)[0] == "2"
    assert [status_of(api, one) for one in (first, second)] == ["active", "active"]
    assert confirm(browser, again.text).status_code == 200
    assert [status_of(api, one) for one in (first, second)] == ["suspended", "suspended"]


def test_a_device_that_is_revoked_meanwhile_is_previewed_again(api: Api, browser: Browser) -> None:
    first, second = registered(api, "a", "b")
    page = preview(browser, "suspend", [first, second]).text
    api.post(f"/revoke/{first}", {})
    again = confirm(browser, page)
    assert again.status_code == 409
    assert SUMS.findall(again.text) == ["1", "0", "1"]
    assert status_of(api, second) == "active"


def test_a_form_that_is_sent_twice_does_no_harm(api: Api, browser: Browser) -> None:
    ids = registered(api, "a", "b")
    page = preview(browser, "revoke", ids).text
    assert confirm(browser, page, count="2").status_code == 200
    assert confirm(browser, page, count="2").status_code == 409  # they are revoked: nothing is left to do
    entries = api.get("/audit?action=device:revoke").json["entries"]
    assert len(entries) == 2


def test_nothing_selected_no_filter_and_what_is_no_device_are_refused(api: Api, browser: Browser) -> None:
    ids = registered(api, "a", "b", "c")
    assert "No device is selected" in preview(browser, "suspend", []).text
    for fields in (
        [("action", "suspend"), ("of", "all")],
        [("action", "suspend"), ("of", "all"), ("sort", "name")],
        [("action", "delete"), ("of", "selected"), ("ids", ids[0])],
        [("action", "suspend"), ("of", "selected"), ("ids", "../etc")],
        [("action", "suspend"), ("of", "selected"), ("ids", ids[0]), ("colour", "red")],
        [("action", "suspend"), ("action", "revoke"), ("of", "selected"), ("ids", ids[0])],
        [("of", "selected"), *(("ids", f"{number:032x}") for number in range(300)), ("action", "suspend")],
    ):
        assert send(browser, f"{PATH}/preview", fields).status_code == 422, fields
        assert send(browser, PATH, fields).status_code == 422, fields
    assert {status_of(api, one) for one in ids} == {"active"}


def test_too_many_that_match_are_refused_before_anything_is_done(
    api: Api, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(api, "a", "b", "c", type="pump")
    monkeypatch.setattr(actions, "MOST_AT_ONCE", 2)
    answer = preview(browser, "suspend", [], type="pump")
    assert answer.status_code == 422
    assert "too many for one action" in answer.text


def test_who_may_not_change_anything_has_no_check_boxes_and_no_action(
    api: Api, browser_of: Callable[..., Browser]
) -> None:
    ids = registered(api, "a")
    auditor = browser_of(Role.AUDITOR)
    assert 'name="ids"' not in auditor.get("/ui/devices").text
    assert preview(auditor, "suspend", ids).status_code == 403
    assert send(auditor, PATH, [("action", "suspend"), ("of", "selected"), ("ids", ids[0])]).status_code == 403
    assert 'name="ids"' in browser_of(Role.OPERATOR).get("/ui/devices").text


def test_a_form_without_its_token_is_refused(api: Api, browser: Browser) -> None:
    [device_id] = registered(api, "a")
    form = {"action": "suspend", "of": "selected", "ids": device_id}
    for path in (PATH, f"{PATH}/preview"):
        assert browser.post(path, form, token=None).status_code == 403
        assert browser.post(path, form, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert status_of(api, device_id) == "active"


def test_devices_of_another_tenant_are_not_found(app: Flask, api: Api) -> None:
    [device_id] = registered(api, "a")
    add_tenant(portal_of(app), "other")
    stranger = logged_in_as(app, Role.ADMIN, "other")
    page = preview(stranger, "revoke", [device_id])
    assert SUMS.findall(page.text) == ["0", "0", "0"]
    assert "Nothing to revoke" in page.text
    assert status_of(api, device_id) == "active"


def test_names_are_shown_as_they_are(api: Api, browser: Browser) -> None:
    ids = registered(api, *STORED)
    page = preview(browser, "suspend", ids).text
    for name in STORED:
        assert f'<bdi class="stored">{escape(name)}</bdi>' in page
    assert "<script>alert" not in page


def test_devices_are_added_to_a_group_and_removed_from_it_and_not_to_a_saved_filter(api: Api, browser: Browser) -> None:
    first, second = registered(api, "a", "b")
    page = preview(browser, "add", [first, second]).text
    assert "no group that has members of its own" in page
    for name, body in (("north", {}), ("pumps", {"filter": {"type": "pump"}})):
        assert api.post("/groups", {"name": name, **body}).status_code == 201
    page = preview(browser, "add", [first, second]).text
    assert "Add 2 devices to a group?" in text_of(page)
    assert '<option value="north">' in page
    assert '<option value="pumps">' not in page
    assert confirm(browser, page).status_code == 409
    assert "2 devices added to north" in text_of(confirm(browser, page, to_group="north").text)
    assert "0 devices added to north" in text_of(confirm(browser, page, to_group="north").text)
    assert confirm(browser, page, to_group="pumps").status_code == 409
    assert confirm(browser, page, to_group="nothing").status_code == 404
    page = preview(browser, "remove", [first]).text
    assert "1 device removed from north" in text_of(confirm(browser, page, to_group="north").text)
    assert api.get("/groups/north").json["members"] == 1
