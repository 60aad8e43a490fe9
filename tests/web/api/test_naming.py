"""A device, or an application, is named in a path by its name, its external id or the beginning of its id, too."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask

from app import ROUTES, portal_of
from core.roles import Role
from store import tenants
from tests.support.harness import Api, api_as, csr_pem, problem_of
from web.api.fields import names_in

ABOUT_DEVICES = [route for route in ROUTES if "{device_id}" in route.path]


@pytest.fixture
def device(api: Api) -> str:
    api.register(name="other", external_id="line-4/2")
    return str(api.register(name="pump & 1", external_id="line-4/1", csr=csr_pem())["device_id"])


@pytest.mark.parametrize("query", ["name=pump %26 1", "external_id=line-4/1"])
def test_a_device_is_shown_and_changed_by_its_names(api: Api, device: str, query: str) -> None:
    assert api.get(f"/devices/-?{query}").json["device_id"] == device
    assert api.patch(f"/devices/-?{query}", {"location": "hall 9"}).json["location"] == "hall 9"
    assert api.get(f"/v1/devices/-/certificates?{query}").status_code == 200
    assert api.post(f"/devices/-/renew?{query}", {"csr": csr_pem()}).json["device_id"] == device
    assert api.post(f"/revoke/-?{query}").json["device_id"] == device


def test_the_beginning_of_an_id_will_do_if_no_other_begins_so(api: Api, device: str) -> None:
    assert api.get(f"/devices/{device[:35]}").json["device_id"] == device
    detail = problem_of(api.get(f"/devices/{device[:4]}"), 409, "name_ambiguous")["detail"]
    assert f"{device} pump & 1 line-4/1" in detail
    problem_of(api.get(f"/devices/{device[:3]}"), 404, "device_not_found")
    problem_of(api.get("/devices/ffff"), 404, "device_not_found")


def test_an_ambiguous_name_changes_nothing_and_lists_who_may_be_meant(api: Api, device: str) -> None:
    second = api.register(name="pump & 1")["device_id"]
    detail = problem_of(api.post("/revoke/-?name=pump %26 1"), 409, "name_ambiguous")["detail"]
    assert device in detail
    assert second in detail
    assert {one["status"] for one in api.get("/devices").json["devices"]} == {"active"}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "name"),
        ("name=a&external_id=b", "name"),
        ("name=a&name=a", "name"),
        ("name=", "name"),
        ("name=a%00", "name"),
        (f"external_id={'x' * 129}", "external_id"),
    ],
)
def test_a_name_is_given_once_and_must_be_one(api: Api, query: str, field: str) -> None:
    assert problem_of(api.get(f"/devices/-?{query}"), 422, "invalid_input")["errors"][0]["field"] == field


def test_a_name_does_not_go_with_an_id(api: Api, device: str) -> None:
    for path in (f"/revoke/{device}", f"/revoke/{device[:8]}"):
        problem_of(api.post(f"{path}?name=other"), 422, "invalid_input")
    assert api.get(f"/devices/{device}").json["status"] == "active"


def test_a_name_that_nobody_has_is_not_found(api: Api, device: str) -> None:
    problem_of(api.get("/devices/-?name=nobody"), 404, "device_not_found")
    problem_of(api.get("/applications/-?name=pump %26 1"), 404, "application_not_found")
    problem_of(api.delete("/applications/-?name=nobody&reason=superseded"), 404, "application_not_found")


@pytest.mark.parametrize("route", ABOUT_DEVICES, ids=lambda route: route.name)
def test_no_route_knows_the_names_of_another_tenants_devices(app: Flask, api: Api, device: str, route: Any) -> None:

    portal = portal_of(app)
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "another", created_at=portal.clock())
    neighbour = api_as(app, Role.ADMIN, "another")
    body = None if route.method == "GET" else {"name": "taken over"} if route.method == "PATCH" else {}
    for part, query in (("-", "?name=pump %26 1"), ("-", "?external_id=line-4/1"), (device[:35], "")):
        answer = neighbour.call(route.method, route.path.format(device_id=part) + query, body)
        assert (answer.status_code, device in answer.text) == (404, False), answer.text
    assert names_in(route.path) == ("name", "external_id")
