"""Events: what happens to devices and the broker, recorded for webhooks in the transaction that makes the change."""

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

from store import webhooks

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


def record(
    tx: Connection,
    tenant_id: str,
    type: EventType | str,  # noqa: A002 - the field's name in the interface
    device_id: str | None,
    *,
    at: datetime,
    once: str | None = None,
    **facts: Any,
) -> None:
    """Record an event in the transaction that makes the change it is about, before its audit entry.

    ``facts`` go to the subscribers as they are, times as RFC 3339: never a secret. Two calls with the same ``once``,
    for the same device and type, are one event. Without subscribers this costs a check for a file and no
    statement. Raises ``ValueError`` for an unknown type.
    """
    if not has_subscribers(tx):
        return
    type = EventType(type)  # noqa: A001 - as above
    event_id = secrets.token_hex(16)
    if once is not None:
        event_id = hashlib.sha256("\n".join((tenant_id, type, device_id or "", once)).encode()).hexdigest()[:32]
    webhooks.add_event(
        tx,
        tenant_id,
        event_id=event_id,
        type=type,
        device_id=device_id,
        body=body_of(event_id, type, device_id, at, facts),
        at=at,
        once=once is not None,
    )


def has_subscribers(database: Connection | Engine) -> bool:
    """Return whether there may be subscribers; ``False`` is certain."""
    marker = database.get_execution_options().get(_MARKER)
    return marker is None or os.path.exists(marker)


def body_of(event_id: str, type: str, device_id: str | None, at: datetime, facts: dict[str, Any]) -> str:  # noqa: A002 - as above
    """Return the body that is sent: one JSON object, always the same text for the same event."""
    values = {"id": event_id, "type": str(type), "at": at, "device_id": device_id, "data": facts}
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
