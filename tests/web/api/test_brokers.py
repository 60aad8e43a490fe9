"""Brokers over REST: how each stands, declared away and back, for the role system alone."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask

from app import portal_of
from core.roles import Role
from core.states import BrokerKind
from operations.wiring import Portal
from store import brokers
from tests.support.brokers import enforce_all
from tests.support.harness import Api, Clock, api_as, problem_of


@pytest.fixture
def system(app: Flask) -> Api:
    return api_as(app, Role.SYSTEM)


@pytest.fixture
def two(app: Flask) -> Portal:
    """The first broker, which has everything, and edge-1, which has proven nothing."""
    portal = portal_of(app)
    with portal.database.transaction() as tx:
        enforce_all(tx)
        brokers.add_broker(tx, "edge-1", BrokerKind.AGENT, at=portal.clock(), joined=True)
    return portal


def states(api: Api) -> dict[str, Any]:
    return {one["name"]: one["state"] for one in api.get("/brokers").json["brokers"]}


def test_each_is_listed_with_what_it_was_seen_to_enforce(system: Api, two: Portal) -> None:
    main, edge = system.get("/brokers").json["brokers"]
    assert (main["name"], main["state"], main["told_by"]) == ("main", "enforced", "node")
    assert main["enforced_generation"] == main["generation"] > 0
    assert (edge["state"], edge["told_by"], edge["enforced_generation"]) == ("pending", "agent", 0)
    assert system.get("/brokers/edge-1").json == edge


def test_one_is_declared_away_and_back(system: Api, two: Portal) -> None:
    for _ in range(2):
        assert system.post("/brokers/edge-1/away", {"reason": "closed"}).json["state"] == "away"
    for _ in range(2):
        assert system.post("/brokers/edge-1/back", None).json["state"] == "pending"


def test_the_last_one_that_counts_cannot_be_away(system: Api) -> None:
    answer = system.post("/brokers/main/away", {"reason": "closed"})
    assert "only broker that counts" in problem_of(answer, 409, "state_conflict")["detail"]


def test_an_address_is_for_people_to_read(system: Api, two: Portal) -> None:
    assert system.patch("/brokers/edge-1", {"address": "edge-1:8883"}).json["address"] == "edge-1:8883"
    assert system.patch("/brokers/edge-1", {"address": None}).json["address"] is None


def test_one_is_removed_by_its_name_twice(system: Api, two: Portal) -> None:
    assert system.call("DELETE", "/brokers/edge-1?confirm=edge-2").status_code == 422
    assert system.call("DELETE", "/brokers/edge-1?confirm=edge-1").json["name"] == "edge-1"
    assert states(system) == {"main": "enforced"}
    assert system.get("/brokers/edge-1").status_code == 404


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.SYSTEM])
def test_others_see_and_change_none(app: Flask, two: Portal, role: Role) -> None:
    api = api_as(app, role)
    for method, path, body in [
        ("GET", "/brokers", None), ("GET", "/brokers/main", None), ("POST", "/brokers/edge-1/away", {"reason": "x"}),
        ("POST", "/brokers/edge-1/back", None), ("PATCH", "/brokers/edge-1", {}),
        ("DELETE", "/brokers/edge-1?confirm=edge-1", None),
    ]:  # fmt: skip
        assert api.call(method, path, json=body).status_code == 403, path


@pytest.mark.parametrize("role", [Role.SYSTEM, None])
def test_readyz_has_a_check_for_each_of_several_for_who_may_know_and_none_makes_the_portal_unready(
    app: Flask, two: Portal, monkeypatch: pytest.MonkeyPatch, role: Role | None
) -> None:
    monkeypatch.setattr(type(two.reconciler), "broker_answers", lambda _: True)
    answer = api_as(app, role).get("/readyz")
    found = {check["name"]: check for check in answer.json["checks"] if check["name"].startswith("broker ")}
    assert answer.status_code == 200
    if role is None:
        assert set(found) == {"broker files"}
    else:
        assert found["broker main"]["ok"]
        assert "edge-1 was seen to enforce nothing yet" in found["broker edge-1"]["problem"]


def test_metrics_have_a_value_for_each(system: Api, two: Portal) -> None:
    text = system.get("/metrics").text
    assert 'portal_broker_counts{broker="edge-1"} 1.0' in text
    assert 'portal_broker_generation_enforced{broker="edge-1"} 0.0' in text
    assert "portal_generation_enforced 0.0" in text


def test_an_agent_that_is_silent_or_has_not_joined_is_said_in_readyz_and_makes_nothing_unready(
    system: Api, two: Portal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(two.reconciler), "broker_answers", lambda _: True)
    with two.database.transaction() as tx:
        brokers.add_broker(tx, "edge-2", BrokerKind.AGENT, at=two.clock(), joined=False)
        enforce_all(tx)
        brokers.set_problem(tx, brokers.get_broker(tx, "edge-1").id, None, at=two.clock())
    clock.advance(seconds=61)
    answer = system.get("/readyz")
    found = {check["name"]: check for check in answer.json["checks"]}
    assert answer.status_code == 200
    assert found["broker main"]["ok"]
    assert found["broker edge-1"]["code"] == "broker_silent"
    assert found["broker edge-2"]["code"] == "broker_invited"
    assert "has not reported since" in system.get("/brokers/edge-1").json["problem"]
    assert states(system)["edge-1"] == "enforced"
