"""Whether anybody has subscribed to events is looked up by statements that are sent anyway, where nodes share it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

import db
from core.broker_control import ControlKind
from operations.wiring import Portal
from store import webhooks
from store.scope import ALL_TENANTS, of_tenant
from tests.support.deployment import wait_until
from tests.support.harness import ON_POSTGRESQL
from tests.support.tenants import add_tenant
from tests.workflows.test_registration import OPERATOR, with_fields
from workflows import events
from workflows.events import EventType
from workflows.reconciliation import Reconciler

pytestmark = ON_POSTGRESQL
URL = "https://receiver.example.org/"


@contextmanager
def queued(portal: Portal) -> Iterator[list[str]]:
    """The statements that queue events in the ``with`` block."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.extend([statement] if statement.startswith("INSERT INTO webhook_deliveries") else [])

    sa.event.listen(portal.database.engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(portal.database.engine, "before_cursor_execute", note)


@pytest.fixture
def advances(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker is told of each device."""
    journal = portal.settings.model_copy(update={"broker_control": ControlKind.GUARD})
    monkeypatch.setattr(portal.registrations, "_settings", journal)
    monkeypatch.setattr(Reconciler, "apply_soon", lambda *_: None)


@pytest.mark.usefixtures("advances")
def test_a_registration_queues_events_while_somebody_has_subscribed(portal: Portal) -> None:
    with queued(portal) as seen:
        portal.registrations.register(OPERATOR, with_fields(name="pump-1"))
        assert seen == []
        _, webhook = portal.webhooks.create(OPERATOR, "all", URL, [])
        portal.registrations.register(OPERATOR, with_fields(name="pump-2"))
        assert len(seen) == 1
        portal.webhooks.delete(OPERATOR, webhook.id)
        portal.registrations.register(OPERATOR, with_fields(name="pump-3"))
        assert len(seen) == 1


def test_what_a_transaction_has_seen_is_forgotten_with_it(portal: Portal) -> None:
    for error in (None, RuntimeError()):
        try:
            with portal.database.transaction() as tx:
                assert events.has_subscribers(tx)
                db.next_generation(tx, at=portal.clock())
                assert not events.has_subscribers(tx)
                if error is not None:
                    raise error
        except RuntimeError:
            pass


def test_what_a_tenant_sees_says_nothing_of_others(portal: Portal) -> None:
    add_tenant(portal, "acme")
    with of_tenant("acme"), portal.database.transaction() as tx:
        db.next_generation(tx, at=portal.clock())
        assert not webhooks.may_be_subscribed(tx, "acme")
        assert webhooks.may_be_subscribed(tx, "default")
        assert webhooks.may_be_subscribed(tx, ALL_TENANTS)


def test_a_subscription_waits_for_those_that_looked_before_it(portal: Portal) -> None:
    def waits() -> bool:
        with portal.database.snapshot() as other:
            query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            return other.exec_driver_sql(query).first() is not None

    with ThreadPoolExecutor(1) as pool, portal.database.transaction() as tx:
        db.next_generation(tx, at=portal.clock())
        created = pool.submit(portal.webhooks.create, OPERATOR, "all", URL, [EventType.REGISTERED])
        wait_until(lambda: waits() or created.done())
        assert not created.done()
    assert created.result(30)[1].events == ("registered",)
