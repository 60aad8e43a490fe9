"""Many devices are revoked, suspended or resumed by one request, which the broker learns by one reconciliation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from core import failpoints
from tests.support.harness import Api, problem_of
from workflows import revocation
from workflows.reconciliation import Outcome

NOBODY = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"


def act(api: Api, **body: Any) -> list[dict[str, Any]]:
    answer = api.post("/devices/actions", body)
    assert (answer.status_code, answer.content_type) == (200, "application/x-ndjson"), answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture
def generations(app: Flask, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The generations that the broker was asked to reach; it obeys at once."""
    asked: list[int] = []

    def apply(generation: int) -> Outcome:
        asked.append(generation)
        return Outcome(generation, generation)

    monkeypatch.setattr(portal_of(app).reconciler, "apply", apply)
    return asked


def test_devices_are_revoked_together_and_the_broker_learns_it_once(api: Api, generations: list[int]) -> None:
    ids = [api.register(name=f"pump-{number}")["device_id"] for number in range(5)]
    generations.clear()
    lines = act(api, action="revoke", ids=ids, reason="key_compromise")
    assert [line["device_id"] for line in lines] == ids
    assert {(line["status"], line["reason"], line["broker"]) for line in lines} == {
        ("revoked", "key_compromise", "enforced")
    }
    assert len(generations) == 1
    assert all(api.get(f"/devices/{device_id}").json["status"] == "revoked" for device_id in ids)
    entries = api.get("/audit?action=device:revoke").json["entries"]
    assert {entry["object"] for entry in entries} == {f"device:{device_id}" for device_id in ids}


def test_a_repeat_answers_the_same_and_records_nothing(api: Api, generations: list[int]) -> None:
    ids = [api.register()["device_id"] for _ in range(2)]
    first = act(api, action="revoke", ids=ids)
    entries = api.get("/audit").json["entries"]
    again = [line | {"repeated": True} for line in (*first, first[0])]
    assert act(api, action="revoke", ids=[*ids, ids[0]]) == again
    assert api.get("/audit").json["entries"] == entries


def test_one_that_is_refused_keeps_no_other_from_it(api: Api, generations: list[int]) -> None:
    revoked, active = (api.register()["device_id"] for _ in range(2))
    api.post(f"/revoke/{revoked}")
    lines = act(api, action="suspend", ids=[revoked, NOBODY, active])
    assert [line.get("code") for line in lines] == ["state_conflict", "device_not_found", None]
    assert "revoked" in lines[0]["detail"]
    assert (lines[2]["status"], lines[2]["broker"]) == ("suspended", "enforced")
    [line] = act(api, action="resume", ids=[active])
    assert (line["status"], "suspended_at" in line) == ("active", False)


def test_a_filter_finds_them_also_when_there_are_several_pages(
    api: Api, generations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.devices.PAGE", 2)
    monkeypatch.setattr(revocation, "AT_ONCE", 2)
    fitting = {api.register(location="hall 7")["device_id"] for _ in range(5)}
    other = api.register(location="hall 8")["device_id"]
    lines = act(api, action="suspend", filter={"location": "hall 7"})
    assert {line["device_id"] for line in lines} == fitting
    assert {line["status"] for line in lines} == {"suspended"}
    assert api.get(f"/devices/{other}").json["status"] == "active"
    assert act(api, action="suspend", filter={"location": "hall 9"}) == []


def test_a_filter_that_fits_too_many_changes_none(
    api: Api, generations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.devices.MOST_AT_ONCE", 1)
    ids = [api.register()["device_id"] for _ in range(2)]
    answer = api.post("/devices/actions", {"action": "revoke", "filter": {"status": "active"}})
    assert problem_of(answer, 422, "invalid_input")["errors"][0]["field"] == "filter"
    assert {api.get(f"/devices/{device_id}").json["status"] for device_id in ids} == {"active"}


def test_one_that_ended_in_the_middle_is_finished_by_its_repeat(
    api: Api, generations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation, "AT_ONCE", 2)
    ids = [api.register()["device_id"] for _ in range(5)]
    plan = failpoints.Plan("actions.after_commit:2=error")
    monkeypatch.setattr(revocation, "failpoint", lambda step: plan(failpoints.EVENT, (step,)))
    assert api.post("/devices/actions", {"action": "revoke", "ids": ids}).status_code >= 500
    states = [api.get(f"/devices/{device_id}").json["status"] for device_id in ids]
    assert sorted(states) == ["active", *["revoked"] * 4]
    generations.clear()
    lines = act(api, action="revoke", ids=ids)
    assert [(line["device_id"], line["status"], line["broker"]) for line in lines] == [
        (device_id, "revoked", "enforced") for device_id in ids
    ]
    assert len(generations) == 1
    entries = api.get("/audit?action=device:revoke").json["entries"]
    assert sorted(entry["object"] for entry in entries) == sorted(f"device:{device_id}" for device_id in ids)


def test_a_broker_that_does_not_obey_leaves_them_pending(api: Api) -> None:
    ids = [api.register()["device_id"] for _ in range(2)]
    lines = act(api, action="revoke", ids=ids)  # no broker runs
    assert {(line["status"], line["broker"]) for line in lines} == {("revoked", "pending")}
    assert all(line["broker_problem"] for line in lines)


@pytest.mark.parametrize(
    "which",
    [
        {},
        {"ids": []},
        {"ids": ["pump-1"]},
        {"filter": {}},
        {"filter": {"location": None}},
        {"ids": [NOBODY], "filter": {"status": "active"}},
        {"ids": [NOBODY], "everything": True},
    ],
    ids=["neither", "no-id", "a-name", "empty-filter", "null-filter", "both", "unknown-field"],
)
def test_what_names_no_devices_is_refused(api: Api, which: dict[str, Any]) -> None:
    problem_of(api.post("/devices/actions", {"action": "revoke", **which}), 422, "invalid_input")
