"""Many devices are revoked, suspended or resumed by one request, which the broker learns by one reconciliation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core import failpoints
from tests.support.harness import Api, csr_pem, problem_of
from workflows import changes

NOBODY = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"


def act(api: Api, **body: Any) -> list[dict[str, Any]]:
    answer = api.post("/devices/actions", body)
    assert (answer.status_code, answer.content_type) == (200, "application/x-ndjson"), answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


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
    monkeypatch.setattr(changes, "AT_ONCE", 2)
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
    monkeypatch.setattr("web.api.lifecycle.MOST_AT_ONCE", 1)
    ids = [api.register()["device_id"] for _ in range(2)]
    answer = api.post("/devices/actions", {"action": "revoke", "filter": {"status": "active"}})
    assert problem_of(answer, 422, "invalid_input")["errors"][0]["field"] == "filter"
    assert {api.get(f"/devices/{device_id}").json["status"] for device_id in ids} == {"active"}


def test_one_that_ended_in_the_middle_is_finished_by_its_repeat(
    api: Api, generations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "AT_ONCE", 2)
    ids = [api.register()["device_id"] for _ in range(5)]
    plan = failpoints.Plan("actions.after_commit:2=error")
    monkeypatch.setattr(changes, "failpoint", lambda step: plan(failpoints.EVENT, (step,)))
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


# --- Renew ----------------------------------------------------------------------------------------------------------


def test_devices_are_renewed_each_with_a_link_and_a_password(api: Api) -> None:
    ids = [api.register(name=f"pump-{number}")["device_id"] for number in range(3)]
    revoked = api.register()["device_id"]
    api.post(f"/revoke/{revoked}")
    lines = act(api, action="renew", ids=[*ids, revoked, NOBODY], renewal={"validity_days": 9})
    assert [line.get("code") for line in lines] == [None, None, None, "state_conflict", "device_not_found"]
    assert [line["name"] for line in lines[:3]] == ["pump-0", "pump-1", "pump-2"]
    assert len({line["download_url"] for line in lines[:3]} | {line["bundle_password"] for line in lines[:3]}) == 6
    for line in lines[:3]:
        shown = api.get(f"/devices/{line['device_id']}").json["certificate"]
        assert shown["serial_number"] == line["serial_number"]
        assert api.get("/download/" + line["download_url"].rpartition("/")[2]).status_code == 200


def test_a_renewal_that_is_repeated_with_its_key_answers_the_same_whichever_devices_come_with_it(api: Api) -> None:
    ids = [api.register()["device_id"] for _ in range(3)]

    def renewed(*which: str) -> dict[str, dict[str, Any]]:
        body = {"action": "renew", "ids": list(which)}
        answer = api.post("/devices/actions", body, headers={"Idempotency-Key": "a-key-of-sixteen-letters"})
        return {line["device_id"]: line for line in map(json.loads, answer.text.splitlines())}

    first = renewed(*ids[:2])
    assert renewed(*ids[1:]) == {ids[1]: first[ids[1]], ids[2]: renewed(ids[2])[ids[2]]}


def test_older_certificates_end_at_once_in_one_pass_if_that_is_asked_for(api: Api, generations: list[int]) -> None:
    ids = [api.register(csr=csr_pem())["device_id"] for _ in range(3)]
    generations.clear()
    lines = act(api, action="renew", ids=ids, renewal={"overlap_hours": 0})
    assert ({line["broker"] for line in lines}, len(generations)) == ({"enforced"}, 1)


# --- Update ---------------------------------------------------------------------------------------------------------

NEWS = [{"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/news", "access": "read"}]


def test_devices_are_changed_together_and_metadata_is_merged(api: Api, generations: list[int]) -> None:
    ids = [api.register(metadata={"site": "north", "old": number})["device_id"] for number in range(3)]
    revoked = api.register()["device_id"]
    api.post(f"/revoke/{revoked}")
    generations.clear()
    changes = {"location": "hall 9", "metadata_changes": {"owner": "ops", "old": None}}
    lines = act(api, action="update", ids=[*ids, revoked], changes=changes)
    assert [line.get("code") for line in lines] == [None, None, None, "state_conflict"]
    assert generations == []  # nothing that the broker has to know
    for device_id in ids:
        shown = api.get(f"/devices/{device_id}").json
        assert (shown["location"], shown["metadata"]) == ("hall 9", {"site": "north", "owner": "ops"})
    entries = api.get("/audit?action=device:update").json["entries"]
    assert [entry["detail"]["changed"] for entry in entries] == [["location", "metadata_changes"]] * 3


def test_topics_of_many_reach_the_broker_in_one_pass(api: Api, generations: list[int]) -> None:
    ids = [api.register()["device_id"] for _ in range(3)]
    generations.clear()
    lines = act(api, action="update", ids=ids, changes={"topics": NEWS})
    assert ({line["broker"] for line in lines}, len(generations)) == ({"enforced"}, 1)
    assert all(api.get(f"/devices/{device_id}").json["topics"] == NEWS for device_id in ids)
    bad = {"action": "update", "ids": ids, "changes": {"topics": [{"filter": "x/#", "access": "read"}]}}
    problem_of(api.post("/devices/actions", bad), 422, "topic_refused")


def test_devices_that_a_filter_finds_are_put_into_a_group(api: Api, generations: list[int]) -> None:
    ids = {api.register(location="hall 7")["device_id"] for _ in range(3)}
    for name in ("pilots", "readers"):
        api.post("/groups", {"name": name} | ({"topics": NEWS} if name == "readers" else {}))
    act(api, action="update", filter={"location": "hall 7"}, changes={"add_to_group": "pilots"})
    assert {one["device_id"] for one in api.get("/devices?group=pilots").json["devices"]} == ids
    changes = {"add_to_group": "readers", "remove_from_group": "pilots", "firmware": "2"}
    lines = act(api, action="update", filter={"group": "pilots"}, changes=changes)
    assert {line["broker"] for line in lines} == {"enforced"}
    assert {one["firmware"] for one in api.get("/devices?group=readers").json["devices"]} == {"2"}
    assert api.get("/groups/pilots").json["members"] == 0
    missing = {"action": "update", "ids": [NOBODY], "changes": {"add_to_group": "pilots"}}
    problem_of(api.post("/devices/actions", missing), 404, "device_not_found")
    missing = {"action": "update", "ids": list(ids), "changes": {"add_to_group": "nobody"}}
    problem_of(api.post("/devices/actions", missing), 404, "not_found")


@pytest.mark.parametrize(
    "more",
    [
        {"action": "update"},
        {"action": "update", "changes": {}},
        {"action": "update", "changes": {"name": "all the same"}},
        {"action": "revoke", "changes": {"location": "x"}},
        {"action": "revoke", "renewal": {}},
        {"action": "renew", "renewal": {"csr": "x"}},
    ],
    ids=["no-changes", "empty", "a-name", "changes-of-revoke", "renewal-of-revoke", "one-csr-for-all"],
)
def test_what_does_not_go_with_an_action_is_refused(api: Api, more: dict[str, Any]) -> None:
    problem_of(api.post("/devices/actions", {"ids": [NOBODY], **more}), 422, "invalid_input")
