"""The append-only record of who did what."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

import db_access


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks: ``name`` is what the record shows, such as ``token:ci-factory`` or ``link``."""

    tenant_id: str
    name: str
    role: str
    request_id: str
    address: str


def record(
    tx: Connection,
    actor: Actor,
    action: str,
    object: str,  # noqa: A002 - the field's name in the record
    *,
    at: datetime,
    outcome: str = "done",
    **detail: Any,
) -> None:
    """Append an entry in the transaction that makes the change it speaks of.

    ``action`` is a tag such as ``device:register``; ``object`` names what it was done to, such as ``device:<id>``.
    ``detail`` never holds a secret: no key, password, token or link.
    """
    db_access.add_audit_entry(
        tx,
        actor.tenant_id,
        {
            "at": at,
            "actor": actor.name[:128],
            "action": action,
            "object": object[:128],
            "outcome": outcome,
            "request_id": actor.request_id,
            "address": actor.address[:64],
            "detail": detail,
        },
    )


def system_actor(tenant_id: str) -> Actor:
    """The portal itself, for what it does with nobody asking."""
    return Actor(tenant_id=tenant_id, name="portal", role="system", request_id="", address="")
