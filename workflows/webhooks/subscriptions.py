"""The use cases around subscriptions to events."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from core.errors import Conflict, Unavailable
from core.files import FileLock
from store import webhooks
from store.database import Database
from store.webhooks import Backlog, DeliveryRecord, WebhookRecord
from workflows import audit, events
from workflows.audit import Actor
from workflows.events import EventType
from workflows.webhooks.addresses import Network, read_url
from workflows.webhooks.sending import Message, Sender, Sent
from workflows.webhooks.signature import SecretSeal, new_secret, shown

MOST_WEBHOOKS = 16
NOTHING = Backlog(0, None, 0)
TEST = "test"  # the type of an event that is sent to try a receiver, and never otherwise


class Webhooks:
    """Who is told what happens."""

    def __init__(
        self,
        database: Database,
        sender: Sender,
        seal: SecretSeal,
        marker: Path,
        allowed: Sequence[Network],
        clock: Callable[[], datetime],
    ) -> None:
        """``marker`` is the file without which no event is recorded: see ``events.watch``."""
        self._database = database
        self._sender = sender
        self._seal = seal
        self._marker = marker
        self._marker_lock = FileLock(marker.with_name(f"{marker.name}.lock"))
        self._allowed = allowed
        self._clock = clock
        self._trying = threading.Lock()

    def create(self, actor: Actor, name: str, url: str, wanted: Sequence[EventType]) -> tuple[str, WebhookRecord]:
        """Subscribe a receiver to some types of events, or with none given to all; returns the secret, shown once.

        Everything that happens after the return is sent to it. Raises ``InputInvalid``, ``Conflict``.
        """
        read_url(url, self._allowed)
        secret, webhook_id, now = new_secret(), secrets.token_hex(8), self._clock()
        types = tuple(sorted(set(wanted)))
        sealed = self._seal.seal(secret, webhook_id)
        record = WebhookRecord(webhook_id, actor.tenant_id, name, url, types, sealed, now)
        with self._marker_lock.hold():
            self._marker.touch(mode=0o600)  # before the commit: from that on nothing may be missed
            with self._database.transaction() as tx:
                if len(webhooks.list_webhooks(tx, actor.tenant_id)) >= MOST_WEBHOOKS:
                    raise Conflict(f"There are {MOST_WEBHOOKS} webhooks already; delete one that is not needed.")
                webhooks.add_webhook(tx, record)
                audit.record(
                    tx, actor, "webhook:create", f"webhook:{webhook_id}", at=now, name=name, url=url, events=types
                )
        return shown(secret), record

    def delete(self, actor: Actor, webhook_id: str) -> tuple[WebhookRecord, Backlog]:
        """End a subscription, with all that was on its way to it: what that was is returned. Raises ``NotFound``."""
        now = self._clock()
        with self._marker_lock.hold():
            with self._database.transaction() as tx:
                record = webhooks.get_webhook(tx, actor.tenant_id, webhook_id)
                backlog = webhooks.backlog(tx, actor.tenant_id).get(webhook_id, NOTHING)
                webhooks.remove_webhook(tx, actor.tenant_id, webhook_id)
                audit.record(tx, actor, "webhook:delete", f"webhook:{webhook_id}", at=now, url=record.url)
            self._look_for_any()
        return record, backlog

    def look_for_any(self) -> None:
        """Let events be recorded if anybody has subscribed; called at a start, after which a restore may have been."""
        with self._marker_lock.hold():
            self._look_for_any()

    def _look_for_any(self) -> None:
        with self._database.snapshot() as tx:
            anybody = bool(webhooks.list_webhooks(tx))
        if anybody:
            self._marker.touch(mode=0o600)
        else:
            self._marker.unlink(missing_ok=True)

    def all(self, tenant_id: str) -> Sequence[tuple[WebhookRecord, Backlog]]:
        """Every subscription, oldest first, with what waits and what was given up."""
        with self._database.snapshot() as tx:
            backlog = webhooks.backlog(tx, tenant_id)
            return [(record, backlog.get(record.id, NOTHING)) for record in webhooks.list_webhooks(tx, tenant_id)]

    def deliveries(
        self, tenant_id: str, webhook_id: str, *, limit: int, before: int | None, status: str | None
    ) -> Sequence[DeliveryRecord]:
        """What was or is to be sent to a receiver, newest first; raises ``NotFound``."""
        with self._database.snapshot() as tx:
            webhooks.get_webhook(tx, tenant_id, webhook_id)
            return webhooks.list_deliveries(tx, tenant_id, webhook_id, limit=limit, before=before, status=status)

    def redeliver(self, actor: Actor, webhook_id: str, ids: Sequence[int] | None) -> int:
        """Send again what has ended, or with ``None`` everything that was given up; returns how many.

        Each keeps its event's id. Raises ``NotFound``.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            webhooks.get_webhook(tx, actor.tenant_id, webhook_id)
            count = webhooks.redeliver(tx, actor.tenant_id, webhook_id, ids, now=now)
            if count:
                audit.record(tx, actor, "webhook:redeliver", f"webhook:{webhook_id}", at=now, count=count)
        return count

    def test(self, actor: Actor, webhook_id: str) -> Sent:
        """Send an event of the type ``test`` now, once; raises ``NotFound``, ``Unavailable``."""
        now = self._clock()
        with self._database.transaction() as tx:
            record = webhooks.get_webhook(tx, actor.tenant_id, webhook_id)
            audit.record(tx, actor, "webhook:test", f"webhook:{webhook_id}", at=now)
        if not self._trying.acquire(blocking=False):  # it may take long, and must not take every thread
            raise Unavailable("Another webhook is being tried; do it again in a few seconds.")
        try:
            event_id = secrets.token_hex(16)
            body = events.body_of(event_id, TEST, None, now, {})
            return self._sender.send(
                Message(record.id, record.url, record.sealed_secret, event_id, body), now=self._clock()
            )
        finally:
            self._trying.release()
