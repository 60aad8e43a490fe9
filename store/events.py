"""The database's part in recording events: a row for each subscriber that wants one."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import EventDeliveryStatus
from store.tables import UtcDateTime
from store.tables_events import Webhook, WebhookDelivery

_COLUMNS = (
    "tenant_id", "webhook_id", "event_id", "type", "device_id", "body", "created_at", "status", "attempts", "next_at",
)  # fmt: skip
_WANTED = sa.select(
    Webhook.tenant_id,
    Webhook.id,
    sa.bindparam("event_id", type_=sa.String()),
    sa.bindparam("type", type_=sa.String()),
    sa.bindparam("device_id", type_=sa.String()),
    sa.bindparam("body", type_=sa.Text()),
    sa.bindparam("at", type_=UtcDateTime()),
    sa.literal(EventDeliveryStatus.WAITING, WebhookDelivery.status.type),
    sa.literal(0),
    sa.bindparam("at", type_=UtcDateTime()),
).where(
    Webhook.tenant_id == sa.bindparam("of_tenant"),
    sa.or_(Webhook.events == "*", Webhook.events.like(sa.bindparam("pattern"))),
)
_ADD = sa.insert(WebhookDelivery).from_select(_COLUMNS, _WANTED)
_RECORDED = (
    sa.select(WebhookDelivery.id)
    .where(WebhookDelivery.webhook_id == Webhook.id, WebhookDelivery.event_id == sa.bindparam("event_id"))
    .correlate(Webhook)
)
_ADD_ONCE = sa.insert(WebhookDelivery).from_select(_COLUMNS, _WANTED.where(~_RECORDED.exists()))


def add_event(
    tx: Connection,
    tenant_id: str,
    *,
    event_id: str,
    type: str,  # noqa: A002 - the field's name in the interface
    device_id: str | None,
    body: str,
    at: datetime,
    once: bool,
) -> None:
    """Put an event on its way to every subscriber that wants its type; ``once``: unless one has that event already."""
    tx.execute(
        _ADD_ONCE if once else _ADD,
        {
            "of_tenant": tenant_id,
            "pattern": f"%,{type},%",
            "event_id": event_id,
            "type": type,
            "device_id": device_id,
            "body": body,
            "at": at,
        },
    )
