"""Groups that a device is put into when it is made: registered, expected, or in a row of an upload."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from core.roles import Role
from store import groups
from tests.support.brokers import obeys
from tests.support.harness import Api, api_as, csr_pem, problem_of
from tests.support.pki import PEM, Authority
from workflows import memberships

NEWS = [{"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/news", "access": "read"}]
OTHER = [{"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/other", "access": "write"}]
DEFAULT = [{"filter": "devices/{id}/#", "access": "readwrite"}]
PUMP = {"name": "pump-9", "type": "pump", "location": "hall 1", "firmware": "1.0"}
WAYS = ("/register", "/devices", "ndjson", "csv")


@pytest.fixture(autouse=True)
def obeying(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker obeys at once."""
    obeys(portal_of(app), monkeypatch)


def uploaded(api: Api, text: str, kind: str = "application/x-ndjson", query: str = "") -> dict[str, Any]:
    answer = api.call("POST", f"/register/bulk{query}", data=text, content_type=kind)
    found: dict[str, Any] = json.loads(answer.text)
    return found


def made(api: Api, way: str, *names: str, **fields: Any) -> dict[str, Any]:
    """The answer about a new device that is to be in groups."""
    if way == "csv":
        cells = {**PUMP, "groups": " ".join(names), **fields}
        return uploaded(api, f"{','.join(cells)}\n{','.join(map(str, cells.values()))}\n", "text/csv")
    wanted = {**PUMP, "groups": list(names), **fields}
    if way == "ndjson":
        return uploaded(api, json.dumps(wanted))
    answer: dict[str, Any] = api.post(way, wanted).json
    return answer


