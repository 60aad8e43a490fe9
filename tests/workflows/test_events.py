"""Events are recorded with the change that they speak of, for those who subscribed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

import db
from operations.wiring import SUBSCRIBED, Portal
from store.tables import Webhook, WebhookDelivery
from tests.workflows.test_registration import OPERATOR, PUMP, token_of
from workflows import events
from workflows.events import EventType

NOW = datetime(2027, 1, 1, tzinfo=UTC)
DEVICE = "00000000-0000-4000-8000-000000000000"


def subscribe(portal: Portal, types: str = "*", webhook_id: str = "1" * 16) -> None:
    (portal.settings.data_dir / SUBSCRIBED).touch()
    row = {"id": webhook_id, "tenant_id": "default", "name": "a test", "url": "https://example.com", "events": types}
    with portal.database.transaction() as tx:
        tx.execute(sa.insert(Webhook), row | {"sealed_secret": b"", "created_at": NOW})


def recorded(portal: Portal) -> list[dict[str, Any]]:
    """The bodies of all events that wait to be sent, oldest first."""
    with portal.database.snapshot() as tx:
        bodies = tx.execute(sa.select(WebhookDelivery.body).order_by(WebhookDelivery.id)).scalars()
        return [json.loads(body) for body in bodies]


def test_a_devices_life_is_recorded_as_events(portal: Portal) -> None:
    subscribe(portal)
    device = portal.registrations.register(OPERATOR, PUMP)
    portal.deliveries.deliver(OPERATOR, token_of(device))
    portal.revocations.revoke(OPERATOR, device.device_id, "key_compromise")
    portal.revocations.revoke(OPERATOR, device.device_id, "key_compromise")
    found = recorded(portal)
    assert [event["type"] for event in found] == ["registered", "delivered", "revoked", "broker_pending"]
    assert {event["device_id"] for event in found} == {device.device_id}
    assert len({event["id"] for event in found}) == 4
    assert found[0]["data"]["serial_number"] == device.serial_number
    assert found[2]["data"] == {"reason": "key_compromise"}
    assert "broker" in found[3]["data"]["problem"]


def test_a_subscriber_gets_the_types_it_asked_for(portal: Portal) -> None:
    subscribe(portal, ",revoked,renewed,", "1" * 16)
    subscribe(portal, ",registered,", "2" * 16)
    portal.revocations.revoke(OPERATOR, portal.registrations.register(OPERATOR, PUMP).device_id, "unspecified")
    with portal.database.snapshot() as tx:
        rows = tx.execute(sa.select(WebhookDelivery.webhook_id, WebhookDelivery.type).order_by(WebhookDelivery.id))
        assert [tuple(row) for row in rows] == [("2" * 16, "registered"), ("1" * 16, "revoked")]


def test_where_the_change_is_undone_there_is_no_event(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    subscribe(portal)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the transaction of a test")

    with monkeypatch.context() as patch:
        patch.setattr("store.audit.record_all", fail)
        with pytest.raises(RuntimeError):
            portal.registrations.register(OPERATOR, PUMP)
    assert recorded(portal) == []


def test_with_no_subscription_nothing_is_asked_of_the_database(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        db.next_generation(tx, at=NOW)  # by which nodes learn in one statement whether somebody has subscribed
        statements: list[str] = []
        sa.event.listen(tx, "before_execute", lambda *_: statements.append("one"))
        events.record(tx, "default", EventType.REGISTERED, DEVICE, at=NOW)
        assert statements == []


def test_one_event_however_often_it_is_recorded_as_the_same(portal: Portal) -> None:
    subscribe(portal)
    with portal.database.transaction() as tx:
        for once in ("a", "a", "b"):
            events.record(tx, "default", EventType.EXPIRING, DEVICE, at=NOW, once=once)
    first, second = recorded(portal)
    assert first["id"] != second["id"]


def test_an_event_is_one_json_object_with_times_in_utc(portal: Portal) -> None:
    subscribe(portal)
    with portal.database.transaction() as tx:
        events.record(tx, "default", "renewed", DEVICE, at=NOW, expires_at=NOW, serial_number="1f")
    (event,) = recorded(portal)
    assert event.pop("id")
    assert event == {
        "type": "renewed",
        "at": "2027-01-01T00:00:00.000000Z",
        "device_id": DEVICE,
        "data": {"expires_at": "2027-01-01T00:00:00.000000Z", "serial_number": "1f"},
    }


@pytest.mark.parametrize(("type_", "facts"), [("exploded", {}), ("renewed", {"fact": b"bytes"})])
def test_what_is_no_event_is_refused(portal: Portal, type_: str, facts: dict[str, Any]) -> None:
    subscribe(portal)
    with pytest.raises((ValueError, TypeError)), portal.database.transaction() as tx:
        events.record(tx, "default", type_, DEVICE, at=NOW, **facts)
