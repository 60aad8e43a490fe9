"""Manufacturers, applications and tenants in the console: added, proven, renewed, suspended and removed."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from app import portal_of
from core.roles import Role
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.est import Device, certificates_of, csr_der
from tests.support.harness import ON_SQLITE, Api, api_as
from tests.support.pki import PEM, Authority
from tests.support.tenants import add_tenant
from tests.web.console.test_access import filled, secret_in
from tests.web.console.test_device import hidden

pytestmark = ON_SQLITE
MAKERS, APPLICATIONS, TENANTS = (f"/ui/access/{part}" for part in ("manufacturers", "applications", "tenants"))
MAKER = Authority("A maker's CA")
CERTIFICATE = MAKER.certificate.public_bytes(PEM).decode()


def test_where_there_is_nothing_the_pages_say_what_it_is_for(browser_of: Callable[..., Browser]) -> None:
    for role, may in ((Role.ADMIN, True), (Role.AUDITOR, False)):
        browser = browser_of(role)
        for path, text in ((MAKERS, "No manufacturers"), (APPLICATIONS, "No applications")):
            page = browser.get(path).text
            assert text in page
            assert (f'href="{path}/new"' in page) is may


# --- Manufacturers ------------------------------------------------------------------------------------------------


def test_a_manufacturer_is_added_proven_and_removed_and_its_devices_enrol_meanwhile(api: Api, browser: Browser) -> None:
    form = {"name": "A maker", "certificate": CERTIFICATE, "type": "valve"}
    path = browser.post(f"{MAKERS}/new", form).headers["Location"]
    assert browser.post(f"{MAKERS}/new", form).status_code == 409  # sent twice it is there once
    device = Device(api, certificate=MAKER.issue("sn-1").certificate.public_bytes(Encoding.DER))
    assert device.enrol(csr_der()).status_code == 403
    [record] = api.get("/manufacturers").json["manufacturers"]
    assert record["nonce"] in browser.get(path).text
    assert browser.post(f"{path}/proof", {"proof": "AAAA"}).status_code == 422
    proof = MAKER.issue(record["nonce"]).certificate.public_bytes(PEM).decode()
    for _ in range(2):
        assert browser.post(f"{path}/proof", {"proof": proof}).status_code == 303
    certificates_of(device.enrol(csr_der()))
    assert api.get("/devices").json["devices"][0]["type"] == "valve"
    for _ in range(2):
        assert browser.post(f"{path}/remove").status_code == 303
    assert "No manufacturers" in browser.get(MAKERS).text
    assert "A maker" in browser.get(f"{MAKERS}?all=yes").text


def test_what_is_no_ca_certificate_is_refused_at_the_form(browser: Browser) -> None:
    for certificate in ("", "no certificate", MAKER.issue("x").certificate.public_bytes(PEM).decode()):
        answer = browser.post(f"{MAKERS}/new", {"name": "A maker", "certificate": certificate})
        assert answer.status_code == 422, certificate
        assert 'value="A maker"' in answer.text
    assert "No manufacturers" in browser.get(MAKERS).text


# --- Applications -------------------------------------------------------------------------------------------------


def test_an_application_is_registered_once_renewed_and_revoked(guarded: Flask) -> None:
    api, browser = api_as(guarded, Role.ADMIN), logged_in_as(guarded, Role.ADMIN)
    form = filled(
        browser, f"{APPLICATIONS}/new", name="dashboard", topics="devices/+/telemetry read\ndevices/+/command  write\n"
    )
    first, again = (browser.post(f"{APPLICATIONS}/new", form) for _ in range(2))
    link = re.compile(r'<code id="link">(.*?)</code>')
    assert (first.status_code, first.headers["Cache-Control"]) == (201, "no-store")
    assert link.findall(first.text) == link.findall(again.text) != []
    [application] = api.get("/applications").json["applications"]
    assert application["topics"] == [
        {"filter": "devices/+/telemetry", "access": "read"}, {"filter": "devices/+/command", "access": "write"},
    ]  # fmt: skip
    page = browser.get(APPLICATIONS).text
    password = html.unescape(re.findall(r'<code id="password">(.*?)</code>', first.text)[0])
    assert password not in page
    path = f"{APPLICATIONS}/{application['application_id']}"
    once = {"once": hidden(page, "once")}
    renewed = [link.findall(browser.post(f"{path}/renew", once).text) for _ in range(2)]
    assert renewed[0] == renewed[1] != link.findall(first.text)
    for _ in range(2):
        assert browser.post(f"{path}/revoke").status_code == 303
    assert api.get("/applications").json["applications"][0]["status"] == "revoked"


def test_topics_that_cannot_be_read_come_back_at_the_form(guarded: Flask) -> None:
    api, browser = api_as(guarded, Role.ADMIN), logged_in_as(guarded, Role.ADMIN)
    for topics in ("devices/x", "devices/x everything", "a/#/b read", ""):
        answer = browser.post(f"{APPLICATIONS}/new", filled(browser, f"{APPLICATIONS}/new", name="a", topics=topics))
        assert answer.status_code == 422, topics
        assert 'aria-invalid="true"' in answer.text or "notice-bad" in answer.text, topics
        assert topics in answer.text
    assert api.get("/applications").json["applications"] == []


def test_those_of_another_tenant_are_not_there_and_lesser_roles_change_nothing(guarded: Flask) -> None:
    api, browser = api_as(guarded, Role.ADMIN), logged_in_as(guarded, Role.ADMIN)
    maker = browser.post(f"{MAKERS}/new", {"name": "A maker", "certificate": CERTIFICATE}).headers["Location"]
    body = {"name": "dashboard", "topics": [{"filter": "devices/+/telemetry", "access": "read"}]}
    application = f"{APPLICATIONS}/{api.post('/applications', body).json['application_id']}"
    add_tenant(portal_of(guarded), "other")
    stranger, operator = logged_in_as(guarded, Role.ADMIN, "other"), logged_in_as(guarded, Role.OPERATOR)
    assert stranger.get(maker).status_code == 404
    assert "dashboard" not in stranger.get(APPLICATIONS).text.replace("or a dashboard", "")
    for path, form in (
        (f"{maker}/remove", {}), (f"{maker}/proof", {"proof": "AAAA"}), (f"{application}/revoke", {}),
        (f"{application}/renew", {"once": "x" * 24}),
    ):  # fmt: skip
        assert stranger.post(path, form).status_code == 404, path
        assert operator.post(path, form).status_code == 403, path
        assert browser.post(path, form, token=None).status_code == 403, path
    assert api.get("/applications").json["applications"][0]["status"] == "active"


# --- Tenants ------------------------------------------------------------------------------------------------------


def test_a_tenant_is_added_suspended_resumed_and_removed_by_its_name(guarded: Flask) -> None:
    system = logged_in_as(guarded, Role.SYSTEM)
    form = filled(system, f"{TENANTS}/new", name="acme", devices="5")
    made = system.post(f"{TENANTS}/new", form)
    assert made.status_code == 201, text_of(made.text)
    assert secret_in(system.post(f"{TENANTS}/new", form).text) == secret_in(made.text)
    assert Browser(guarded).log_in(secret_in(made.text)).status_code == 303
    api = api_as(guarded, Role.SYSTEM)
    for action, status in (("suspend", "suspended"), ("suspend", "suspended"), ("resume", "active")):
        assert system.post(f"{TENANTS}/acme/{action}").status_code == 303
        assert api.get("/tenants/acme").json["status"] == status
    assert system.post(f"{TENANTS}/acme/remove", {"confirm": "acne"}).status_code == 422
    assert api.get("/tenants/acme").json["status"] == "active"
    assert system.post(f"{TENANTS}/acme/remove", {"confirm": "acme"}).status_code == 303
    assert "Removed" in text_of(system.get(TENANTS).text)
    for fields in ({"name": "Acme"}, {"name": "acme", "topic_prefix": "#"}):
        answer = system.post(f"{TENANTS}/new", filled(system, f"{TENANTS}/new", **fields))
        assert answer.status_code == 422, fields


def test_tenants_are_for_the_role_system_alone(browser: Browser) -> None:
    for path in (TENANTS, f"{TENANTS}/new"):
        assert browser.get(path).status_code == 403
    for action in ("new", "default/suspend", "default/resume", "default/remove"):
        assert browser.post(f"{TENANTS}/{action}", {"confirm": "default"}).status_code == 403
