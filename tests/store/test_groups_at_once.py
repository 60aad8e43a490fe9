"""Changes of groups that are made at once, on PostgreSQL, where transactions overlap: no device's groups disagree."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from core.roles import Role
from store import groups
from tests.support.brokers import obeys
from tests.support.harness import ON_POSTGRESQL, Api, api_as
from workflows import groups as use_cases

pytestmark = ON_POSTGRESQL
PUMP = {"name": "pump-9", "type": "pump", "location": "hall 1", "firmware": "1.0"}
NEWS = [{"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/news", "access": "read"}]
Changes = Callable[[str], Sequence[tuple[str, str, dict[str, Any]]]]


def both_join(device_id: str) -> Sequence[tuple[str, str, dict[str, Any]]]:
    """A device is added to two groups that set topics."""
    return [("POST", f"/groups/{name}/members", {"add": [device_id]}) for name in ("first", "second")]


def one_joins_and_one_sets(device_id: str) -> Sequence[tuple[str, str, dict[str, Any]]]:
    """A device is added to a group that sets topics, while one that it is in is to set some, too."""
    return [("POST", "/groups/first/members", {"add": [device_id]}), ("PATCH", "/groups/third", {"topics": NEWS})]


def both_set(_device_id: str) -> Sequence[tuple[str, str, dict[str, Any]]]:
    """Two groups that a device is in are to set topics."""
    return [("PATCH", f"/groups/{name}", {"topics": NEWS}) for name in ("third", "fourth")]


@pytest.mark.parametrize("changes", [both_join, one_joins_and_one_sets, both_set])
def test_of_two_changes_by_which_a_devices_groups_would_disagree_one_wins(
    app: Flask, api: Api, monkeypatch: pytest.MonkeyPatch, changes: Changes
) -> None:
    _obey(app, monkeypatch)
    device_id = api.register()["device_id"]
    for name, topics in (("first", NEWS), ("second", NEWS), ("third", None), ("fourth", None)):
        api.post("/groups", {"name": name, "topics": topics})
        if topics is None:
            api.post(f"/groups/{name}/members", {"add": [device_id]})
    _meet(monkeypatch, use_cases, "_check_others")
    answers = _at_once(app, changes(device_id))
    assert sorted(str(one.json.get("code")) for one in answers) == ["None", "groups_disagree"]
    assert len(_setting_topics(api, device_id)) == 1


def test_a_group_that_sets_topics_while_a_device_is_made_in_it_and_another_leaves_none_disagreeing(
    app: Flask, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    _obey(app, monkeypatch)
    for name, topics in (("first", NEWS), ("third", None)):
        api.post("/groups", {"name": name, "topics": topics})
    _meet(monkeypatch, groups, "update_group")
    wanted = {**PUMP, "groups": ["first", "third"]}
    answers = _at_once(app, [("POST", "/register", wanted), ("PATCH", "/groups/third", {"topics": NEWS})])
    assert sorted(one.status_code < 400 for one in answers) == [False, True]
    for device in api.get("/devices").json["devices"]:
        assert len(_setting_topics(api, device["device_id"])) == 1


def _obey(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    obeys(portal_of(app), monkeypatch)


def _meet(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    """Have two calls of a function wait for each other, unless one waits for the other's transaction."""
    both, function = threading.Barrier(2), getattr(module, name)

    def together(*arguments: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        return function(*arguments)

    monkeypatch.setattr(module, name, together)


def _at_once(app: Flask, changes: Sequence[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    operators = [api_as(app, Role.ADMIN) for _ in changes]
    with ThreadPoolExecutor(len(changes)) as pool:
        return list(pool.map(lambda one: one[0].call(*one[1]), zip(operators, changes, strict=True)))


def _setting_topics(api: Api, device_id: str) -> list[str]:
    """The groups of a device that set topics for it."""
    own = api.get(f"/devices/{device_id}").json["groups"]
    return [one["name"] for one in api.get("/groups").json["groups"] if one["topics"] and one["name"] in own]
