"""Nobody of a tenant that is suspended, or was removed, is served by any way in, until it is resumed."""

from __future__ import annotations

import dataclasses
import json
import ssl
from typing import Any

import pytest
from flask import Flask

from app import ROUTES, portal_of
from core.roles import Role
from core.tenants import TenantStatus
from operations.wiring import Portal
from store import tenants
from store.audit import Actor
from tests.support.est import Device as EstClient
from tests.support.est import csr_der, in_base64, new_key, refused
from tests.support.harness import ON_SQLITE, Api, api_as, csr_pem, problem_of
from tests.workflows.test_admission import Rows, request_of
from web.api.routing import Route
from workflows.bulk.batch import Candidate, RowFailed

pytestmark = ON_SQLITE
ACME = Actor("acme", "an importer", "operator", "request-1", "192.0.2.1")
NOT_SERVED = [TenantStatus.SUSPENDED, TenantStatus.REMOVED]
PLAIN = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}


def set_status(portal: Portal, status: TenantStatus) -> None:
    with portal.database.transaction() as tx:
        tenants.update_tenant(tx, dataclasses.replace(tenants.get_tenant(tx, "acme"), status=status))
    portal.tenant_terms.refresh()


@pytest.fixture
def acme(app: Flask) -> Api:
    """The admin of a second tenant."""
    return api_as(app, Role.ADMIN, "acme")


@pytest.mark.parametrize("role", [Role.ADMIN, Role.OPERATOR, Role.AUDITOR])
def test_a_token_of_the_tenant_is_refused_at_every_route_and_works_again_when_it_is_resumed(
    app: Flask, role: Role
) -> None:
    portal, api = portal_of(app), api_as(app, role, "acme")
    set_status(portal, TenantStatus.SUSPENDED)
    for route in ROUTES:
        if _needs_token(route):
            path = route.path.replace("{", "").replace("}", "")
            answer = api.call(route.method, path, {} if route.method in ("POST", "PATCH") else None)
            assert problem_of(answer, 403, "tenant_suspended"), route.name
    entries, _ = portal.operators.audit("acme", limit=1, before=None, filters={})
    assert (entries[0].outcome, entries[0].detail) == ("refused", {"code": "tenant_suspended"})
    set_status(portal, TenantStatus.ACTIVE)
    assert api.get("/devices").status_code == 200


def _needs_token(route: Route) -> bool:
    return route.permission is not None or (route.token_optional and not route.for_devices)


@pytest.mark.parametrize("status", NOT_SERVED)
def test_a_download_link_of_the_tenant_is_refused_and_not_spent(app: Flask, acme: Api, status: TenantStatus) -> None:
    link = "/download/" + acme.register()["download_url"].rpartition("/")[2]
    anyone = api_as(app, None)
    set_status(portal_of(app), status)
    for call in (anyone.get, lambda path: anyone.call("HEAD", path)):
        assert call(link).status_code == 403
    problem_of(anyone.get(link), 403, "tenant_suspended")
    if status is TenantStatus.SUSPENDED:  # a removed one does not come back
        set_status(portal_of(app), TenantStatus.ACTIVE)
        assert anyone.get(link).status_code == 200


@pytest.mark.parametrize("status", NOT_SERVED)
def test_no_device_of_the_tenant_enrols_or_renews(app: Flask, acme: Api, status: TenantStatus) -> None:
    token, key = acme.post("/enrolment-tokens", {"name": "a batch"}).json["token"], new_key()
    registered = acme.post("/register", PLAIN | {"csr": csr_pem(key)}).json
    certificate = ssl.PEM_cert_to_DER_cert(registered["certificate"])
    before = acme.get("/devices").json["devices"]
    set_status(portal_of(app), status)
    for path in ("/.well-known/est/", "/.well-known/est/acme/"):
        enrolling = EstClient(api_as(app, None), token, None, path)
        known = EstClient(api_as(app, None), None, certificate, path)
        assert status in refused(enrolling.enrol(), 403)
        assert status in refused(enrolling.enrol(operation="serverkeygen"), 403)
        body = in_base64(csr_der(key, registered["device_id"]))
        assert status in refused(known.call("POST", "simplereenroll", body), 403)
    assert status in refused(
        EstClient(api_as(app, None), None, None, "/.well-known/est/acme/").call("GET", "cacerts"), 403
    )
    if status is TenantStatus.SUSPENDED:  # a removed one does not come back
        set_status(portal_of(app), TenantStatus.ACTIVE)
        assert acme.get("/devices").json["devices"] == before
        assert EstClient(api_as(app, None), token).enrol().status_code == 200


def test_an_import_that_is_under_way_stops_admitting_rows(app: Flask, acme: Api) -> None:
    portal = portal_of(app)

    class Slow(Rows):
        """Rows between which the tenant is suspended."""

        def take(self, limit: int, *, wait: bool) -> Any:
            if self.next_row == 2:
                set_status(portal, TenantStatus.SUSPENDED)
            return super().take(1, wait=wait)

    rows = Slow([Candidate(number, request_of(number, csr=True)) for number in (1, 2, 3)])
    answers = [answer for answers in portal.bulk.register(ACME, rows) for answer in answers]
    assert [answer.code for answer in answers if isinstance(answer, RowFailed)] == ["tenant_suspended"] * 2
    row = json.dumps(PLAIN)
    upload = acme.call("POST", "/register/bulk", data=row, headers={"Content-Type": "application/x-ndjson"})
    problem_of(upload, 403, "tenant_suspended")


def test_events_of_the_tenant_wait_until_it_is_resumed(app: Flask, acme: Api) -> None:
    portal = portal_of(app)
    sent: list[str] = []
    acme.post("/webhooks", {"name": "hook", "url": "https://example.com"})
    acme.register()

    def send(message: Any, *, now: object) -> Any:
        sent.append(message.event_id)
        return dataclasses.make_dataclass("Sent", ["problem"])(None)

    portal.dispatcher._sender = dataclasses.make_dataclass("Sender", ["send"])(send)
    set_status(portal, TenantStatus.SUSPENDED)
    portal.dispatcher.send_due()
    assert sent == []
    set_status(portal, TenantStatus.ACTIVE)
    portal.dispatcher.send_due()
    assert len(sent) == 1


def test_the_first_tenant_is_served_meanwhile(app: Flask, acme: Api) -> None:
    set_status(portal_of(app), TenantStatus.SUSPENDED)
    api = api_as(app, Role.OPERATOR)
    assert api.register()["status"] == "active"