def shown(api: Api, device_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = api.get(f"/devices/{device_id}").json
    return answer


def days_of(device: dict[str, Any]) -> int:
    ends, begins = (datetime.fromisoformat(device["certificate"][name]) for name in ("not_after", "issued_at"))
    return round((ends - begins) / timedelta(days=1))


def refused(api: Api, way: str, *names: str) -> dict[str, Any]:
    """The refusal of a device, of which nothing is left."""
    before = api.get("/audit").json["entries"]
    problem = made(api, way, *names)
    assert "device_id" not in problem
    assert api.get("/devices").json["devices"] == []
    assert api.get("/audit").json["entries"] == before
    return problem


@pytest.mark.parametrize("way", WAYS)
def test_a_new_device_has_at_once_what_its_groups_set(api: Api, way: str) -> None:
    api.post("/groups", {"name": "readers", "topics": NEWS})
    api.post("/groups", {"name": "short", "validity_days": 9})
    device_id = made(api, way, "short", "readers", "short")["device_id"]
    device = shown(api, device_id)
    assert (device["groups"], device["topics"], device["topics_group"]) == (["readers", "short"], NEWS, "readers")
    assert way == "/devices" or days_of(device) == 9
    assert [one["members"] for one in api.get("/groups").json["groups"]] == [1, 1]
    entries = api.get("/audit?limit=2").json["entries"]
    assert {(one["action"], one["object"]) for one in entries} == {
        ("group:members", "group:readers"),
        ("group:members", "group:short"),
    }
    assert entries[0]["detail"] == {"added": [device_id]}
    api.patch("/groups/readers", {"topics": OTHER})
    assert shown(api, device_id)["topics"] == OTHER


def test_what_the_request_says_comes_before_what_a_group_sets(api: Api) -> None:
    api.post("/groups", {"name": "readers", "topics": NEWS, "validity_days": 9})
    device = shown(api, made(api, "/register", "readers", topics=OTHER, validity_days=20)["device_id"])
    assert (device["topics"], device["topics_group"], days_of(device)) == (OTHER, None, 20)
    api.post("/profiles", {"name": "brief", "max_days": 5, "default_days": 2})
    assert days_of(shown(api, made(api, "ndjson", "readers", profile="brief")["device_id"])) == 5


def test_a_device_with_a_csr_that_is_put_into_a_group_is_granted_its_topics(api: Api) -> None:
    api.post("/groups", {"name": "readers", "topics": NEWS})
    answer = made(api, "/register", "readers", csr=csr_pem())
    assert "certificate" in answer
    assert shown(api, answer["device_id"])["topics_group"] == "readers"


def test_an_unknown_group_is_refused_with_what_to_do(api: Api) -> None:
    api.post("/groups", {"name": "pilots"})
    for way in WAYS:
        problem = refused(api, way, "pilots", "none")
        assert (problem["code"], problem["errors"][0]["field"]) == ("invalid_input", "groups")
        assert "There is no group none; list them" in problem["detail"]
    assert api.get("/groups/pilots").json["members"] == 0


def test_a_group_of_another_tenant_is_unknown(app: Flask, api: Api) -> None:
    api_as(app, Role.ADMIN, "another").post("/groups", {"name": "pilots"})
    for way in WAYS:
        assert refused(api, way, "pilots")["errors"][0]["field"] == "groups"


def test_a_group_with_a_filter_takes_no_new_device(api: Api) -> None:
    api.post("/groups", {"name": "hall-1", "filter": {"location": "hall 1"}})
    for way in WAYS:
        problem = refused(api, way, "hall-1")
        assert (problem["code"], problem["errors"][0]["field"]) == ("invalid_input", "groups")


@pytest.mark.parametrize(("setting", "value"), [("topics", NEWS), ("validity_days", 9)])
def test_groups_that_set_the_same_are_refused_together(api: Api, setting: str, value: object) -> None:
    for name in ("first", "second"):
        api.post("/groups", {"name": name, setting: value})
    for way in WAYS:
        problem = refused(api, way, "first", "second")
        assert problem["code"] == "groups_disagree"
        assert "first and second" in problem["detail"]


def test_a_group_with_an_appraisal_policy_takes_an_admin(app: Flask, api: Api) -> None:
    api.post("/groups", {"name": "proven"})
    policy = {"mode": "record", "anchors": [Authority("A maker").certificate.public_bytes(PEM).decode()]}
    answer = api.patch("/groups/proven", {"attestation": policy})
    assert answer.status_code == 200, answer.text
    operator = api_as(app, Role.OPERATOR)
    for way in WAYS:
        assert made(operator, way, "proven")["code"] == "forbidden"
        assert shown(api, made(api, way, "proven")["device_id"])["groups"] == ["proven"]


def test_a_full_group_takes_no_more(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.post("/groups", {"name": "pilots"})
    monkeypatch.setattr(memberships, "MAX_MEMBERS", 0)
    for way in WAYS:
        assert refused(api, way, "pilots")["code"] == "quota_reached"


def test_of_a_group_that_is_removed_meanwhile_nothing_is_half_made(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.post("/groups", {"name": "readers", "topics": NEWS})
    read = groups.groups_named

    def removed(*arguments: Any, for_update: bool = False) -> Any:
        return {} if for_update else read(*arguments)

    monkeypatch.setattr(groups, "groups_named", removed)
    for way in WAYS:
        assert refused(api, way, "readers")["code"] == "state_conflict"


def test_rows_that_cannot_be_in_their_group_do_not_keep_others_out(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.post("/groups", {"name": "pilots"})
    monkeypatch.setattr(memberships, "MAX_MEMBERS", 1)
    rows = [json.dumps({**PUMP, "groups": names}) for names in (["pilots"], ["pilots"], ["none"], [])]
    answer = api.call("POST", "/register/bulk", data="\n".join(rows), content_type="application/x-ndjson")
    answers = [json.loads(line) for line in answer.text.splitlines()]
    assert [one.get("code") for one in answers] == [None, "quota_reached", "invalid_input", None]
    assert api.get("/groups/pilots").json["members"] == 1


def test_a_dry_run_says_which_groups_are_unknown(api: Api) -> None:
    wanted = json.dumps({**PUMP, "groups": ["none"]})
    assert uploaded(api, wanted, query="?dry_run=true")["errors"][0]["field"] == "groups"


def test_a_row_that_is_sent_again_is_the_same_device_while_it_is_in_its_groups(api: Api) -> None:
    for name, more in (("readers", {"topics": NEWS}), ("short", {"validity_days": 9})):
        api.post("/groups", {"name": name, **more})
    first = made(api, "ndjson", "readers", external_id="a")["device_id"]
    api.post("/groups/short/members", {"add": [first]})
    again = made(api, "ndjson", "readers", external_id="a")
    assert (again.get("device_id"), again.get("repeated")) == (first, True)
    device = shown(api, first)
    assert (device["topics_group"], device["groups"], days_of(device)) == ("readers", ["readers", "short"], 9)
    other = made(api, "ndjson", "none", external_id="a")
    assert (other["code"], "which differs in groups; change" in other["detail"]) == ("external_id_taken", True)
    moved = uploaded(
        api, json.dumps({**PUMP, "external_id": "a", "groups": ["none"], "location": "x", "firmware": "x"})
    )
    assert "which differs in location, firmware and groups; change" in moved["detail"]


def test_a_repeat_by_its_key_is_one_device_in_the_group(api: Api) -> None:
    api.post("/groups", {"name": "pilots"})
    for names in (["pilots"], ["pilots", "pilots"]):
        answer = api.post("/register", {**PUMP, "groups": names}, headers={"Idempotency-Key": "the-one-key-of-this"})
        assert answer.status_code == 201
    assert api.get("/groups/pilots").json["members"] == 1
    answer = api.post("/register", PUMP, headers={"Idempotency-Key": "the-one-key-of-this"})
    problem_of(answer, 409, "idempotency_conflict")


def test_a_device_without_groups_costs_no_statement_about_them(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("groups_named", "groups_of_device", "groups_of_devices", "get_group", "add_members"):
        monkeypatch.delattr(groups, name)
    for way in ("/register", "ndjson", "/devices"):
        assert "device_id" in made(api, way)
