"""Tenants over HTTP: added, changed, suspended and resumed by whoever runs the installation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from broker.guard.control import TENANTS_VERSION
from config import Settings
from core.broker_control import ControlKind
from core.errors import BrokerUnavailable
from core.roles import Role
from tests.support.guarded import guarded_app
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, problem_of, state_of

pytestmark = ON_SQLITE
PLAIN = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """A portal under the control of a guard that knows tenants."""
    settings = make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_TOPIC_PREFIXES="homeassistant")
    with guarded_app(settings, clock, monkeypatch) as built:
        yield built


@pytest.fixture
def system(app: Flask) -> Api:
    return api_as(app, Role.SYSTEM)


def added(system: Api, **fields: Any) -> Any:
    """A tenant that was added, and its first admin."""
    answer = system.post("/tenants", {"name": "acme"} | fields)
    assert answer.status_code == 201, answer.text
    return answer.json


def holding(api: Api, answer: Any) -> Api:
    return Api(api.client, answer["token"])


# --- Add --------------------------------------------------------------------------------------------------------------


def test_a_tenant_is_added_with_its_first_admins_token_for_a_day(system: Api, clock: Clock) -> None:
    answer = system.post("/tenants", {"name": "acme"})
    assert answer.headers["Location"] == "/tenants/acme"
    made = answer.json
    assert (made["name"], made["topic_prefix"], made["est_label"]) == ("acme", "acme", "acme")
    assert (made["status"], made["broker"], made["broker_problem"]) == ("active", "enforced", None)
    assert {*made["quotas"].values(), *made["choices"].values()} == {None}
    admin = holding(system, made)
    assert admin.get("/whoami").json["tenant"] == "acme"
    assert admin.get("/whoami").json["role"] == "admin"
    assert admin.get("/devices").json["devices"] == []
    assert made["token"] not in system.get("/tenants").text
    clock.advance(hours=25)
    problem_of(admin.get("/devices"), 401, "unauthenticated")


def test_its_devices_have_topics_and_terms_of_their_own(system: Api) -> None:
    admin = holding(system, added(system, topic_prefix="sites/acme", choices={"device_days": 30, "link_hours": 2}))
    device = admin.register()
    assert admin.get(f"/devices/{device['device_id']}").json["topics"][0]["filter"] == "sites/acme/{id}/#"
    assert system.get(f"/devices/{device['device_id']}").status_code == 404


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "Acme"}, "name"), ({"name": "a.b"}, "name"), ({"name": "-a"}, "name"), ({"name": "a" * 64}, "name"),
        ({"name": ""}, "name"), ({"name": "cacerts"}, "name"), ({"name": "größe"}, "name"), ({"name": 7}, "name"),
        ({"topic_prefix": "acme/#"}, "topic_prefix"), ({"topic_prefix": "acme/+"}, "topic_prefix"),
        ({"topic_prefix": "$share/acme"}, "topic_prefix"), ({"topic_prefix": "/acme"}, "topic_prefix"),
        ({"topic_prefix": "acme/"}, "topic_prefix"), ({"topic_prefix": "a//b"}, "topic_prefix"),
        ({"topic_prefix": ""}, "topic_prefix"), ({"topic_prefix": "a b"}, "topic_prefix"),
        ({"topic_prefix": "/".join(["a" * 64] * 5)}, "topic_prefix"), ({"topic_prefix": "portal"}, "topic_prefix"),
        ({"topic_prefix": "portal/acme"}, "topic_prefix"), ({"name": "portal"}, "topic_prefix"),
        ({"quotas": {"devices": 0}}, "quotas.devices"), ({"quotas": {"devices": -1}}, "quotas.devices"),
        ({"quotas": {"bulk_uploads": 0}}, "quotas.bulk_uploads"), ({"quotas": {"trucks": 1}}, "quotas.trucks"),
        ({"choices": {"device_days": 0}}, "choices.device_days"),
        ({"choices": {"link_hours": 9999}}, "choices.link_hours"),
        ({"choices": {"key_type": "dsa"}}, "choices.key_type"),
        ({"choices": {"bundle_format": "tar"}}, "choices.bundle_format"),
        ({"status": "removed"}, "status"),
    ],
)  # fmt: skip
def test_what_no_tenant_can_have_is_refused_by_its_field(shared_app: Flask, fields: dict[str, Any], field: str) -> None:
    system = api_as(shared_app, Role.SYSTEM)
    before = state_of(portal_of(shared_app))
    problem = problem_of(system.post("/tenants", {"name": "acme"} | fields), 422, "invalid_input")
    assert [one["field"] for one in problem["errors"]] == [field]
    assert state_of(portal_of(shared_app)) == before


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "acme"}, "There is a tenant of this name"),
        ({"name": "default"}, "There is a tenant of this name"),
        ({"topic_prefix": "sites/acme"}, "acme are below sites/acme"),
        ({"topic_prefix": "sites/acme/hall"}, "acme are below sites/acme"),
        ({"topic_prefix": "sites"}, "acme are below sites/acme"),
        ({"topic_prefix": "devices"}, "default are below devices"),
        ({"topic_prefix": "devices/other"}, "default are below devices"),
        ({"topic_prefix": "homeassistant/other"}, "default are below homeassistant"),
    ],
)
def test_a_name_or_topics_that_another_tenant_has_are_refused(
    system: Api, app: Flask, fields: dict[str, Any], said: str
) -> None:
    added(system, topic_prefix="sites/acme")
    before = state_of(portal_of(app))
    problem = problem_of(system.post("/tenants", {"name": "other"} | fields), 409, "state_conflict")
    assert said in problem["detail"]
    assert state_of(portal_of(app)) == before


@pytest.mark.parametrize("prefix", ["homeassistant", "homeassistant/hall", "homeassistant/lamp/1"])
def test_topics_that_were_granted_below_a_prefix_of_earlier_settings_are_no_tenants(
    system: Api, app: Flask, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    portal = portal_of(app)
    topics = [
        {"filter": "homeassistant/hall/#", "access": "read"}, {"filter": "homeassistant/+/1", "access": "read"},
    ]  # fmt: skip
    lamps = system.post("/applications", {"name": "lamps", "topics": topics}).json["application_id"]
    monkeypatch.setattr(portal.tenants, "_settings", portal.settings.model_copy(update={"topic_prefixes": ()}))
    wanted = {"name": "other", "topic_prefix": prefix}
    assert "homeassistant/" in problem_of(system.post("/tenants", wanted), 409, "state_conflict")["detail"]
    assert system.post("/tenants", {"name": "third", "topic_prefix": "homeassistants"}).status_code == 201
    assert system.delete(f"/applications/{lamps}").status_code == 200
    assert system.post("/tenants", wanted).status_code == 201


def test_no_tenant_gets_certificates_for_servers_that_the_devices_of_another_would_take_for_theirs(
    system: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses = {"extended_key_usage": ["client_auth", "server_auth"]}
    names = {"name": "servers", "dns_names": ["{metadata.host}.example.com"]}
    below, apart = holding(system, added(system)), holding(system, added(system, name="apart", own_root=True))
    answer = problem_of(below.post("/profiles", names | uses), 422, "profile_refused")
    assert "a root of its own" in answer["detail"]
    assert below.post("/profiles", names).status_code == 201
    problem_of(below.patch("/profiles/servers", uses), 422, "profile_refused")
    for api in (apart, system):
        assert api.post("/profiles", names | uses).status_code == 201
    wanted = PLAIN | {"profile": "servers", "metadata": {"host": "historian"}}
    assert apart.post("/register", wanted).status_code == 201
    # One that was made while the tenant had a root of its own, or by an earlier version.
    with monkeypatch.context() as before:
        before.setattr("workflows.profiles.check_servers_of_tenant", lambda *_arguments: None)
        assert below.patch("/profiles/servers", uses).status_code == 200
    problem_of(below.post("/register", wanted | {"metadata": {"host": "other"}}), 422, "profile_refused")


def test_a_tenant_needs_a_guard_that_knows_tenants(system: Api, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    portal = portal_of(app)
    before = state_of(portal)
    app.extensions["guard"].versions.remove(TENANTS_VERSION)
    assert "install" in problem_of(system.post("/tenants", {"name": "acme"}), 409, "guard_needed")["detail"]
    portal.settings.broker_socket.unlink()
    problem_of(system.post("/tenants", {"name": "acme"}), 503, BrokerUnavailable.code)
    files = portal.settings.model_copy(update={"broker_control": ControlKind.FILES})
    monkeypatch.setattr(portal.tenants, "_settings", files)
    problem = problem_of(system.post("/tenants", {"name": "acme"}), 409, "guard_needed")
    assert "PORTAL_BROKER_CONTROL=guard" in problem["detail"]
    assert state_of(portal) == before


def test_a_repeat_with_the_same_idempotency_key_gets_the_same_token(system: Api, app: Flask) -> None:
    key = {"Idempotency-Key": "a-key-of-enough-letters"}
    first, again = (system.post("/tenants", {"name": "acme"}, headers=key) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json["token"] == again.json["token"]
    assert len(system.get("/tenants").json["tenants"]) == 2
    problem_of(system.post("/tenants", {"name": "other"}, headers=key), 409, "idempotency_conflict")
    # The key is the operator's: in the new tenant it is unused.
    admin = holding(system, first.json)
    assert admin.post("/register", PLAIN, headers=key).status_code == 201


def test_a_missing_ca_is_told_and_hinders_nothing_else(
    system: Api, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def create(actor: Any, own_root: bool) -> str:
        asked.append((actor.tenant_id, own_root))
        return "The root's key is elsewhere."

    monkeypatch.setattr(portal_of(app).tenants, "_create_ca", create)
    made = added(system, own_root=True)
    assert made["ca_problem"] == "The root's key is elsewhere."
    assert asked == [("acme", True)]
    assert holding(system, made).get("/tokens").status_code == 200


# --- Read and change ------------------------------------------------------------------------------------------------


def test_tenants_are_listed_with_the_first_one_by_name(system: Api) -> None:
    added(system, name="zeta", quotas={"devices": 5})
    added(system, name="acme", choices={"key_type": "ed25519"})
    listed = system.get("/tenants").json["tenants"]
    assert [one["name"] for one in listed] == ["acme", "default", "zeta"]
    assert [one["topic_prefix"] for one in listed] == ["acme", "devices", "zeta"]
    assert listed[0]["choices"]["key_type"] == "ed25519"
    assert listed[2]["quotas"]["devices"] == 5
    assert system.get("/tenants/zeta").json == listed[2]


@pytest.mark.parametrize("method", ["GET", "PATCH"])
@pytest.mark.parametrize("name", ["nobody", "No-Name", "a" * 64])
def test_a_tenant_that_does_not_exist_is_not_found(system: Api, method: str, name: str) -> None:
    body = {"quotas": {"devices": 5}} if method == "PATCH" else None
    assert "GET /tenants" in problem_of(system.call(method, f"/tenants/{name}", body), 404, "not_found")["detail"]


def test_choices_and_quotas_are_changed_one_by_one_and_taken_back(system: Api) -> None:
    added(system, choices={"device_days": 30, "link_hours": 2}, quotas={"devices": 5})
    answer = system.patch("/tenants/acme", {"choices": {"link_hours": None}, "quotas": {"bulk_uploads": 1}})
    assert answer.status_code == 200
    assert answer.json == system.get("/tenants/acme").json
    assert (answer.json["choices"]["device_days"], answer.json["choices"]["link_hours"]) == (30, None)
    assert (answer.json["quotas"]["devices"], answer.json["quotas"]["bulk_uploads"]) == (5, 1)


@pytest.mark.parametrize("body", [{}, {"quotas": {"devices": 0}}, {"topic_prefix": "other"}, {"name": "other"}])
def test_a_change_that_cannot_be_made_is_refused(system: Api, app: Flask, body: dict[str, Any]) -> None:
    added(system)
    before = state_of(portal_of(app))
    problem_of(system.patch("/tenants/acme", body), 422, "invalid_input")
    assert state_of(portal_of(app)) == before


# --- Suspend and resume ---------------------------------------------------------------------------------------------


def test_a_suspended_tenant_is_served_again_once_it_is_resumed(system: Api) -> None:
    admin = holding(system, added(system))
    device = admin.register()
    suspended = system.post("/tenants/acme/suspend")
    assert (suspended.json["status"], suspended.json["broker"]) == ("suspended", "enforced")
    assert suspended.json["changed_at"]
    problem_of(admin.get("/devices"), 403, "tenant_suspended")
    assert system.post("/tenants/acme/suspend").json == suspended.json
    assert system.register()["status"] == "active"
    resumed = system.post("/tenants/acme/resume")
    assert (resumed.json["status"], resumed.json["broker"]) == ("active", "enforced")
    assert admin.get(f"/devices/{device['device_id']}").json["status"] == "active"


def test_a_suspension_that_the_broker_does_not_confirm_is_pending(system: Api, app: Flask) -> None:
    admin = holding(system, added(system))
    app.extensions["guard"].stopped = True
    answer = system.post("/tenants/acme/suspend").json
    assert (answer["status"], answer["broker"]) == ("suspended", "pending")
    assert answer["broker_problem"]
    problem_of(admin.get("/devices"), 403, "tenant_suspended")


def test_the_tenant_that_runs_the_installation_cannot_be_suspended(system: Api, app: Flask) -> None:
    before = state_of(portal_of(app))
    problem_of(system.post("/tenants/default/suspend"), 409, "state_conflict")
    assert system.post("/tenants/default/resume").json["status"] == "active"
    assert state_of(portal_of(app))["tenants"] == before["tenants"]


def test_each_change_is_in_the_records_of_the_tenant_and_of_who_made_it(system: Api, app: Flask) -> None:
    made = added(system)
    system.patch("/tenants/acme", {"quotas": {"devices": 5}})
    system.post("/tenants/acme/suspend")
    system.post("/tenants/acme/resume")
    admin = holding(system, made)
    for api in (system, admin):
        entries = api.get("/audit?object=tenant:acme").json["entries"]
        assert [entry["action"] for entry in entries] == [
            "tenant:resume", "tenant:suspend", "tenant:update", "tenant:create",
        ]  # fmt: skip
        assert all("a test's system" in entry["actor"] for entry in entries)
        assert made["token"] not in json.dumps(entries)


# --- Who may ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.ADMIN, Role.OPERATOR, Role.AUDITOR])
@pytest.mark.parametrize("tenant", ["default", "acme"])
def test_only_the_role_system_rules_over_tenants(system: Api, app: Flask, role: Role, tenant: str) -> None:
    added(system)
    api = api_as(app, role, tenant)
    before = state_of(portal_of(app))
    for method, path, body in (
        ("GET", "/tenants", None), ("POST", "/tenants", {"name": "other"}), ("GET", "/tenants/acme", None),
        ("PATCH", "/tenants/acme", {"quotas": {"devices": 5}}), ("POST", "/tenants/acme/suspend", {}),
        ("POST", "/tenants/acme/resume", {}), ("DELETE", "/tenants/acme?confirm=acme", None),
        ("GET", "/tenants/acme/export", None),
    ):  # fmt: skip
        problem_of(api.call(method, path, body), 403, "forbidden")
    assert state_of(portal_of(app)) == before
