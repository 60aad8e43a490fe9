"""Brokers as tests want them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sqlalchemy.engine import Connection

from operations.wiring import Portal
from store import brokers, generations
from store.scope import ALL_TENANTS
from workflows.prompt import Outcome


def enforce_all(tx: Connection, name: str | None = None, *, at: datetime | None = None) -> None:
    """Record that every broker, or the one of a name, was seen to enforce the newest generation, now or ``at``."""
    newest = generations.get_broker_state(tx).generation
    for record in brokers.list_brokers(tx):
        if name in (None, record.name):
            brokers.set_applied_generation(tx, record.id, newest, applied_at=at or datetime.now(UTC))


def obeys(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the portal's broker obey at once; return the list of the generations that it will be asked to reach."""
    asked: list[int] = []

    def apply(generation: int, *, timeout: float | None = None) -> Outcome:
        asked.append(generation)
        with portal.database.transaction(sees=ALL_TENANTS) as tx:
            brokers.set_applied_generation(tx, 1, generation, applied_at=portal.clock())
        return Outcome(generation, generation)

    monkeypatch.setattr(portal.reconciler, "apply", apply)
    return asked
