"""Many devices are renewed or changed in the console: what was previewed, with what failed on the page that follows."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable

import pytest
from flask import Flask
from markupsafe import escape

from app import portal_of
from core.roles import Role
from tests.support.brokers import obeys
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.harness import ON_SQLITE, Api
from tests.support.tenants import add_tenant
from tests.web.console.test_actions import PATH, SUMS, confirm, preview, registered, send, status_of
from tests.web.console.test_fleet import STORED
from web.console import actions

pytestmark = ON_SQLITE
PASSWORD = re.compile(r'<code class="copy" data-copy="([^"]+)">')
LINK = re.compile(r'data-copy="(https://[^"]+)"')


@pytest.fixture(autouse=True)
def _broker_obeys(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    obeys(portal_of(app), monkeypatch)
    monkeypatch.setattr(portal_of(app).reconciler, "wait_for_restart", lambda: None)


def changed(browser: Browser, page: str, **fields: str) -> str:
    """Send the form for what is to be changed, and return the preview."""
    form = page.partition(f'action="{PATH}/preview"')[2]
    sent = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form)
    pairs = [(name, html.unescape(value)) for name, value in sent if name != "form_token"]
    return str(send(browser, f"{PATH}/preview", [*pairs, *fields.items()]).text)


# --- Renew ----------------------------------------------------------------------------------------------------------


def test_a_preview_of_a_renewal_counts_those_that_can_be_renewed_and_renews_none(api: Api, browser: Browser) -> None:
    first, second, third = registered(api, "a", "b", "c")
    api.post(f"/devices/{second}/suspend", {})
    api.post(f"/revoke/{third}", {})
    page = preview(browser, "renew", [first, second, third]).text
    assert "Renew 1 device?" in text_of(page)
    assert SUMS.findall(page) == ["1", "2"]
    assert len(api.get(f"/devices/{first}/certificates").json["certificates"]) == 1


def test_each_gets_a_link_and_a_password_and_the_form_sent_again_gets_the_same(api: Api, browser: Browser) -> None:
    ids = registered(api, "a", "b")
    page = preview(browser, "renew", ids).text
    done = confirm(browser, page, bundle_format="p12")
    assert "2 devices renewed" in text_of(done.text)
    passwords, links = PASSWORD.findall(done.text), LINK.findall(done.text)
    assert len(set(passwords)) == len(set(links)) == 2
    again = confirm(browser, page, bundle_format="p12").text
    assert (PASSWORD.findall(again), LINK.findall(again)) == (passwords, links)
    for one in ids:
        assert len(api.get(f"/devices/{one}/certificates").json["certificates"]) == 2


def test_all_of_it_is_saved_as_csv_and_nothing_renewed_by_that(api: Api, browser: Browser) -> None:
    ids = registered(api, '=HYPERLINK("evil")', "b")
    done = confirm(browser, preview(browser, "renew", ids).text).text
    saved = confirm(browser, done)
    assert saved.headers["Content-Disposition"] == 'attachment; filename="renewed-devices.csv"'
    assert saved.headers["Cache-Control"] == "no-store"
    rows = list(csv.DictReader(io.StringIO(saved.text)))
    assert {row["device_id"] for row in rows} == {*ids}
    assert {row["bundle_password"] for row in rows} == {*PASSWORD.findall(done)}
    assert {row["download_url"] for row in rows} == {*LINK.findall(done)}
    assert '\'=HYPERLINK("evil")' in {row["name"] for row in rows}
    assert {len(api.get(f"/devices/{one}/certificates").json["certificates"]) for one in ids} == {2}


def test_what_is_revoked_after_the_preview_is_refused_with_the_reason_and_the_others_are_renewed(
    api: Api, browser: Browser
) -> None:
    first, second = registered(api, "a", "b")
    page = preview(browser, "renew", [first, second]).text
    api.post(f"/revoke/{first}", {})
    done = confirm(browser, page).text
    assert SUMS.findall(done) == ["1", "1"]
    assert "The device is revoked, which is final" in text_of(done)
    assert "b" in text_of(done)


def test_all_that_match_are_renewed_though_they_match_no_more_after_it(
    api: Api, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    pumps, [valve] = registered(api, "a", "b", type="pump"), registered(api, "v", type="valve")
    page = preview(browser, "renew", [], type="pump").text
    assert f'value="{pumps[0]}"' in page
    assert f'value="{valve}"' not in page
    assert "2 devices renewed" in text_of(confirm(browser, page).text)
    monkeypatch.setattr(actions, "MOST_RENEWED", 1)
    assert preview(browser, "renew", [], type="pump").status_code == 422


def test_a_renewal_without_what_makes_it_repeatable_is_refused(api: Api, browser: Browser) -> None:
    [one] = registered(api, "a")
    fields = [("action", "renew"), ("of", "selected"), ("ids", one)]
    assert send(browser, PATH, fields).status_code == 422
    assert send(browser, PATH, [*fields, ("once", "short")]).status_code == 422
    assert len(api.get(f"/devices/{one}/certificates").json["certificates"]) == 1


# --- Change ---------------------------------------------------------------------------------------------------------


def test_a_change_is_asked_for_previewed_and_done(api: Api, browser: Browser) -> None:
    first, second, third = registered(api, "a", "b", "c", metadata={"owner": "ops", "old": "1"})
    api.patch(f"/devices/{second}", {"location": "hall 9", "metadata": {"owner": "dev"}})
    api.post(f"/revoke/{third}", {})
    ask = preview(browser, "update", [first, second, third]).text
    assert "Change 3 devices" in text_of(ask)
    page = changed(browser, ask, to_location="hall 9", to_metadata="owner=dev", to_remove="old")
    assert SUMS.findall(page) == ["1", "1", "1"]
    assert "hall 9" in text_of(page)
    assert api.get(f"/devices/{first}").json["location"] != "hall 9"
    done = confirm(browser, page).text
    assert "1 device changed" in text_of(done)
    assert SUMS.findall(done) == ["1", "1", "1", "0"]
    device = api.get(f"/devices/{first}").json
    assert (device["location"], device["metadata"]) == ("hall 9", {"owner": "dev"})
    assert device["type"] == api.get(f"/devices/{second}").json["type"]


def test_topics_are_set_for_all_and_taken_away_again(api: Api, browser: Browser) -> None:
    ids = registered(api, "a", "b")
    ask = preview(browser, "update", ids).text
    page = changed(browser, ask, to_own="set", to_topics="devices/{id}/# readwrite\r\ndevices/news read")
    assert "2 devices changed" in text_of(confirm(browser, page).text)
    for one in ids:
        filters = {topic["filter"] for topic in api.get(f"/devices/{one}").json["topics"]}
        assert filters == {"devices/{id}/#", "devices/news"}
    page = changed(browser, ask, to_own="default")
    assert SUMS.findall(page)[0] == "2"
    confirm(browser, page)
    assert SUMS.findall(changed(browser, ask, to_own="default"))[:2] == ["0", "2"]
    assert [topic["filter"] for topic in api.get(f"/devices/{ids[0]}").json["topics"]] == ["devices/{id}/#"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"to_own": "set", "to_topics": "devices/{id}/#"}, "a line is a topic filter, a space"),
        ({"to_own": "set"}, "at least 1 item"),
        ({"to_topics": "devices/{id}/# read"}, "choose that devices get these topics"),
        ({"to_metadata": "owner"}, "a line is KEY=VALUE"),
        ({}, "Enter what all of them are to have"),
    ],
)
def test_what_cannot_be_read_is_asked_for_again(api: Api, browser: Browser, fields: dict[str, str], said: str) -> None:
    ids = registered(api, "a")
    again = changed(browser, preview(browser, "update", ids).text, **fields)
    assert said in text_of(again)
    assert f'action="{PATH}/preview"' in again


def test_topics_of_others_are_refused_for_all_and_nothing_is_changed(api: Api, browser: Browser) -> None:
    ids = registered(api, "a", "b")
    again = changed(browser, preview(browser, "update", ids).text, to_own="set", to_topics="others/# read")
    assert 'role="alert"' in again
    assert "others/# read" in again
    assert f'action="{PATH}/preview"' in again
    assert [topic["filter"] for topic in api.get(f"/devices/{ids[0]}").json["topics"]] == ["devices/{id}/#"]


def test_other_changes_than_those_previewed_are_previewed_first(api: Api, browser: Browser) -> None:
    ids = registered(api, "a")
    page = changed(browser, preview(browser, "update", ids).text, to_location="hall 9")
    other = page.replace('name="to_location" value="hall 9"', 'name="to_location" value="hall 8"')
    again = confirm(browser, other)
    assert again.status_code == 409
    assert "hall 8" in again.text
    assert api.get(f"/devices/{ids[0]}").json["location"] not in ("hall 8", "hall 9")


# --- Who may --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["renew", "update"])
def test_who_may_not_change_devices_and_a_form_without_its_token_are_refused(
    api: Api, browser: Browser, browser_of: Callable[..., Browser], action: str
) -> None:
    ids = registered(api, "a")
    auditor = browser_of(Role.AUDITOR)
    assert f'value="{action}"' not in auditor.get("/ui/devices").text
    assert f'value="{action}"' in browser_of(Role.OPERATOR).get("/ui/devices").text
    form = {"action": action, "of": "selected", "ids": ids[0], "once": "o" * 16, "to_location": "hall 9"}
    for path in (PATH, f"{PATH}/preview"):
        assert send(auditor, path, [*form.items()]).status_code == 403
        assert browser.post(path, form, token=None).status_code == 403
        assert browser.post(path, form, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert len(api.get(f"/devices/{ids[0]}/certificates").json["certificates"]) == 1


def test_devices_of_another_tenant_are_neither_renewed_nor_changed(app: Flask, api: Api) -> None:
    [one] = registered(api, "a")
    add_tenant(portal_of(app), "other")
    stranger = logged_in_as(app, Role.ADMIN, "other")
    assert SUMS.findall(preview(stranger, "renew", [one]).text) == ["0", "0"]
    renewed = send(stranger, PATH, [("action", "renew"), ("of", "selected"), ("ids", one), ("once", "o" * 16)])
    assert SUMS.findall(renewed.text) == ["0", "1"]
    page = changed(stranger, preview(stranger, "update", [one]).text, to_location="hall 9")
    assert SUMS.findall(page) == ["0", "0", "0"]
    assert status_of(api, one) == "active"
    assert len(api.get(f"/devices/{one}/certificates").json["certificates"]) == 1


def test_names_and_what_is_entered_are_shown_as_they_are(api: Api, browser: Browser) -> None:
    ids = registered(api, *STORED)
    done = confirm(browser, preview(browser, "renew", ids).text).text
    entered = '<script>alert("x")</script>'
    page = changed(browser, preview(browser, "update", ids).text, to_location=entered, to_metadata=f"k={entered}")
    for name in STORED:
        assert f'<bdi class="stored">{escape(name)}</bdi>' in done
    for shown in (done, page, confirm(browser, page).text):
        assert "<script>alert" not in shown
    assert api.get(f"/devices/{ids[0]}").json["metadata"] == {"k": entered}
