"""What devices that enrol have to show, and which keys they may have, is set in the console by an admin."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from core.roles import Role
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.harness import ON_SQLITE, Api
from tests.support.pki import PEM, Authority
from tests.support.tenants import add_tenant
from tests.web.console.test_access import filled
from tests.web.console.test_access_of_others import CERTIFICATE, MAKERS

pytestmark = ON_SQLITE
ENROLMENT = "/ui/access/enrolment"
ANCHOR = Authority("A verifier").certificate.public_bytes(PEM).decode()
POLICY = json.dumps({"mode": "require", "types": ["eat-jwt"], "anchors": [ANCHOR]})
SCRIPT = '"><script>alert(1)</script>'


def shown_policy(page: str) -> str:
    return html.unescape(re.findall(r'<textarea[^>]*name="attestation"[^>]*>\n?(.*?)</textarea>', page, re.DOTALL)[0])


def created(browser: Browser, **fields: Any) -> Any:
    return browser.post(f"{ENROLMENT}/new", filled(browser, f"{ENROLMENT}/new", name="line 3", **fields))


def test_a_token_is_created_with_a_policy_and_the_keys_that_are_allowed(api: Api, browser: Browser) -> None:
    assert created(browser, attestation=POLICY, key_types=["ec-p256", "ed25519"]).status_code == 201
    [token] = api.get("/enrolment-tokens").json["enrolment_tokens"]
    assert token["key_types"] == ["ec-p256", "ed25519"]
    assert (token["attestation"]["mode"], token["attestation"]["types"]) == ("require", ["eat-jwt"])
    created(browser)
    assert len(api.get("/enrolment-tokens").json["enrolment_tokens"][0]["key_types"]) == 6


@pytest.mark.parametrize(
    "wrong", ["{", "[]", '{"mode": "perhaps"}', '{"colour": 1}', '{"mode": "require"}', '{"anchors": ["x"]}', SCRIPT]
)
def test_what_is_no_policy_is_refused_and_stays_in_the_form(api: Api, browser: Browser, wrong: str) -> None:
    again = created(browser, attestation=wrong)
    assert again.status_code == 422
    assert "field-bad" in again.text or 'role="alert"' in again.text
    assert shown_policy(again.text).strip() == wrong
    assert "<script>alert" not in again.text
    assert created(browser, key_types="rsa-512").status_code == 422
    assert not api.get("/enrolment-tokens").json["enrolment_tokens"]


def test_the_policy_of_a_token_is_shown_and_changed(api: Api, browser: Browser) -> None:
    created(browser, attestation=POLICY)
    [token] = api.get("/enrolment-tokens").json["enrolment_tokens"]
    path = f"{ENROLMENT}/{token['enrolment_token_id']}/evidence"
    assert f'href="{path}"' in browser.get(ENROLMENT).text
    policy = json.loads(shown_policy(browser.get(path).text))
    assert (policy["mode"], policy["anchors"][0]["pem"]) == ("require", ANCHOR)
    assert browser.post(path, {"attestation": json.dumps(policy | {"mode": "record"})}).status_code == 303
    [changed] = api.get("/enrolment-tokens").json["enrolment_tokens"]
    assert (changed["attestation"]["mode"], changed["attestation"]["version"]) == ("record", 2)
    assert browser.post(path, {"attestation": " "}).status_code == 422
    assert browser.get(f"{ENROLMENT}/{'0' * 16}/evidence").status_code == 404
    assert browser.post(f"{ENROLMENT}/{'0' * 16}/evidence", {"attestation": POLICY}).status_code == 404


def test_only_an_admin_says_whose_evidence_counts(
    app: Flask, api: Api, browser: Browser, browser_of: Callable[..., Browser]
) -> None:
    operator = browser_of(Role.OPERATOR)
    assert 'name="attestation"' not in operator.get(f"{ENROLMENT}/new").text
    assert created(operator, attestation=POLICY).status_code == 403
    created(browser)
    [token] = api.get("/enrolment-tokens").json["enrolment_tokens"]
    path = f"{ENROLMENT}/{token['enrolment_token_id']}/evidence"
    for other in (operator, browser_of(Role.AUDITOR)):
        assert f'href="{path}"' not in other.get(ENROLMENT).text
        assert other.get(path).status_code == 403
        assert other.post(path, {"attestation": POLICY}).status_code == 403
    add_tenant(portal_of(app), "other")
    stranger = logged_in_as(app, Role.ADMIN, "other")
    assert stranger.get(path).status_code == 404
    assert stranger.post(path, {"attestation": POLICY}).status_code == 404
    assert browser.post(path, {"attestation": POLICY}, token=None).status_code == 403
    assert api.get("/enrolment-tokens").json["enrolment_tokens"][0]["attestation"] is None


def test_a_manufacturer_is_changed_and_keeps_what_is_the_same(api: Api, browser: Browser) -> None:
    form = {"name": "A maker", "certificate": CERTIFICATE, "type": "valve", "attestation": POLICY}
    path = browser.post(f"{MAKERS}/new", form).headers["Location"]
    page = browser.get(f"{path}/edit").text
    same = {"name": "A maker", "type": "valve", "attestation": shown_policy(page).replace("\n", "\r\n")}
    assert browser.post(f"{path}/edit", same).headers["Location"] == path
    assert not api.get("/audit?action=manufacturer:update").json["entries"]
    changed: dict[str, Any] = same | {"location": "hall 9", "key_types": ["ed25519"], "approval": "operator"}
    assert browser.post(f"{path}/edit", changed).status_code == 303
    [maker] = api.get("/manufacturers").json["manufacturers"]
    assert (maker["location"], maker["key_types"], maker["approval"]) == ("hall 9", ["ed25519"], "operator")
    assert (maker["attestation"]["mode"], maker["attestation"]["version"]) == ("require", 1)
    assert browser.post(f"{path}/edit", changed | {"attestation": ""}).status_code == 303
    assert api.get("/manufacturers").json["manufacturers"][0]["attestation"]["mode"] == "off"
    assert "hall 9" in text_of(browser.get(path).text)


def test_a_manufacturer_is_changed_by_its_admins_alone_and_by_nothing_that_is_wrong(
    app: Flask, api: Api, browser: Browser, browser_of: Callable[..., Browser]
) -> None:
    path = browser.post(f"{MAKERS}/new", {"name": "A maker", "certificate": CERTIFICATE}).headers["Location"]
    form = {"name": "Another", "type": "valve"}
    operator = browser_of(Role.OPERATOR)
    assert f'href="{path}/edit"' not in operator.get(path).text
    assert operator.get(f"{path}/edit").status_code == 403
    assert operator.post(f"{path}/edit", form).status_code == 403
    add_tenant(portal_of(app), "other")
    assert logged_in_as(app, Role.ADMIN, "other").post(f"{path}/edit", form).status_code == 404
    assert browser.post(f"{path}/edit", form, token=None).status_code == 403
    other_ca = Authority("Another CA").certificate.public_bytes(PEM).decode()
    for wrong in (
        {"name": ""},
        {"certificate": other_ca},
        {"certificate": "x"},
        {"validity_days": "0"},
        {"type": SCRIPT * 3},
    ):
        again = browser.post(f"{path}/edit", form | wrong)
        assert again.status_code in (409, 422), wrong
        assert "<script>alert" not in again.text
    assert api.get("/manufacturers").json["manufacturers"][0]["name"] == "A maker"
