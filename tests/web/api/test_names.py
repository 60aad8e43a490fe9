"""Devices are found over HTTP by what people call them."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import pytest

from tests.support.harness import Api, problem_of


def found(api: Api, **query: Any) -> list[str]:
    answer = api.get("/devices?" + urlencode(query))
    assert answer.status_code == 200, answer.text
    return [device["name"] for device in answer.json["devices"]]


def test_a_device_is_found_by_name_external_id_and_the_beginning_of_its_id(api: Api) -> None:
    first = api.register(name="pump", external_id="line-4/1")["device_id"]
    api.register(name="line-4/1")
    assert found(api, name="pump") == ["pump"]
    assert found(api, external_id="line-4/1") == ["pump"]
    assert sorted(found(api, named="line-4/1")) == ["line-4/1", "pump"]
    assert found(api, named=first) == found(api, named=first.upper()) == ["pump"]
    assert "pump" in found(api, named=first[:13])
    assert len(found(api, named=first[:4], limit=1)) == 1
    assert found(api, named="nothing") == []
    assert found(api, named=first, type="valve") == found(api, named=first, q="no such text") == []
    assert found(api, named=first, q="pump") == ["pump"]


def test_metadata_is_searched_and_matched(api: Api) -> None:
    api.register(name="a", metadata={"owner": "ops", "rack": 7, "site": {"hall": "north"}})
    api.register(name="b", metadata={"owner": "Größe"})
    assert found(api, q="OPS") == found(api, metadata="owner=ops") == found(api, metadata="rack=7") == ["a"]
    assert found(api, q="north") == ["a"]
    assert found(api, q="Größe") == found(api, metadata="owner=Größe") == ["b"]
    assert found(api, metadata="owner=") == found(api, metadata="absent=ops") == []
    for bad in ("owner", "=ops", 'a"b=c', "a\\b=c", "a\0=b"):
        problem_of(api.get("/devices?" + urlencode({"metadata": bad})), 422, "invalid_input")


@pytest.mark.parametrize(
    ("sort", "names"),
    [("created", ["b", "c", "a"]), ("name", ["a", "b", "c"]), ("-name", ["c", "b", "a"]), ("expires", ["b", "c", "a"])],
)
def test_devices_are_sorted_from_page_to_page(api: Api, sort: str, names: list[str]) -> None:
    for name in ("b", "c", "a"):
        api.register(name=name)
    seen, cursor = list[str](), None
    while True:
        page = api.get("/devices?" + urlencode({"sort": sort, "limit": 1} | ({"cursor": cursor} if cursor else {})))
        seen += [device["name"] for device in page.json["devices"]]
        cursor = page.json["next_cursor"]
        if cursor is None:
            break
    assert seen == names


def test_a_cursor_holds_the_longest_name(api: Api) -> None:
    for _ in range(2):
        api.register(name="𝔓" * 128)
    first = api.get("/devices?sort=name&limit=1").json
    second = api.get("/devices?" + urlencode({"sort": "name", "limit": 1, "cursor": first["next_cursor"]})).json
    assert first["devices"][0]["device_id"] != second["devices"][0]["device_id"]
    problem_of(
        api.get("/devices?" + urlencode({"sort": "-name", "cursor": first["next_cursor"]})), 422, "invalid_input"
    )


def test_lists_show_metadata_and_topics(api: Api) -> None:
    topics = [{"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/news", "access": "read"}]
    own = api.register(metadata={"owner": "ops"}, topics=topics)["device_id"]
    plain = api.register()["device_id"]
    listed = {device["device_id"]: device for device in api.get("/devices").json["devices"]}
    for device_id in (own, plain):
        shown = api.get(f"/devices/{device_id}").json
        assert [listed[device_id][name] for name in ("metadata", "topics")] == [shown["metadata"], shown["topics"]]
    assert listed[own]["topics"] == topics


def test_changes_of_metadata_are_merged(api: Api) -> None:
    path = f"/devices/{api.register(metadata={'owner': 'ops', 'rack': 7})['device_id']}"
    changed = api.patch(path, {"metadata_changes": {"rack": None, "site": "north", "absent": None}})
    assert changed.json["metadata"] == {"owner": "ops", "site": "north"}
    problem_of(api.patch(path, {"metadata_changes": {}, "metadata": {}}), 422, "invalid_input")
    assert api.patch(path, {"metadata_changes": {"long": "x" * 8000}}).status_code == 200
    refused = problem_of(api.patch(path, {"metadata_changes": {"longer": "x" * 300}}), 422, "invalid_input")
    assert refused["errors"][0]["field"] == "metadata_changes"
    assert api.patch(path, {"metadata": {}}).json["metadata"] == {}


def test_an_external_id_can_be_set_and_is_one_device_s(api: Api) -> None:
    first, second = (f"/devices/{api.register()['device_id']}" for _ in range(2))
    assert api.patch(first, {"external_id": "SN-1", "location": "north"}).json["external_id"] == "SN-1"
    assert api.patch(first, {"external_id": "SN-1"}).status_code == 200
    problem_of(api.patch(second, {"external_id": "SN-1"}), 409, "external_id_taken")
    problem_of(api.patch(first, {"external_id": "SN-2"}), 409, "state_conflict")
    assert api.patch(second, {"external_id": "SN-2"}).status_code == 200
    detail = api.get("/audit?action=device:update").json["entries"][0]["detail"]
    assert detail == {"changed": ["external_id"], "external_id": "SN-2"}
