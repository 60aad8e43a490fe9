"""Events about devices, applications and the broker, recorded for webhooks in the transaction of the change."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection, Engine

from core.states import ClientKind
from store import webhooks
from store.scope import ALL_TENANTS

_MARKER = "portal_subscribed"  # the execution option of an engine that holds the marker's path


class EventType(StrEnum):
    """The types of events; the text is what subscribers see."""

    REGISTERED = "registered"
    ENROLLED = "enrolled"
    RENEWED = "renewed"
    EXPIRING = "expiring"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    REVOKED = "revoked"
    DELIVERED = "delivered"
    LINK_REUSED = "link_reused"
    BROKER_PENDING = "broker_pending"
    BROKER_ENFORCED = "broker_enforced"
    BROKER_RESTART = "broker_restart"
    ATTESTATION_FAILED = "attestation_failed"
    GROUP_CHANGED = "group_changed"
    APPLICATION_REGISTERED = "application_registered"
    APPLICATION_RENEWED = "application_renewed"
    APPLICATION_EXPIRING = "application_expiring"
    APPLICATION_REVOKED = "application_revoked"
    APPLICATION_DELIVERED = "application_delivered"
    APPLICATION_LINK_REUSED = "application_link_reused"
    APPLICATION_BROKER_PENDING = "application_broker_pending"
    APPLICATION_BROKER_ENFORCED = "application_broker_enforced"

    def of(self, kind: ClientKind) -> EventType:
        """Return the type of what happens to an application where this one is of a device."""
        return self if kind is ClientKind.DEVICE else EventType(f"{kind}_{self}")


def record(
    tx: Connection,
    tenant_id: str,
    type: EventType | str,  # noqa: A002 - the field's name in the interface
    device_id: str | None,
    *,
    at: datetime,
    kind: ClientKind = ClientKind.DEVICE,
    once: str | None = None,
    **facts: Any,
) -> None:
    """Record an event in the transaction that makes the change it is about, before its audit entry.

    If the ``kind`` is that of an application, its type and id are those of one. ``facts`` go to the subscribers as
    they are, times as RFC 3339: never a secret. Two calls with the same ``once``, for the same device and type, are one
    event. Where it is known that there are no subscribers this costs no statement. Raises ``ValueError`` for a type
    that is unknown.
    """
    if not has_subscribers(tx, tenant_id):
        return
    type = EventType(type).of(kind)  # noqa: A001 - as above
    event_id = secrets.token_hex(16)
    if once is not None:
        event_id = hashlib.sha256("\n".join((tenant_id, type, device_id or "", once)).encode()).hexdigest()[:32]
    webhooks.add_event(
        tx,
        tenant_id,
        event_id=event_id,
        type=type,
        device_id=device_id,
        body=body_of(event_id, type, device_id, at, facts, kind=kind),
        at=at,
        once=once is not None,
    )


def is_of_application(type_: str) -> bool:
    """Return whether an event of this type is about an application, and not about a device."""
    return type_.startswith(f"{ClientKind.APPLICATION}_")


def has_subscribers(database: Connection | Engine, tenant_id: str = ALL_TENANTS) -> bool:
    """Return whether there may be subscribers of a tenant, or of any; ``False`` is certain.

    On SQLite a file says so. On PostgreSQL a transaction knows it that has advanced the generation, or has taken its
    turn to record what brokers enforce: the statements that do so look.
    """
    marker = database.get_execution_options().get(_MARKER)
    if marker is not None:
        return os.path.exists(marker)
    return not isinstance(database, Connection) or webhooks.may_be_subscribed(database, tenant_id)


def body_of(
    event_id: str,
    type: str,  # noqa: A002 - as above
    device_id: str | None,
    at: datetime,
    facts: dict[str, Any],
    *,
    kind: ClientKind = ClientKind.DEVICE,
) -> str:
    """Return the body that is sent: one JSON object, always the same text for the same event."""
    values = {"id": event_id, "type": str(type), "at": at, f"{kind}_id": device_id, "data": facts}
    return json.dumps(values, separators=(",", ":"), default=_plain)


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    raise TypeError(f"a fact of an event is of the type {type(value).__name__}, which JSON does not have")


def watch(engine: Engine, marker: Path) -> None:
    """Let ``record`` on this engine's connections do nothing while the file ``marker`` is not there.

    The file is created before a subscription is committed, so that every process sees it.
    """
    engine.update_execution_options(**{_MARKER: str(marker)})
