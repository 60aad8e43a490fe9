"""Groups: named sets of devices, usable wherever a filter is, and what they set for their members."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from store.generations import narrowed_since
from tests.support.harness import Api, Clock, csr_pem, problem_of
from workflows import groups, memberships

NOBODY = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
OTHER = [{"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/other", "access": "write"}]
NEWS = [{"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/news", "access": "read"}]
DEFAULT = [{"filter": "devices/{id}/#", "access": "readwrite"}]


def added(api: Api, name: str, *members: str, **fields: Any) -> dict[str, Any]:
    answer = api.post("/groups", {"name": name, **fields})
    assert answer.status_code == 201, answer.text
    if members:
        answer = api.post(f"/groups/{name}/members", {"add": list(members)})
        assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json
    return found


def listed(api: Api, query: str) -> list[str]:
    found, cursor = list[str](), ""
    while True:
        page = api.get(f"/devices?limit=2&{query}{cursor}").json
        found += [one["device_id"] for one in page["devices"]]
        if page["next_cursor"] is None:
            return found
        cursor = f"&cursor={page['next_cursor']}"


def topics(api: Api, device_id: str) -> tuple[list[dict[str, str]], str | None]:
    shown = api.get(f"/devices/{device_id}").json
    return shown["topics"], shown["topics_group"]


def last_entry(api: Api) -> dict[str, Any]:
    entry: dict[str, Any] = api.get("/audit?limit=1").json["entries"][0]
    return entry


def days_of(shown: dict[str, Any]) -> int:
    ends, begins = (datetime.fromisoformat(shown["certificate"][name]) for name in ("not_after", "issued_at"))
    return round((ends - begins) / timedelta(days=1))


# --- The groups ---------------------------------------------------------------------------------------------------


def test_a_group_is_added_listed_changed_and_removed(api: Api) -> None:
    answer = api.post("/groups", {"name": "pilots", "description": "First to get new firmware"})
    assert (answer.status_code, answer.headers["Location"]) == (201, "/groups/pilots")
    assert (last_entry(api)["action"], last_entry(api)["object"]) == ("group:add", "group:pilots")
    added(api, "hall-1", filter={"location": "hall 1"})
    assert [one["name"] for one in api.get("/groups").json["groups"]] == ["hall-1", "pilots"]
    changed = api.patch("/groups/pilots", {"description": "", "validity_days": 9}).json
    assert (changed["description"], changed["validity_days"], changed["broker"]) == ("", 9, None)
    assert last_entry(api)["detail"] == {"description": "", "validity_days": 9}
    assert api.get("/groups/pilots").json.items() <= changed.items()
    assert api.delete("/groups/pilots").status_code == 200
    problem_of(api.get("/groups/pilots"), 404, "not_found")


def test_a_name_is_taken_once_and_must_be_one(api: Api) -> None:
    added(api, "pilots")
    problem_of(api.post("/groups", {"name": "pilots"}), 409, "group_in_use")
    problem_of(api.post("/groups", {"name": "Hall 2"}), 422, "invalid_input")
    for answer in (api.patch("/groups/none", {"description": "x"}), api.delete("/groups/none")):
        problem_of(answer, 404, "not_found")
    problem_of(api.get("/devices?group=none"), 404, "not_found")
    problem_of(api.post("/devices/actions", {"action": "revoke", "filter": {"group": "none"}}), 404, "not_found")


def test_a_tenant_has_a_limited_number_of_groups_and_members(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MAX_GROUPS", 1)
    monkeypatch.setattr(memberships, "MAX_MEMBERS", 1)
    first, second = (api.register()["device_id"] for _ in range(2))
    added(api, "pilots", first)
    problem_of(api.post("/groups", {"name": "others"}), 409, "quota_reached")
    problem_of(api.post("/groups/pilots/members", {"add": [second]}), 409, "quota_reached")
    assert api.post("/groups/pilots/members", {"add": [second], "remove": [first]}).json["members"] == 1


# --- Who is in them -----------------------------------------------------------------------------------------------


def test_members_are_added_and_removed_and_a_repeat_changes_nothing(api: Api) -> None:
    ids = [api.register()["device_id"] for _ in range(3)]
    added(api, "pilots")
    answer = api.post("/groups/pilots/members", {"add": ids}).json
    assert (answer["added"], answer["members"], answer["broker"]) == (3, 3, None)
    assert last_entry(api)["detail"] == {"added": sorted(ids)}
    entries = api.get("/audit").json["entries"]
    again = api.post("/groups/pilots/members", {"add": ids, "remove": []}).json
    assert (again["added"], again["removed"], again["members"]) == (0, 0, 3)
    assert api.get("/audit").json["entries"] == entries
    assert api.post("/groups/pilots/members", {"remove": ids[:2]}).json["removed"] == 2
    assert listed(api, "group=pilots") == ids[2:]
    assert api.get(f"/devices/{ids[2]}").json["groups"] == ["pilots"]
    assert api.get("/devices").json["devices"][0]["groups"] == ["pilots"]


def test_one_that_is_not_there_changes_nothing(api: Api) -> None:
    device_id = api.register()["device_id"]
    added(api, "pilots")
    answer = api.post("/groups/pilots/members", {"add": [device_id, NOBODY]})
    assert NOBODY in problem_of(answer, 404, "device_not_found")["detail"]
    assert api.get("/groups/pilots").json["members"] == 0


@pytest.mark.parametrize("sort", ["", "sort=created", "sort=name", "sort=-name", "sort=expires", "sort=last_seen"])
def test_the_devices_of_a_group_are_listed_in_every_order(api: Api, sort: str) -> None:
    ids = [api.register(name=f"pump-{number}")["device_id"] for number in range(7)]
    added(api, "odd", *ids[1::2])
    found = listed(api, f"group=odd&{sort}")
    assert sorted(found) == sorted(ids[1::2])
    if sort in ("", "sort=-name"):
        assert found == ids[1::2][::-1]


def test_a_group_goes_with_other_conditions(api: Api) -> None:
    ids = [api.register(type=kind)["device_id"] for kind in ("pump", "valve", "pump")]
    added(api, "pilots", *ids[:2])
    assert listed(api, "group=pilots&type=pump") == [ids[0]]
    assert listed(api, "group=pilots&q=pump&sort=name&type=valve") == [ids[1]]


def test_a_saved_filter_finds_what_fits_now(api: Api) -> None:
    added(api, "hall-7", filter={"location": "hall 7", "type": "pump"})
    ids = [api.register(location="hall 7")["device_id"] for _ in range(3)]
    api.register(location="hall 8")
    assert sorted(listed(api, "group=hall-7")) == sorted(ids)
    api.patch(f"/devices/{ids[0]}", {"location": "hall 8"})
    assert sorted(listed(api, "group=hall-7&status=active")) == sorted(ids[1:])
    assert sorted(listed(api, "group=hall-7&type=pump")) == sorted(ids[1:])
    answer = api.get("/devices?group=hall-7&type=valve")
    assert problem_of(answer, 422, "invalid_input")["errors"][0]["field"] == "type"


def test_a_saved_expiry_counts_from_when_it_is_asked_for_and_keeps_order_and_pages(api: Api, clock: Clock) -> None:
    added(api, "soon", filter={"expires_within_days": 30})
    assert api.get("/groups/soon").json["filter"]["expires_within_days"] == 30
    ids = [api.register(validity_days=days)["device_id"] for days in (20, 25, 40, 10)]
    assert listed(api, "group=soon") == [ids[3], ids[1], ids[0]]  # newest first
    assert listed(api, "group=soon&sort=expires") == [ids[3], ids[0], ids[1]]
    first = api.get("/devices?group=soon&limit=2").json
    clock.advance(minutes=1)
    rest = api.get(f"/devices?group=soon&limit=2&cursor={first['next_cursor']}").json
    assert [one["device_id"] for one in [*first["devices"], *rest["devices"]]] == [ids[3], ids[1], ids[0]]
    sooner = (clock() + timedelta(days=15)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert listed(api, f"group=soon&expires_before={sooner}") == [ids[3]]
    clock.advance(days=15)
    assert listed(api, "group=soon") == [ids[3], ids[2], ids[1], ids[0]]
    for days in (0, 36501, "30", 1.5, None):
        assert api.post("/groups", {"name": "x", "filter": {"expires_within_days": days}}).status_code == 422, days


def test_a_saved_connection_is_refused_where_it_is_not_known_who_is_connected(api: Api) -> None:
    added(api, "offline", filter={"connected": "false"})
    problem_of(api.get("/devices?group=offline"), 409, "guard_needed")
    action = {"action": "suspend", "filter": {"group": "offline"}}
    problem_of(api.post("/devices/actions", action), 409, "guard_needed")


def test_a_filter_has_no_members_and_sets_nothing(api: Api) -> None:
    device_id = api.register()["device_id"]
    added(api, "hall-1", filter={"location": "hall 1"})
    problem_of(api.post("/groups/hall-1/members", {"add": [device_id]}), 409, "state_conflict")
    problem_of(api.patch("/groups/hall-1", {"validity_days": 9}), 409, "state_conflict")
    problem_of(api.patch("/groups/hall-1", {"filter": {"type": "a"}, "topics": NEWS}), 422, "invalid_input")
    problem_of(api.post("/groups", {"name": "x", "filter": {"type": "a"}, "topics": NEWS}), 422, "invalid_input")
    added(api, "pilots", device_id)
    problem_of(api.patch("/groups/pilots", {"filter": {"type": "pump"}}), 409, "state_conflict")


def test_an_action_is_done_to_a_group(api: Api, generations: list[int]) -> None:
    ids = [api.register()["device_id"] for _ in range(3)]
    added(api, "stolen", *ids[:2])
    lines = api.post("/devices/actions", {"action": "suspend", "filter": {"group": "stolen"}}).text.splitlines()
    assert {json.loads(line)["device_id"] for line in lines} == set(ids[:2])
    assert api.get(f"/devices/{ids[2]}").json["status"] == "active"


# --- Topics -------------------------------------------------------------------------------------------------------


def test_members_without_topics_of_their_own_have_those_of_the_group(api: Api, generations: list[int]) -> None:
    first, second = (api.register()["device_id"] for _ in range(2))
    own = api.register(topics=OTHER)["device_id"]
    assert added(api, "readers", first, own, topics=NEWS)["broker"] == "enforced"
    assert topics(api, first) == (NEWS, "readers")
    assert topics(api, own) == (OTHER, None)
    assert topics(api, second) == (DEFAULT, None)
    assert api.get("/devices?limit=3").json["devices"][2]["topics"] == NEWS
    api.post("/groups/readers/members", {"remove": [first, own]})
    assert (topics(api, first), topics(api, own)) == ((DEFAULT, None), (OTHER, None))


def test_a_change_of_topics_reaches_all_members_at_one_generation(api: Api, generations: list[int]) -> None:
    ids = [api.register()["device_id"] for _ in range(5)]
    added(api, "writers", *ids, topics=NEWS)
    generations.clear()
    changed = api.patch("/groups/writers", {"topics": OTHER}).json
    assert (changed["broker"], len(generations)) == ("enforced", 1)
    assert all(topics(api, device_id) == (OTHER, "writers") for device_id in ids)
    assert api.patch("/groups/writers", {"topics": OTHER}).json["broker"] is None  # nothing to learn
    api.patch("/groups/writers", {"topics": None})
    assert all(topics(api, device_id) == (DEFAULT, None) for device_id in ids)
    assert len(generations) == 2


def test_members_that_can_read_less_are_narrowed_and_others_are_not(
    app: Flask, api: Api, generations: list[int]
) -> None:
    device_id = api.register()["device_id"]
    added(api, "changing", device_id)
    portal = portal_of(app)

    def narrowed() -> list[str]:
        with portal.database.snapshot() as tx:
            return narrowed_since(tx, generations[-1] - 1)

    for topics_, narrows in ((NEWS, False), (OTHER, True), (NEWS, False), (None, True)):
        api.patch("/groups/changing", {"topics": topics_})
        assert (narrowed() == [device_id]) is narrows, topics_


def test_a_device_that_gives_up_its_own_topics_has_those_of_its_group(api: Api, generations: list[int]) -> None:
    device_id = api.register(topics=OTHER)["device_id"]
    added(api, "readers", device_id, topics=NEWS)
    api.patch(f"/devices/{device_id}", {"topics": None})
    assert topics(api, device_id) == (NEWS, "readers")
    api.patch(f"/devices/{device_id}", {"topics": OTHER})
    assert topics(api, device_id) == (OTHER, None)
    api.patch("/groups/readers", {"topics": None})
    assert topics(api, device_id) == (OTHER, None)


def test_a_revoked_member_keeps_what_it_had(api: Api, generations: list[int]) -> None:
    device_id = api.register()["device_id"]
    added(api, "readers", device_id, topics=NEWS)
    api.post(f"/revoke/{device_id}")
    assert api.patch("/groups/readers", {"topics": OTHER}).status_code == 200
    assert topics(api, device_id) == (NEWS, "readers")
    problem_of(api.delete("/groups/readers"), 409, "group_in_use")


def test_topics_that_no_device_may_have_are_refused(api: Api) -> None:
    bad = [{"filter": "other/#", "access": "read"}]
    problem_of(api.post("/groups", {"name": "bad", "topics": bad}), 422, "topic_refused")
    added(api, "good")
    problem_of(api.patch("/groups/good", {"topics": bad}), 422, "topic_refused")
    assert api.get("/groups/good").json["topics"] is None


@pytest.mark.parametrize(("setting", "value"), [("topics", NEWS), ("validity_days", 9)])
def test_no_device_is_in_two_groups_that_set_the_same(
    api: Api, generations: list[int], setting: str, value: object
) -> None:
    device_id = api.register()["device_id"]
    added(api, "first", device_id, **{setting: value})
    added(api, "second", **{setting: value})
    added(api, "third", device_id)
    for answer in (
        api.post("/groups/second/members", {"add": [device_id]}),
        api.patch("/groups/third", {setting: value}),
    ):
        detail = problem_of(answer, 409, "groups_disagree")["detail"]
        assert device_id in detail
        assert "first" in detail
    assert api.get(f"/devices/{device_id}").json["groups"] == ["first", "third"]


def test_a_group_that_sets_something_is_removed_once_nobody_is_in_it(api: Api, generations: list[int]) -> None:
    device_id = api.register()["device_id"]
    added(api, "readers", device_id, topics=NEWS)
    assert "topics for 1 device" in problem_of(api.delete("/groups/readers"), 409, "group_in_use")["detail"]
    api.post("/groups/readers/members", {"remove": [device_id]})
    assert api.delete("/groups/readers").status_code == 200
    added(api, "plain", device_id)
    assert api.delete("/groups/plain").status_code == 200
    assert api.get(f"/devices/{device_id}").json["groups"] == []


# --- The life of certificates -------------------------------------------------------------------------------------


def test_a_certificate_of_a_member_lives_as_long_as_its_group_says(api: Api, generations: list[int]) -> None:
    device_id = api.register()["device_id"]
    added(api, "short", device_id, validity_days=9)
    api.post(f"/devices/{device_id}/renew", {"csr": csr_pem()})
    assert days_of(api.get(f"/devices/{device_id}").json) == 9
    api.post(f"/devices/{device_id}/renew", {"csr": csr_pem(), "validity_days": 20})
    assert days_of(api.get(f"/devices/{device_id}").json) == 20


def test_a_certificate_profile_limits_the_life_that_a_group_sets(api: Api, generations: list[int]) -> None:
    api.post("/profiles", {"name": "brief", "max_days": 5, "default_days": 2})
    device_id = api.register(profile="brief")["device_id"]
    added(api, "short", device_id, validity_days=9)
    api.post(f"/devices/{device_id}/renew", {"csr": csr_pem()})
    assert days_of(api.get(f"/devices/{device_id}").json) == 5
