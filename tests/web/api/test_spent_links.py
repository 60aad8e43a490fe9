"""A link that was spent: the client that spent it may repeat for a while, everybody else is refused and noticed."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from app import portal_of
from operations import jobs
from store.tables import KeptBundle
from tests.support.harness import Api, Clock, api_as, problem_of
from tests.web.api.test_downloads import path_of, state_of_delivery
from tests.workflows.test_events import recorded, subscribe

KEY = {"Idempotency-Key": "of-the-first-client-only"}
OTHER = {"Idempotency-Key": "of-another-client-at-all"}
FORMATS = ("zip", "p12", "pem")


@pytest.fixture
def anyone(app: Flask) -> Api:
    return api_as(app, None)


def kept(app: Flask) -> int:
    """The number of bundles that are kept for a repeat."""
    with portal_of(app).database.snapshot() as tx:
        return tx.execute(sa.select(sa.func.count()).select_from(KeptBundle)).scalar_one()


def newest_entries(app: Flask, count: int) -> list[Any]:
    """The newest entries of the audit record, oldest first."""
    return list(reversed(portal_of(app).operators.audit("default", limit=count, before=None, filters={})[0]))


@pytest.mark.parametrize("bundle_format", FORMATS)
def test_a_thief_who_reads_the_whole_bundle_and_resets_the_connection_closes_the_link(
    api: Api, anyone: Api, app: Flask, bundle_format: str
) -> None:
    path = path_of(api.register(bundle_format=bundle_format))
    stolen = anyone.get(path)
    assert len(stolen.data) == int(stolen.headers["Content-Length"])
    stolen.close()
    for headers in ({}, KEY, OTHER):
        problem_of(anyone.get(path, headers=headers), 410, "link_used")
    assert (state_of_delivery(app), kept(app)) == (("delivered", False), 0)


@pytest.mark.parametrize("bundle_format", FORMATS)
def test_the_client_that_gave_an_idempotency_key_first_may_repeat_and_no_other(
    api: Api, anyone: Api, app: Flask, bundle_format: str
) -> None:
    path = path_of(api.register(bundle_format=bundle_format))
    first = anyone.get(path, headers=KEY)
    assert state_of_delivery(app) == ("delivered", False)
    for headers in ({}, OTHER):
        problem_of(anyone.get(path, headers=headers), 410, "link_used")
        assert anyone.call("HEAD", path, headers=headers).status_code == 410
    looked = anyone.call("HEAD", path, headers=KEY)
    assert (looked.status_code, looked.headers["Content-Length"]) == (200, str(len(first.data)))
    again = anyone.get(path, headers=KEY)
    assert (again.status_code, again.data) == (200, first.data)
    assert again.content_type == first.content_type
    assert again.headers["Content-Disposition"] == first.headers["Content-Disposition"]


def test_a_thief_who_comes_first_with_a_key_locks_the_rightful_client_out_who_learns_of_it(
    api: Api, anyone: Api, clock: Clock
) -> None:
    path = path_of(api.register())
    at = clock()
    assert anyone.get(path, headers=OTHER).status_code == 200
    detail = problem_of(anyone.get(path, headers=KEY), 410, "link_used")["detail"]
    assert f"used at {at:%Y-%m-%d %H:%M}" in detail
    assert "portal renew" in detail


def test_a_repeat_is_over_when_the_grace_is_and_repeating_does_not_lengthen_it(
    api: Api, anyone: Api, app: Flask, clock: Clock
) -> None:
    path = path_of(api.register())
    for _ in range(3):
        assert anyone.get(path, headers=KEY).status_code == 200
        clock.advance(seconds=99)
    clock.advance(seconds=4)
    problem_of(anyone.get(path, headers=KEY), 410, "link_used")
    jobs.expire(portal_of(app))
    assert kept(app) == 0


def test_the_job_leaves_a_bundle_that_may_be_repeated(api: Api, anyone: Api, app: Flask) -> None:
    path = path_of(api.register())
    anyone.get(path, headers=KEY)
    jobs.expire(portal_of(app))
    assert kept(app) == 1


def test_a_copy_of_the_database_opens_no_kept_bundle(api: Api, anyone: Api, app: Flask) -> None:
    bundle = anyone.get(path_of(api.register()), headers=KEY).data
    with portal_of(app).database.snapshot() as tx:
        row = tx.execute(sa.select(KeptBundle)).one()
    assert bundle[:64] not in row.sealed_bundle
    assert KEY["Idempotency-Key"].encode() not in row.sealed_bundle
    assert KEY["Idempotency-Key"] not in row.key_hash


def test_the_same_key_on_two_links_leaves_no_common_trace(api: Api, anyone: Api, app: Flask) -> None:
    for _ in range(2):
        anyone.get(path_of(api.register()), headers=KEY)
    with portal_of(app).database.snapshot() as tx:
        assert len(set(tx.execute(sa.select(KeptBundle.key_hash)).scalars())) == 2


def test_revoking_the_device_destroys_the_kept_bundle(api: Api, anyone: Api, app: Flask) -> None:
    registered = api.register()
    anyone.get(path_of(registered), headers=KEY)
    api.post(f"/revoke/{registered['device_id']}")
    assert kept(app) == 0
    problem_of(anyone.get(path_of(registered), headers=KEY), 410, "link_used")


def test_superseding_the_certificate_destroys_the_kept_bundle(api: Api, anyone: Api, app: Flask) -> None:
    registered = api.register()
    anyone.get(path_of(registered), headers=KEY)
    assert api.post(f"/devices/{registered['device_id']}/renew", {"overlap_hours": 0}).status_code == 201
    assert kept(app) == 0


def test_a_suspended_device_gets_its_bundle_again_only_once_it_is_resumed(api: Api, anyone: Api) -> None:
    registered = api.register()
    path, device = path_of(registered), f"/devices/{registered['device_id']}"
    anyone.get(path, headers=KEY)
    api.post(f"{device}/suspend")
    problem_of(anyone.get(path, headers=KEY), 409, "state_conflict")
    api.post(f"{device}/resume")
    assert anyone.get(path, headers=KEY).status_code == 200


def test_head_with_a_key_spends_nothing_and_keeps_no_key(api: Api, anyone: Api, app: Flask) -> None:
    path = path_of(api.register())
    assert anyone.call("HEAD", path, headers=OTHER).status_code == 200
    assert (state_of_delivery(app), kept(app)) == (("ready", True), 0)
    assert anyone.get(path, headers=KEY).status_code == 200


def test_a_short_key_is_refused_and_spends_nothing(api: Api, anyone: Api, app: Flask) -> None:
    path = path_of(api.register())
    problem_of(anyone.get(path, headers={"Idempotency-Key": "short"}), 422, "invalid_input")
    assert state_of_delivery(app) == ("ready", True)


def test_the_record_has_every_fetch_with_the_address_that_it_came_from(api: Api, anyone: Api, app: Flask) -> None:
    registered = api.register()
    path = path_of(registered)
    for address, headers in (("192.0.2.1", KEY), ("192.0.2.2", KEY), ("192.0.2.3", OTHER)):
        anyone.get(path, headers=headers, environ_base={"REMOTE_ADDR": address})
    found = newest_entries(app, 4)
    assert {entry.object for entry in found} == {f"device:{registered['device_id']}"}
    assert len({entry.detail["delivery"] for entry in found}) == 1
    assert [(entry.action, entry.outcome, entry.address) for entry in found] == [
        ("bundle:fetch", "done", "192.0.2.1"),
        ("bundle:deliver", "done", "192.0.2.1"),
        ("bundle:repeat", "done", "192.0.2.2"),
        ("bundle:fetch", "refused", "192.0.2.3"),
    ]


def test_an_event_tells_of_each_address_that_fetches_a_spent_link(api: Api, anyone: Api, app: Flask) -> None:
    subscribe(portal_of(app))
    registered = api.register()
    path = path_of(registered)
    anyone.get(path, headers=KEY)
    anyone.call("HEAD", path)
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.1"):
        anyone.get(path, headers=OTHER, environ_base={"REMOTE_ADDR": address})
    anyone.get(path, headers=KEY)
    found = recorded(portal_of(app))
    assert [event["type"] for event in found] == ["registered", "delivered", "link_reused", "link_reused", "delivered"]
    assert {event["device_id"] for event in found} == {registered["device_id"]}
    assert [event["data"].get("address") for event in found[2:4]] == ["192.0.2.1", "192.0.2.2"]
    assert found[2]["data"]["used_at"] == found[1]["at"]
    assert [found[1]["data"], found[4]["data"]] == [{}, {"repeated": True}]
