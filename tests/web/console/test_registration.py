"""A device is registered in the console, which hands over its link and password once, and keeps neither."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate, load_pem_x509_csr
from flask import Flask
from markupsafe import escape

from app import portal_of
from config import Settings
from core.roles import Role
from onboarding_portal.handover import Trust, text_to_pass_on
from tests.support.browser import Browser, text_of
from tests.support.harness import ON_SQLITE, Api, csr_pem
from tests.web.console.test_device import hidden
from tests.web.console.test_fleet import STORED
from web.console.handover import trust_of
from web.console.qr import MAX_TEXT, qr_code

pytestmark = ON_SQLITE
PATH = "/ui/devices/register"
FORM = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
LINK = re.compile(r'<code id="link">(.*?)</code>')
PASSWORD = re.compile(r'<code id="password">(.*?)</code>')


def filled(browser: Browser, **fields: Any) -> dict[str, Any]:
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


def passed_on(answer: Any) -> str:
    return html.unescape(re.findall(r'<pre class="pass-on[^>]*>(.*?)</pre>', answer.text, re.DOTALL)[0])


@pytest.mark.parametrize(("bundle_format", "opens"), [("zip", "7z x"), ("p12", "openssl pkcs12"), ("", "7z x")])
def test_the_text_to_pass_on_is_the_one_of_the_command_line_with_the_root_s_fingerprint(
    app: Flask, api: Api, browser: Browser, bundle_format: str, opens: str
) -> None:
    answer = browser.post(PATH, filled(browser, bundle_format=bundle_format))
    [device] = api.get("/devices").json["devices"]
    file = f"{device['device_id']}.{bundle_format or 'zip'}"
    root = re.findall("fingerprint ([0-9a-f]{64})", passed_on(answer))[0]
    served = api.get(f"/ca/{root}.cer")
    assert sha256(served.data).hexdigest() == root
    link = html.unescape(LINK.findall(answer.text)[0])
    record = portal_of(app).deliveries.check_download(link.rpartition("/")[2])
    until = f"{record.expires_at:%Y-%m-%d %H:%M:%S} UTC"
    assert passed_on(answer).splitlines() == [*text_to_pass_on(link, file, Trust(root), name="pump-1", until=until)]
    for part in (f"--fingerprint {root}", f"curl -fsS --cacert root.pem {link} -o {file}", "sha256sum -c", opens):
        assert part in passed_on(answer)


@pytest.mark.parametrize(
    ("settings", "option"),
    [({"PORTAL_TRUSTED_PROXIES": "127.0.0.1"}, ""), ({"PORTAL_PUBLIC_URL": "http://localhost:8080"}, "")],
)
def test_behind_a_front_server_the_portal_is_verified_as_any_web_server(
    make_settings: Callable[..., Settings], settings: dict[str, str], option: str
) -> None:
    portal = Mock(settings=make_settings(**settings))
    assert trust_of(portal).option == option


def test_a_certificate_of_another_issuer_is_verified_by_its_root_which_is_sent_along(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    of_another = Mock(public_url=make_settings().public_url, trusted_proxies=(), tls_certificate=tmp_path)
    of_another.bind.is_unix, of_another.https_ca_file = False, tmp_path / "portal-ca.pem"
    assert trust_of(Mock(settings=of_another)).option == " --ca-file portal-ca.pem"


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


# --- What the whole form has ----------------------------------------------------------------------------------------


def test_groups_metadata_topics_profile_and_life_are_those_of_the_form(api: Api, browser: Browser) -> None:
    api.post("/groups", {"name": "north"})
    api.post("/groups", {"name": "pumps", "filter": {"type": "pump"}})
    page = browser.get(PATH).text
    assert '<option value="north">' in page
    assert '<option value="pumps">' not in page  # a saved filter has no members
    entered = {"metadata": "owner=ops\r\nrack=7", "topics": "devices/{id}/# readwrite\ndevices/news read"}
    assert browser.post(PATH, filled(browser, groups="north", validity_days="30", **entered)).status_code == 201
    [device] = api.get("/devices").json["devices"]
    assert (device["groups"], device["metadata"]) == (["north"], {"owner": "ops", "rack": "7"})
    assert {one["filter"] for one in device["topics"]} == {"devices/{id}/#", "devices/news"}
    certificate = api.get(f"/devices/{device['device_id']}").json["certificate"]
    days = datetime.fromisoformat(certificate["not_after"]) - datetime.fromisoformat(certificate["not_before"])
    assert days < timedelta(days=31)


@pytest.mark.parametrize("way", ["text", "pem file", "der file"])
def test_a_csr_gets_a_certificate_for_its_key_and_no_password(api: Api, browser: Browser, way: str) -> None:
    csr = csr_pem()
    form: dict[str, Any] = filled(browser)
    if way == "text":
        form["csr"] = csr
    else:
        content = csr.encode() if way == "pem file" else load_pem_x509_csr(csr.encode()).public_bytes(Encoding.DER)
        form["csr_file"] = (io.BytesIO(content), "device.csr")
    answer = browser.post(PATH, form)
    assert answer.status_code == 201
    assert not LINK.findall(answer.text) + PASSWORD.findall(answer.text)
    [device] = api.get("/devices").json["devices"]
    issued = api.get(f"/devices/{device['device_id']}").json["certificate"]["certificate"]
    assert issued.strip() in html.unescape(answer.text)
    keys = (load_pem_x509_csr(csr.encode()).public_key(), load_pem_x509_certificate(issued.encode()).public_key())
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"metadata": "owner"}, "a line is KEY=VALUE"),
        ({"topics": "devices/#"}, "a line is a topic filter, a space"),
        ({"topics": "others/# read"}, "others/#"),
        ({"validity_days": "0"}, "must be"),
        ({"groups": "nowhere"}, "name no group nowhere"),
        ({"csr": "-----BEGIN PRIVATE KEY-----"}, "CSR"),
        ({"csr": "x", "key_type": "ed25519"}, "goes with neither a key nor a bundle"),
        ({"csr_file": "x" * 20000}, "more than 16384 bytes"),
    ],
)
def test_what_is_wrong_in_the_whole_form_is_said_and_what_was_entered_stays(
    api: Api, browser: Browser, fields: dict[str, Any], said: str
) -> None:
    if "csr_file" in fields:
        fields = {"csr_file": (io.BytesIO(fields["csr_file"].encode()), "device.csr")}
    answer = browser.post(PATH, filled(browser, **fields))
    assert answer.status_code == 422
    assert said in text_of(answer.text)
    assert "field-bad" in answer.text or 'role="alert"' in answer.text
    assert 'value="pump-1"' in answer.text
    assert not api.get("/devices").json["devices"]


def test_an_operator_puts_no_device_into_a_group_with_an_appraisal_policy(
    app: Flask, api: Api, browser_of: Callable[..., Browser]
) -> None:
    api.post("/groups", {"name": "north"})
    assert api.patch("/groups/north", {"attestation": {"mode": "off"}}).status_code == 200
    operator = browser_of(Role.OPERATOR)
    refused = operator.post(PATH, filled(operator, groups="north"))
    assert refused.status_code == 403
    assert "ask an admin" in text_of(refused.text)
    assert not api.get("/devices").json["devices"]


def test_names_of_groups_and_what_is_entered_are_shown_as_they_are(browser: Browser) -> None:
    entered = '"><script>alert(1)</script>'
    again = browser.post(PATH, filled(browser, metadata=entered, topics=entered, csr=entered)).text
    assert "<script>alert" not in again
    assert again.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
