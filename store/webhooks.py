"""Webhooks and the events that are sent to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import NotFound
from core.states import EventDeliveryStatus
from core.tenants import TenantStatus
from store.advances import SUBSCRIBED
from store.database import UtcDateTime, columns_of
from store.scope import ALL_TENANTS, scope_of
from store.tables import Tenant, Webhook, WebhookDelivery


@dataclass(frozen=True, slots=True)
class WebhookRecord:
    """A subscription; ``events`` are the subscribed types, empty for all."""

    id: str
    tenant_id: str
    name: str
    url: str
    events: tuple[str, ...]
    sealed_secret: bytes
    created_at: datetime


@dataclass(frozen=True, slots=True)
class EventDeliveryRecord:
    """An event for one webhook, with the state of its delivery."""

    id: int
    event_id: str
    type: str
    device_id: str | None
    created_at: datetime
    status: EventDeliveryStatus
    attempts: int
    next_at: datetime
    last_problem: str | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class ClaimedEvent:
    """An event that this process may send until ``lease_until``; ``attempts`` counts this attempt, too."""

    id: int
    tenant_id: str
    event_id: str
    body: str
    attempts: int
    lease_until: datetime


@dataclass(frozen=True, slots=True)
class Backlog:
    """How many events of a webhook wait, since when the oldest does, and how many are dead."""

    waiting: int
    oldest: datetime | None
    dead: int


# As text: SQLite uses a partial index only if the statement contains the index's condition word for word.
WAITING = sa.text("webhook_deliveries.status = 'waiting'")
DEAD = sa.text("webhook_deliveries.status = 'dead'")
_WEBHOOK_COLUMNS = columns_of(WebhookRecord, Webhook)
_DELIVERY_COLUMNS = columns_of(EventDeliveryRecord, WebhookDelivery)
_IS_DUE = (
    WebhookDelivery.next_at <= sa.bindparam("now", type_=UtcDateTime()),
    sa.or_(
        WebhookDelivery.lease_until.is_(None),
        WebhookDelivery.lease_until <= sa.bindparam("now", type_=UtcDateTime()),
    ),
)
_DUE = (
    sa.select(WebhookDelivery.id)
    .where(WebhookDelivery.webhook_id == sa.bindparam("of_webhook"), WAITING, *_IS_DUE)
    .order_by(WebhookDelivery.next_at)
    .limit(sa.bindparam("limit"))
)

# --- Subscriptions ---------------------------------------------------------------------------------------------------


def _webhook_record(row: Sequence[Any]) -> WebhookRecord:
    record = WebhookRecord(*row)
    names = tuple(name for name in row[4].split(",") if name not in ("", "*"))
    return dataclasses.replace(record, events=names)


def add_webhook(tx: Connection, record: WebhookRecord) -> None:
    """Record a webhook."""
    names = f",{','.join(record.events)}," if record.events else "*"
    tx.execute(sa.insert(Webhook), dataclasses.asdict(record) | {"events": names})


def get_webhook(tx: Connection, tenant_id: str, webhook_id: str) -> WebhookRecord:
    """Read a webhook; raises ``NotFound``."""
    query = sa.select(*_WEBHOOK_COLUMNS).where(Webhook.tenant_id == tenant_id, Webhook.id == webhook_id)
    row = tx.execute(query).one_or_none()
    if row is None:
        raise NotFound("There is no webhook with this id; list them with GET /webhooks.")
    return _webhook_record(row)


def list_webhooks(tx: Connection, tenant_id: str | None = None) -> Sequence[WebhookRecord]:
    """Return the webhooks of a tenant, or of all tenants, oldest first."""
    query = sa.select(*_WEBHOOK_COLUMNS).order_by(Webhook.created_at, Webhook.id)
    if tenant_id is not None:
        query = query.where(Webhook.tenant_id == tenant_id)
    return [_webhook_record(row) for row in tx.execute(query)]


def due_webhooks(tx: Connection, *, now: datetime) -> Sequence[WebhookRecord]:
    """Return the webhooks for which an event is due, oldest first, of the tenants that are served: of others it waits.

    Those of all tenants are found by one query.
    """
    active = sa.select(Tenant.id).where(Tenant.status == TenantStatus.ACTIVE)
    any_due = (
        sa.select(WebhookDelivery.id)
        .where(WebhookDelivery.webhook_id == Webhook.id, WAITING, *_IS_DUE)
        .correlate(Webhook)
        .exists()
    )
    query = sa.select(*_WEBHOOK_COLUMNS).where(Webhook.tenant_id.in_(active), any_due)
    return [_webhook_record(row) for row in tx.execute(query.order_by(Webhook.created_at, Webhook.id), {"now": now})]


def remove_webhook(tx: Connection, tenant_id: str, webhook_id: str) -> None:
    """Delete a webhook with all its deliveries."""
    own = (WebhookDelivery.tenant_id == tenant_id, WebhookDelivery.webhook_id == webhook_id)
    tx.execute(sa.delete(WebhookDelivery).where(*own))
    tx.execute(sa.delete(Webhook).where(Webhook.tenant_id == tenant_id, Webhook.id == webhook_id))


def backlog(tx: Connection, tenant_id: str) -> dict[str, Backlog]:
    """Return the backlog by webhook id, without webhooks that have none."""
    of_tenant = WebhookDelivery.tenant_id == tenant_id
    by_webhook = WebhookDelivery.webhook_id
    waiting = tx.execute(
        sa.select(by_webhook, sa.func.count(), sa.func.min(WebhookDelivery.created_at, type_=UtcDateTime()))
        .where(of_tenant, WAITING)
        .group_by(by_webhook)
    )
    found = {webhook_id: Backlog(count, oldest, 0) for webhook_id, count, oldest in waiting}
    dead = tx.execute(sa.select(by_webhook, sa.func.count()).where(of_tenant, DEAD).group_by(by_webhook))
    for webhook_id, count in dead:
        waiting_too = found.get(webhook_id, Backlog(0, None, 0))
        found[webhook_id] = Backlog(waiting_too.waiting, waiting_too.oldest, count)
    return found


# --- Events ----------------------------------------------------------------------------------------------------------

_EVENT_COLUMNS = (
    "tenant_id", "webhook_id", "event_id", "type", "device_id", "body", "created_at", "status", "attempts", "next_at",
)  # fmt: skip
_SUBSCRIBED = sa.select(
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
_ADD_EVENT = sa.insert(WebhookDelivery).from_select(_EVENT_COLUMNS, _SUBSCRIBED)
_RECORDED_ALREADY = (
    sa.select(WebhookDelivery.id)
    .where(WebhookDelivery.webhook_id == Webhook.id, WebhookDelivery.event_id == sa.bindparam("event_id"))
    .correlate(Webhook)
)
_ADD_EVENT_ONCE = sa.insert(WebhookDelivery).from_select(_EVENT_COLUMNS, _SUBSCRIBED.where(~_RECORDED_ALREADY.exists()))


# Whether there are subscriptions, in a statement that is sent anyway: see ``note_subscriptions``.
ANY = sa.exists(sa.select(Webhook.id))


def note_subscriptions(tx: Connection, *, are_there: bool) -> None:
    """Remember in a transaction what a statement has found by ``ANY``, in the scope of the transaction."""
    tx.info[SUBSCRIBED] = scope_of(tx), are_there


def may_be_subscribed(tx: Connection, tenant_id: str) -> bool:
    """Return whether a tenant may have subscriptions, ``ALL_TENANTS`` for any; ``False`` only if none was seen."""
    scope, are_there = tx.info.get(SUBSCRIBED, (None, True))
    return are_there or scope not in (ALL_TENANTS, tenant_id)


def add_event(tx: Connection, tenant_id: str, *, once: bool, type: str, **values: Any) -> None:  # noqa: A002 - as in JSON
    """Queue an event for every webhook that subscribed to its type; with ``once`` unless it has the event already.

    ``values`` are its ``event_id``, ``device_id``, ``body`` and time ``at``.
    """
    parameters = {"of_tenant": tenant_id, "pattern": f"%,{type},%", "type": type, **values}
    tx.execute(_ADD_EVENT_ONCE if once else _ADD_EVENT, parameters)


# --- Deliveries ------------------------------------------------------------------------------------------------------


def list_deliveries(
    tx: Connection, tenant_id: str, webhook_id: str, *, limit: int, before: int | None, status: str | None
) -> Sequence[EventDeliveryRecord]:
    """Return the deliveries of a webhook, newest first, older than ``before``."""
    query = sa.select(*_DELIVERY_COLUMNS).where(
        WebhookDelivery.tenant_id == tenant_id, WebhookDelivery.webhook_id == webhook_id
    )
    if before is not None:
        query = query.where(WebhookDelivery.id < before)
    if status is not None:
        query = query.where(WebhookDelivery.status == status)
    rows: Sequence[Any] = tx.execute(query.order_by(WebhookDelivery.id.desc()).limit(limit)).all()
    return [EventDeliveryRecord(*row) for row in rows]


def due(tx: Connection, webhook_id: str, *, now: datetime, limit: int) -> Sequence[int]:
    """Return the ids of the deliveries that are due, the longest due first."""
    return tx.execute(_DUE, {"of_webhook": webhook_id, "now": now, "limit": limit}).scalars().all()


def claim(
    tx: Connection, webhook_id: str, *, now: datetime, limit: int, lease_until: datetime
) -> Sequence[ClaimedEvent]:
    """Claim due deliveries for this process to send; nobody else gets them until the lease ends."""
    parameters = {"of_webhook": webhook_id, "now": now, "limit": limit}
    ids = (
        tx.execute(_DUE.with_for_update(skip_locked=True), parameters).scalars().all()
    )  # no effect on SQLite, where one writer excludes all others
    taken = tx.execute(
        sa.update(WebhookDelivery)
        .where(WebhookDelivery.id.in_(ids))
        .values(lease_until=lease_until, attempts=WebhookDelivery.attempts + 1)
        .returning(*columns_of(ClaimedEvent, WebhookDelivery))
    )
    return sorted((ClaimedEvent(*row) for row in taken), key=lambda claimed: claimed.id)


def mark_delivered(tx: Connection, taken: ClaimedEvent, *, now: datetime) -> None:
    """Record that the receiver accepted an event."""
    tx.execute(
        sa.update(WebhookDelivery)
        .where(WebhookDelivery.tenant_id == taken.tenant_id, WebhookDelivery.id == taken.id, WAITING)
        .values(status=EventDeliveryStatus.DELIVERED, ended_at=now, lease_until=None, last_problem=None)
    )


def postpone(tx: Connection, taken: ClaimedEvent, *, until: datetime | None, problem: str, now: datetime) -> None:
    """Record a failed attempt: try again at ``until``, or with ``None`` never. A later claim is not touched."""
    values: dict[str, Any] = {"lease_until": None, "last_problem": problem}
    values |= {"status": EventDeliveryStatus.DEAD, "ended_at": now} if until is None else {"next_at": until}
    tx.execute(
        sa.update(WebhookDelivery)
        .where(
            WebhookDelivery.tenant_id == taken.tenant_id,
            WebhookDelivery.id == taken.id,
            WAITING,
            WebhookDelivery.lease_until == taken.lease_until,
        )
        .values(values)
    )


def redeliver(tx: Connection, tenant_id: str, webhook_id: str, ids: Sequence[int] | None, *, now: datetime) -> int:
    """Queue deliveries again, those of ``ids`` that have ended or with ``None`` all dead ones; return how many."""
    chosen = [WebhookDelivery.tenant_id == tenant_id, WebhookDelivery.webhook_id == webhook_id]
    if ids is None:
        query = sa.update(WebhookDelivery).where(*chosen, DEAD)
    else:
        ended = WebhookDelivery.ended_at.is_not(None)
        query = sa.update(WebhookDelivery).where(*chosen, WebhookDelivery.id.in_(ids), ended)
    return tx.execute(query.values(status=EventDeliveryStatus.WAITING, ended_at=None, attempts=0, next_at=now)).rowcount


def anything_to_prune(tx: Connection, *, before: datetime) -> bool:
    """Return whether any delivery ended before a time."""
    return bool(tx.execute(sa.select(sa.exists().where(WebhookDelivery.ended_at < before))).scalar_one())


def prune(tx: Connection, *, before: datetime, limit: int = 1000) -> int:
    """Delete at most ``limit`` deliveries that ended before a time; return how many."""
    old = sa.select(WebhookDelivery.id).where(WebhookDelivery.ended_at < before).limit(limit)
    return tx.execute(sa.delete(WebhookDelivery).where(WebhookDelivery.id.in_(old))).rowcount
