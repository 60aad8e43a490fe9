"""What is changed of applications and tenants in the console: topics, names, choices and quotas; and CSRs."""

from __future__ import annotations

import html
import io
import re
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from core.roles import Role
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.harness import ON_SQLITE, Api, api_as, csr_pem
from tests.support.tenants import add_tenant
from tests.web.console.test_access import filled
from tests.web.console.test_access_of_others import APPLICATIONS, TENANTS

pytestmark = ON_SQLITE
TOPICS = [{"filter": "devices/+/telemetry", "access": "read"}]
SCRIPT = '"><script>alert(1)</script>'


@pytest.fixture
def admin(guarded: Flask) -> Browser:
    return logged_in_as(guarded, Role.ADMIN)


@pytest.fixture
def system(guarded: Flask) -> Browser:
    return logged_in_as(guarded, Role.SYSTEM)


@pytest.fixture
def of_guarded(guarded: Flask) -> Api:
    return api_as(guarded, Role.ADMIN)


def application_of(api: Api, **fields: Any) -> str:
    answer = api.post("/applications", {"name": "dash", "topics": TOPICS, **fields})
    assert answer.status_code == 201
    return f"{APPLICATIONS}/{answer.json['application_id']}"


def value(page: str, name: str) -> str:
    """The value that a field of a form has."""
    found = re.findall(rf'name="{name}"[^>]*?value="([^"]*)"', page) or re.findall(
        rf'<textarea[^>]*name="{name}"[^>]*>\n?(.*?)</textarea>', page, re.DOTALL
    )
    return html.unescape(found[0])


# --- Applications ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_file", [False, True])
def test_an_application_with_its_own_key_gets_a_certificate_and_no_bundle(
    of_guarded: Api, admin: Browser, with_file: bool
) -> None:
    form: dict[str, Any] = filled(admin, f"{APPLICATIONS}/new", name="dash", topics="devices/+/telemetry read")
    form |= {"csr_file": (io.BytesIO(csr_pem().encode()), "dash.csr")} if with_file else {"csr": csr_pem()}
    answer = admin.post(f"{APPLICATIONS}/new", {**form, "validity_days": "30"})
    assert answer.status_code == 201
    assert "BEGIN CERTIFICATE" in answer.text
    assert "/download/" not in answer.text
    assert 'id="password"' not in answer.text
    [application] = of_guarded.get("/applications").json["applications"]
    assert (application["name"], application["topics"]) == ("dash", TOPICS)


def test_a_csr_that_is_none_or_goes_with_a_bundle_is_refused(of_guarded: Api, admin: Browser) -> None:
    for wrong in (
        {"csr": "no CSR"},
        {"csr": csr_pem(), "bundle_format": "p12"},
        {"csr": csr_pem(), "key_type": "ed25519"},
    ):
        form = filled(admin, f"{APPLICATIONS}/new", name="dash", topics="devices/+/telemetry read")
        assert admin.post(f"{APPLICATIONS}/new", {**form, **wrong}).status_code == 422, wrong
    assert not of_guarded.get("/applications").json["applications"]


def test_name_and_topics_of_an_application_are_changed_and_what_is_the_same_is_not(
    of_guarded: Api, admin: Browser
) -> None:
    path = application_of(of_guarded)
    page = admin.get(f"{path}/edit").text
    given = {name: value(page, name) for name in ("name", "topics")}
    assert given == {"name": "dash", "topics": "devices/+/telemetry read"}
    assert admin.post(f"{path}/edit", given).status_code == 303
    assert not of_guarded.get("/audit?action=application:update").json["entries"]
    changed = {"name": "dash 2", "topics": "devices/+/telemetry read\r\ndevices/+/news write"}
    assert admin.post(f"{path}/edit", changed).status_code == 303
    [application] = of_guarded.get("/applications").json["applications"]
    assert application["name"] == "dash 2"
    assert [topic["access"] for topic in application["topics"]] == ["read", "write"]


