"""A device is registered in the console, which hands over its link and password once, and keeps neither."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import pytest
from flask import Flask
from markupsafe import escape

from app import portal_of
from core.roles import Role
from tests.support.browser import Browser, text_of
from tests.support.harness import ON_SQLITE, Api
from tests.web.console.test_device import hidden
from tests.web.console.test_fleet import STORED
from web.console.qr import MAX_TEXT, qr_code

pytestmark = ON_SQLITE
PATH = "/ui/devices/register"
FORM = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
LINK = re.compile(r'<code id="link">(.*?)</code>')
PASSWORD = re.compile(r'<code id="password">(.*?)</code>')


def filled(browser: Browser, **fields: str) -> dict[str, str]:
    return {**FORM, "once": hidden(browser.get(PATH).text, "once"), **fields}


def test_the_fleet_s_dialog_registers_a_device_whose_bundle_the_link_and_the_password_open(
    app: Flask, api: Api, browser: Browser
) -> None:
    fleet = browser.get("/ui/devices").text
    assert '<dialog id="register"' in fleet
    answer = browser.post(PATH, {**FORM, "once": hidden(fleet, "once"), "bundle_format": "p12"})
    assert answer.status_code == 201
    assert answer.headers["Cache-Control"] == "no-store"
    link, password = (html.unescape(found.findall(answer.text)[0]) for found in (LINK, PASSWORD))
    assert len(password) >= 12
    assert "<svg" in answer.text
    path = link[link.index("/download/") :]
    assert api.get(path).status_code == 200
    assert api.get(path).status_code == 410  # once
    [device] = api.get("/devices").json["devices"]
    assert (device["name"], device["status"]) == ("pump-1", "active")


def test_the_password_is_in_no_address_in_no_text_to_pass_on_and_on_no_other_page(api: Api, browser: Browser) -> None:
    answer = browser.post(PATH, filled(browser))
    password = html.unescape(PASSWORD.findall(answer.text)[0])
    assert not [address for address in re.findall(r'(?:href|src|action)="([^"]*)"', answer.text) if password in address]
    passed_on = re.findall(r'<pre class="pass-on[^>]*>(.*?)</pre>', answer.text, re.DOTALL)[0]
    assert "/download/" in passed_on
    assert password not in passed_on
    device_id = api.get("/devices").json["devices"][0]["device_id"]
    for path in (f"/ui/devices/{device_id}", "/ui/devices", PATH):
        assert password not in browser.get(path).text
    assert not any(password in str(entry) for entry in api.get("/audit").json["entries"])


def test_a_form_that_is_sent_twice_registers_one_device_and_shows_the_same(api: Api, browser: Browser) -> None:
    form = filled(browser)
    first, second = browser.post(PATH, form), browser.post(PATH, form)
    assert LINK.findall(first.text) == LINK.findall(second.text)
    assert PASSWORD.findall(first.text) == PASSWORD.findall(second.text)
    assert len(api.get("/devices").json["devices"]) == 1


def test_what_is_wrong_is_said_at_its_field_and_nothing_is_registered(api: Api, browser: Browser) -> None:
    for field, value in (
        ("name", ""), ("name", "a\u202eb"), ("type", "x" * 65), ("location", " "), ("firmware", "\x07"),
        ("external_id", "x" * 129),
    ):  # fmt: skip
        answer = browser.post(PATH, filled(browser, **{field: value}))
        assert answer.status_code == 422, (field, value)
        assert re.search(rf'id="field-{field}"[^>]*aria-invalid="true"', answer.text), (field, value)
        assert hidden(answer.text, "once")
    for wrong in ({"once": "short"}, {"once": ""}, {"key_type": "rsa-1024"}, {"more": "x"}):
        assert browser.post(PATH, filled(browser, **wrong)).status_code == 422
    api.register(external_id="taken")
    answer = browser.post(PATH, filled(browser, external_id="taken"))
    assert answer.status_code == 409
    assert "external_id" in text_of(answer.text)
    assert len(api.get("/devices").json["devices"]) == 1


def test_names_that_look_like_html_are_shown_as_they_are(browser: Browser) -> None:
    for name in STORED:
        page = browser.post(PATH, filled(browser, name=name)).text
        assert str(escape(name)) in page
        assert "<script>alert" not in page


def test_who_may_not_change_anything_sees_no_way_to_register_and_has_none(
    api: Api, browser_of: Callable[..., Browser]
) -> None:
    auditor = browser_of(Role.AUDITOR)
    assert "/ui/devices/register" not in auditor.get("/ui/devices").text
    assert auditor.get(PATH).status_code == 403
    assert auditor.post(PATH, {**FORM, "once": "x" * 24}).status_code == 403
    assert api.get("/devices").json["devices"] == []


def test_a_form_without_its_token_registers_nothing(app: Flask, api: Api, browser: Browser) -> None:
    form = filled(browser)
    assert browser.post(PATH, form, token=None).status_code == 403
    assert browser.post(PATH, form, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert api.get("/devices").json["devices"] == []
    assert portal_of(app).settings.console


@pytest.mark.usefixtures("prepared")
def test_a_qr_code_is_drawn_without_anything_of_its_text() -> None:
    drawn = qr_code("https://portal/download/<script>")
    assert drawn.startswith("<svg")
    assert "script" not in drawn
    assert "style" not in drawn
    with pytest.raises(ValueError, match="too long"):
        qr_code("x" * (MAX_TEXT + 1))
