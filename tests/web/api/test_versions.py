"""The paths below /v1: the same as those without a version, for each route that is not fixed by others."""

from __future__ import annotations

import re

import pytest
from flask import Flask

from app import ROUTES, portal_of
from core.roles import Role
from tests.support.harness import ON_SQLITE, Api, api_as, problem_of
from web.api.routing import Route

# Decided one by one: what a standard, a tool or a link that was handed out has fixed keeps its one path.
FIXED = {
    "/.well-known", "/ca.pem", "/broker-ca.pem", "/ca", "/crl", "/ocsp", "/download",
    "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs",
}  # fmt: skip
pytestmark = ON_SQLITE


def is_fixed(route: Route) -> bool:
    return any(route.path == path or route.path.startswith(f"{path}/") for path in FIXED)


def of_nothing(path: str) -> str:
    """A path of things that do not exist."""
    path = re.sub(r"\{(device|application)_id\}", "00000000-0000-4000-8000-000000000000", path)
    return re.sub(r"\{\w+\}", "0" * 16, path)


@pytest.fixture(scope="module")
def nobody(shared_app: Flask) -> Api:
    return api_as(shared_app, None)


@pytest.fixture(scope="module")
def auditor(shared_app: Flask) -> Api:
    return api_as(shared_app, Role.AUDITOR)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_each_route_answers_below_v1_as_without_a_version(route: Route, auditor: Api) -> None:
    path = of_nothing(route.path)
    body: dict[str, str] | None = {} if route.method in ("POST", "PATCH") else None
    versioned = auditor.call(route.method, f"/v1{path}", json=body)
    if is_fixed(route):
        problem_of(versioned, 404, "not_found")
        return
    plain = auditor.call(route.method, path, json=body)
    assert (versioned.status_code, versioned.mimetype) == (plain.status_code, plain.mimetype)
    if plain.status_code >= 400:
        assert {**versioned.json, "request_id": ""} == {**plain.json, "request_id": ""}


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/v1/devices", "/V1/devices", "/v2/devices"])
def test_nothing_else_is_a_version(path: str, auditor: Api) -> None:
    problem_of(auditor.get(path), 404, "not_found")


def test_permissions_and_the_audit_record_know_one_path(shared_app: Flask, nobody: Api) -> None:
    problem_of(nobody.post("/v1/register", {}), 401, "unauthenticated")
    entry = portal_of(shared_app).operators.audit("default", limit=1, before=None, filters={})[0][0]
    assert entry.action == "POST /register"


def test_devices_that_enrol_are_asked_for_their_own_credentials_below_v1_too(nobody: Api) -> None:
    for path in ("/attestation/nonce", "/v1/attestation/nonce"):
        assert nobody.post(path, {}).headers["WWW-Authenticate"].startswith("Basic")


def test_a_device_that_was_registered_below_v1_is_the_same_device(shared_app: Flask) -> None:
    operator = api_as(shared_app, Role.OPERATOR)
    body = {"name": "pump-9", "type": "pump", "location": "hall 1", "firmware": "1.0"}
    key = {"Idempotency-Key": "one-and-the-same-key"}
    first = operator.post("/v1/register", body, headers=key)
    assert first.status_code == 201
    assert operator.post("/register", body, headers=key).json["device_id"] == first.json["device_id"]
    assert operator.get(f"/v1{first.headers['Location']}").json == operator.get(first.headers["Location"]).json


def test_the_description_has_each_path_once(nobody: Api) -> None:
    paths = nobody.get("/openapi.json").json["paths"]
    assert set(paths) == {route.path for route in ROUTES}