@pytest.mark.parametrize("topics", ["", "devices/+/telemetry", "portal/# read", SCRIPT])
def test_topics_that_cannot_be_are_said_at_the_form_and_change_nothing(
    of_guarded: Api, admin: Browser, topics: str
) -> None:
    path = application_of(of_guarded)
    again = admin.post(f"{path}/edit", {"name": SCRIPT, "topics": topics})
    assert again.status_code == 422
    assert "<script>alert" not in again.text
    [application] = of_guarded.get("/applications").json["applications"]
    assert (application["name"], application["topics"]) == ("dash", TOPICS)


def test_who_may_not_manage_applications_or_is_of_another_tenant_changes_none(
    guarded: Flask, of_guarded: Api, admin: Browser
) -> None:
    path, form = application_of(of_guarded), {"name": "other", "topics": "devices/+/telemetry read"}
    for role in (Role.OPERATOR, Role.AUDITOR):
        browser = logged_in_as(guarded, role)
        assert f"{path}/edit" not in browser.get(APPLICATIONS).text
        assert browser.get(f"{path}/edit").status_code == 403
        assert browser.post(f"{path}/edit", form).status_code == 403
    add_tenant(portal_of(guarded), "acme")
    stranger = logged_in_as(guarded, Role.ADMIN, "acme")
    assert stranger.get(f"{path}/edit").status_code == 404
    assert stranger.post(f"{path}/edit", form).status_code == 404
    assert admin.post(f"{path}/edit", form, token=None).status_code == 403
    assert of_guarded.get("/applications").json["applications"][0]["name"] == "dash"


# --- Tenants --------------------------------------------------------------------------------------------------------


def test_choices_and_quotas_of_a_tenant_are_changed_and_taken_back(guarded: Flask, system: Browser) -> None:
    add_tenant(portal_of(guarded), "acme")
    path = f"{TENANTS}/acme/edit"
    form = {"device_days": "30", "key_type": "ed25519", "bundle_format": "p12", "devices": "5"}
    assert system.post(path, form).status_code == 303
    record = portal_of(guarded).tenants.show("acme")
    assert (record.choices.device_days, record.choices.key_type, record.quotas.devices) == (30, "ed25519", 5)
    page = system.get(path).text
    assert value(page, "device_days") == "30"
    assert '<option value="ed25519" selected>' in page
    assert system.post(path, {"device_days": "30"}).status_code == 303
    record = portal_of(guarded).tenants.show("acme")
    assert (record.choices.device_days, record.choices.key_type, record.quotas.devices) == (30, None, None)


def test_what_no_tenant_can_have_is_said_at_its_field(guarded: Flask, system: Browser) -> None:
    add_tenant(portal_of(guarded), "acme")
    for name, wrong in (("device_days", "0"), ("link_hours", "8761"), ("devices", "x"), ("key_type", "rsa-512")):
        again = system.post(f"{TENANTS}/acme/edit", {name: wrong, "bulk_uploads": "7"})
        assert again.status_code == 422, name
        assert value(again.text, "bulk_uploads") == "7"
    assert portal_of(guarded).tenants.show("acme").quotas.bulk_uploads is None
    assert system.get(f"{TENANTS}/nobody/edit").status_code == 404
    assert system.post(f"{TENANTS}/nobody/edit", {"devices": "5"}).status_code == 404


def test_only_the_role_above_the_tenants_changes_them(guarded: Flask, admin: Browser, system: Browser) -> None:
    add_tenant(portal_of(guarded), "acme")
    path = f"{TENANTS}/acme/edit"
    for browser in (admin, logged_in_as(guarded, Role.ADMIN, "acme")):
        assert browser.get(path).status_code == 403
        assert browser.post(path, {"devices": "5"}).status_code == 403
    assert system.post(path, {"devices": "5"}, token=None).status_code == 403
    assert portal_of(guarded).tenants.show("acme").quotas.devices is None
    assert "Edit acme" in text_of(system.get(path).text)
