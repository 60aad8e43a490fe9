"""Which role may call which route, written out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from flask import Flask

from app import ROUTES, portal_of
from core.roles import Role
from store import tenants
from tests.support.harness import ON_SQLITE, Api, api_as, problem_of
from workflows.operators import new_token

ANYONE = {*Role, None}
SYSTEM, ADMIN, OPERATOR, AUDITOR = Role.SYSTEM, Role.ADMIN, Role.OPERATOR, Role.AUDITOR

# A route that is not in this table fails the first test: the author of a route decides here who may call it.
MAY_CALL: dict[str, set[Role | None]] = {
    "POST /register": {SYSTEM, ADMIN, OPERATOR},
    "POST /register/bulk": {SYSTEM, ADMIN, OPERATOR},
    "GET /devices": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "GET /devices/{device_id}": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "PATCH /devices/{device_id}": {SYSTEM, ADMIN, OPERATOR},
    "GET /devices/{device_id}/certificates": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "POST /revoke/{device_id}": {SYSTEM, ADMIN, OPERATOR},
    "POST /devices/actions": {SYSTEM, ADMIN, OPERATOR},
    "POST /devices/{device_id}/renew": {SYSTEM, ADMIN, OPERATOR},
    "POST /devices/{device_id}/suspend": {SYSTEM, ADMIN, OPERATOR},
    "POST /devices/{device_id}/resume": {SYSTEM, ADMIN, OPERATOR},
    "GET /download/{token}": ANYONE,
    "POST /download/{token}": ANYONE,
    "GET /ca.pem": ANYONE,
    "GET /broker-ca.pem": ANYONE,
    "GET /ca/{issuer}.cer": ANYONE,
    "GET /ca/{issuer}.pem": ANYONE,
    "GET /crl/{issuer}.crl": ANYONE,
    "GET /ocsp/{request}": ANYONE,
    "POST /ocsp": ANYONE,
    "POST /ocsp/": ANYONE,
    "POST /devices": {SYSTEM, ADMIN, OPERATOR},
    "POST /attestation/nonce": {SYSTEM, ADMIN, OPERATOR},  # and devices, by their own credentials
    "POST /enroll": ANYONE,
    "GET /.well-known/onboarding/config": ANYONE,
    "GET /enrolments": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "GET /devices/{device_id}/enrolment": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "POST /devices/{device_id}/approve": {SYSTEM, ADMIN, OPERATOR},
    "POST /devices/{device_id}/reject": {SYSTEM, ADMIN, OPERATOR},
    "GET /enrolment-tokens": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "POST /enrolment-tokens": {SYSTEM, ADMIN, OPERATOR},
    "PATCH /enrolment-tokens/{enrolment_token_id}": {SYSTEM, ADMIN},
    "DELETE /enrolment-tokens/{enrolment_token_id}": {SYSTEM, ADMIN, OPERATOR},
    "GET /groups": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "POST /groups": {SYSTEM, ADMIN, OPERATOR},
    "GET /groups/{group}": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "PATCH /groups/{group}": {SYSTEM, ADMIN, OPERATOR},
    "DELETE /groups/{group}": {SYSTEM, ADMIN, OPERATOR},
    "POST /groups/{group}/members": {SYSTEM, ADMIN, OPERATOR},
    "GET /profiles": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "POST /profiles": {SYSTEM, ADMIN},
    "GET /profiles/{profile}": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "PATCH /profiles/{profile}": {SYSTEM, ADMIN},
    "DELETE /profiles/{profile}": {SYSTEM, ADMIN},
    "GET /manufacturers": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "POST /manufacturers": {SYSTEM, ADMIN},
    "GET /manufacturers/{manufacturer_id}": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "PATCH /manufacturers/{manufacturer_id}": {SYSTEM, ADMIN},
    "POST /manufacturers/{manufacturer_id}/proof": {SYSTEM, ADMIN},
    "DELETE /manufacturers/{manufacturer_id}": {SYSTEM, ADMIN},
    **{
        f"{method} /.well-known/est/{label}{operation}": ANYONE
        for method, operations in (
            ("GET", ("cacerts", "csrattrs")),
            ("POST", ("simpleenroll", "simplereenroll", "serverkeygen")),
        )
        for operation in operations
        for label in ("", "{label}/")
    },
    "POST /applications": {SYSTEM, ADMIN},
    "GET /applications": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "GET /applications/{application_id}": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "PATCH /applications/{application_id}": {SYSTEM, ADMIN},
    "POST /applications/{application_id}/renew": {SYSTEM, ADMIN},
    "DELETE /applications/{application_id}": {SYSTEM, ADMIN},
    "GET /tokens": {SYSTEM, ADMIN},
    "POST /tokens": {SYSTEM, ADMIN},
    "DELETE /tokens/{token_id}": {SYSTEM, ADMIN},
    "GET /oidc/configuration": ANYONE,
    "POST /oidc/tokens": ANYONE,
    "GET /whoami": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "GET /tenants": {SYSTEM},
    "POST /tenants": {SYSTEM},
    "GET /tenants/{tenant}": {SYSTEM},
    "PATCH /tenants/{tenant}": {SYSTEM},
    "DELETE /tenants/{tenant}": {SYSTEM},
    "GET /tenants/{tenant}/export": {SYSTEM},
    "POST /tenants/{tenant}/suspend": {SYSTEM},
    "POST /tenants/{tenant}/resume": {SYSTEM},
    "POST /brokers": {SYSTEM},
    "GET /brokers": {SYSTEM},
    "GET /brokers/{broker}": {SYSTEM},
    "PATCH /brokers/{broker}": {SYSTEM},
    "DELETE /brokers/{broker}": {SYSTEM},
    "POST /brokers/{broker}/away": {SYSTEM},
    "POST /brokers/{broker}/back": {SYSTEM},
    "POST /broker-agents/join": ANYONE,
    "GET /audit": {SYSTEM, ADMIN, AUDITOR},
    "GET /audit/export": {SYSTEM, ADMIN, AUDITOR},
    "GET /audit/checkpoint": ANYONE,
    "GET /audit/key": ANYONE,
    "GET /audit/{log}/checkpoint": ANYONE,
    "GET /webhooks": {SYSTEM, ADMIN},
    "POST /webhooks": {SYSTEM, ADMIN},
    "DELETE /webhooks/{webhook_id}": {SYSTEM, ADMIN},
    "GET /webhooks/{webhook_id}/deliveries": {SYSTEM, ADMIN},
    "POST /webhooks/{webhook_id}/redeliver": {SYSTEM, ADMIN},
    "POST /webhooks/{webhook_id}/test": {SYSTEM, ADMIN},
    "GET /healthz": ANYONE,
    "GET /readyz": ANYONE,
    "GET /metrics": {SYSTEM, ADMIN, OPERATOR, AUDITOR},
    "GET /openapi.json": ANYONE,
    "GET /docs": ANYONE,
}

# No token helps there, nor is one needed: tests/web/api/test_device_configuration.py.
BY_CERTIFICATE = "GET /.well-known/onboarding/config"
BY_ROLE = [route for route in MAY_CALL if route != BY_CERTIFICATE]


@pytest.fixture(scope="module")
def clients(shared_app: Flask) -> dict[Role | None, Api]:
    return {role: api_as(shared_app, role) for role in (*Role, None)}


def call(api: Api, route: str, method: str | None = None) -> Any:
    """Call a route for a thing that does not exist, with a body that changes nothing."""
    declared, path = route.split(" ")
    path = re.sub(r"\{(device|application)_id\}", "00000000-0000-4000-8000-000000000000", path)
    path = re.sub(r"\{\w+\}", "0" * 16, path)
    return api.call(method or declared, path, json={} if declared in ("POST", "PATCH") else None)


def test_every_route_has_a_decision_here_and_every_decision_a_route() -> None:
    assert {f"{route.method} {route.path}" for route in ROUTES} == set(MAY_CALL)


@ON_SQLITE
@pytest.mark.parametrize(("route", "role"), [*itertools.product(BY_ROLE, (*Role, None))])
def test_a_role_may_call_what_the_table_says_and_nothing_else(
    clients: dict[Role | None, Api], route: str, role: Role | None
) -> None:
    answer = call(clients[role], route)
    if role in MAY_CALL[route]:
        assert answer.status_code not in (401, 403)
    elif role is None:
        problem_of(answer, 401, "unauthenticated")
        by_device = route == "POST /attestation/nonce"
        assert answer.headers["WWW-Authenticate"].partition(" ")[0] == ("Basic" if by_device else "Bearer")
    else:
        assert role in problem_of(answer, 403, "forbidden")["detail"]
    assert answer.headers["X-Request-Id"]


@ON_SQLITE
@pytest.mark.parametrize("role", [*Role, None])
@pytest.mark.parametrize("route", [route for route in BY_ROLE if route.startswith("GET ")])
def test_head_needs_the_same_role_as_get(clients: dict[Role | None, Api], route: str, role: Role | None) -> None:
    answer = call(clients[role], route, "HEAD")
    assert (answer.status_code in (401, 403)) == (role not in MAY_CALL[route])
    assert answer.data == b""


@ON_SQLITE
@pytest.mark.parametrize(("role", "code"), [(AUDITOR, "forbidden"), (None, "unauthenticated")])
def test_a_refusal_is_recorded_under_the_request_id(
    app: Flask, as_role: Callable[[Role | None], Api], role: Role | None, code: str
) -> None:
    answer = call(as_role(role), "POST /register")
    entry = portal_of(app).operators.audit("default", limit=1, before=None, filters={})[0][0]
    assert (entry.action, entry.outcome, entry.detail) == ("POST /register", "refused", {"code": code})
    assert entry.request_id == answer.headers["X-Request-Id"]
    assert entry.address == "127.0.0.1"
    assert ("auditor" in entry.actor) == (role is AUDITOR)


@ON_SQLITE
def test_a_refused_request_does_not_show_whether_a_thing_exists(clients: dict[Role | None, Api]) -> None:
    known = clients[ADMIN].register()["device_id"]
    there, not_there = (clients[None].get(f"/devices/{name}").json for name in (known, "no-id"))
    assert {**there, "request_id": ""} == {**not_there, "request_id": ""}


GUARDED = [route for route, roles in MAY_CALL.items() if None not in roles]


@ON_SQLITE
@pytest.mark.parametrize("route", GUARDED)
@pytest.mark.parametrize("state", ["revoked", "expired"])
def test_a_revoked_or_expired_token_is_refused_on_every_route(shared_app: Flask, route: str, state: str) -> None:
    portal = portal_of(shared_app)
    now = portal.clock()
    ended = now - timedelta(seconds=1)
    secret, record = new_token("default", "of old", ADMIN, ended if state == "expired" else None, now=now)
    with portal.database.transaction() as tx:
        tenants.add_token(tx, record, secret=secret)
        if state == "revoked":
            tenants.revoke_token(tx, "default", record.id, revoked_at=ended)
    problem_of(call(Api(shared_app.test_client(), secret), route), 401, "unauthenticated")
