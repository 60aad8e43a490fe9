"""Webhooks over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask

from app import portal_of
from store import webhooks
from tests.support.harness import ON_SQLITE, Api, problem_of

pytestmark = ON_SQLITE

URL = "https://inventory.example.com/portal-events"


def create(api: Api, **fields: Any) -> Any:
    return api.post("/webhooks", {"name": "inventory", "url": URL} | fields)


def test_a_webhook_is_created_listed_and_deleted_and_its_secret_shown_once(api: Api) -> None:
    made = create(api, events=["revoked", "registered", "revoked"])
    assert made.status_code == 201, made.text
    assert made.json["secret"].startswith("whsec_")
    assert made.json["events"] == ["registered", "revoked"]
    (listed,) = api.get("/webhooks").json["webhooks"]
    assert listed == {name: value for name, value in made.json.items() if name != "secret"}
    assert made.json["secret"] not in api.get("/audit").text
    path = f"/webhooks/{listed['webhook_id']}"
    assert api.delete(path).json == listed
    problem_of(api.delete(path), 404, "not_found")
    assert api.get("/webhooks").json == {"webhooks": []}
    assert [entry["action"] for entry in api.get("/audit").json["entries"][:2]] == ["webhook:delete", "webhook:create"]


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "http://inventory.example.com/"},
        {"url": "https://10.0.0.1/"},
        {"url": "https://user:pass@example.com/"},
        {"url": 5},
        {"events": []},
        {"events": ["exploded"]},
        {"name": "a\nb"},
        {"secret": "mine"},
    ],
)
def test_an_invalid_webhook_is_refused_with_the_field(api: Api, fields: dict[str, Any]) -> None:
    problem = problem_of(create(api, **fields), 422, "invalid_input")
    assert problem["errors"][0]["field"].startswith(next(iter(fields)))


def test_deliveries_are_listed_page_by_page_and_sent_again(api: Api) -> None:
    path = f"/webhooks/{create(api).json['webhook_id']}"
    devices = [api.register()["device_id"] for _ in range(3)]
    first = api.get(f"{path}/deliveries?limit=2").json
    assert [one["device_id"] for one in first["deliveries"]] == [devices[2], devices[1]]
    second = api.get(f"{path}/deliveries?limit=2&cursor={first['next_cursor']}").json
    assert [one["device_id"] for one in second["deliveries"]] == [devices[0]]
    assert second["next_cursor"] is None
    one = second["deliveries"][0]
    assert (one["type"], one["status"], one["attempts"], one["ended_at"]) == ("registered", "waiting", 0, None)
    assert api.get(f"{path}/deliveries?status=dead").json["deliveries"] == []
    assert api.post(f"{path}/redeliver").json == {"redelivered": 0}
    assert api.post(f"{path}/redeliver", {"delivery_ids": [one["delivery_id"]]}).json == {"redelivered": 0}
    problem_of(api.post(f"{path}/redeliver", {"delivery_ids": []}), 422, "invalid_input")
    problem_of(api.get(f"{path}/deliveries?cursor=x"), 422, "invalid_input")
    problem_of(api.get("/webhooks/0000000000000000/deliveries"), 404, "not_found")
    problem_of(api.get("/webhooks/nonsense/deliveries"), 404, "not_found")
    assert "portal_events_waiting 3.0" in api.get("/metrics").text


def test_a_delivery_has_a_next_attempt_only_while_it_waits(api: Api, app: Flask) -> None:
    portal, webhook_id = portal_of(app), create(api).json["webhook_id"]
    api.register()

    def shown() -> tuple[str, bool, bool]:
        (one,) = api.get(f"/webhooks/{webhook_id}/deliveries").json["deliveries"]
        return one["status"], one["next_at"] is not None, one["ended_at"] is not None

    assert shown() == ("waiting", True, False)
    now = portal.clock()
    with portal.database.transaction() as tx:
        (taken,) = webhooks.claim(tx, webhook_id, now=now, limit=1, lease_until=now)
        webhooks.postpone(tx, taken, until=None, problem="no answer", now=now)
    assert shown() == ("dead", False, True)


def test_a_test_event_reports_the_problem_in_one_sentence(api: Api) -> None:
    webhook_id = create(api, url="https://localhost:9999/").json["webhook_id"]
    answer = api.post(f"/webhooks/{webhook_id}/test").json
    assert (answer["delivered"], answer["status"]) == (False, None)
    assert "internal" in answer["problem"]
