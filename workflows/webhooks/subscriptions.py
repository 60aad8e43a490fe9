"""The use cases around subscriptions to events, and the dispatcher that sends each event at least once."""

from __future__ import annotations

import functools
import logging
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy.engine import Connection

from core import metrics
from core.errors import Conflict, PortalError, Unavailable
from core.failpoints import failpoint
from core.files import FileLock
from store import audit, brokers, webhooks
from store.audit import Actor
from store.database import Database
from store.scope import ALL_TENANTS
from store.webhooks import Backlog, ClaimedEvent, EventDeliveryRecord, WebhookRecord
from workflows import events
from workflows.delivery import KeptAnswers, MadeSecret
from workflows.events import EventType
from workflows.tenants import TenantDirectory, TenantRates
from workflows.webhooks.addresses import Network, read_url
from workflows.webhooks.sending import Message, SecretSeal, Sender, Sent, new_secret, shown

log = logging.getLogger("portal.webhooks")

MAX_WEBHOOKS = 16
NOTHING = Backlog(0, None, 0)
TEST = "test"  # the type of the event that ``Webhooks.test`` sends

POLL_SECONDS = 1.0
# One process sends to one receiver over at most LANES connections at once, LANE_LENGTH events in turn on each.
LANES = 4
LANE_LENGTH = 4
# And to all over so many; each of several tenants has a part of them, so that slow receivers of one delay no other's.
MAX_LANES = 256
MAX_LANES_OF_TENANT = 32
LEASE = timedelta(seconds=180)  # more than the events of a lane take if the receiver hangs

FIRST_DELAY = timedelta(seconds=5)
MAX_DELAY = timedelta(hours=2)
MAX_ATTEMPTS = 24  # over about 27 hours
# The pause after a receiver accepted nothing, so that a long backlog does not use up its attempts at once.
MAX_REST_SECONDS = 60.0


class Webhooks:
    """Creates, lists and deletes subscriptions, and sends again what a receiver missed."""

    def __init__(
        self,
        database: Database,
        sender: Sender,
        seal: SecretSeal,
        marker: Path,
        allowed: Sequence[Network],
        answers: KeptAnswers,
        clock: Callable[[], datetime],
    ) -> None:
        """Use ``marker`` as the file that exists while anybody is subscribed: see ``events.watch``."""
        self._database = database
        self._sender = sender
        self._seal = seal
        self._marker = marker
        self._marker_lock = FileLock(marker.with_name(f"{marker.name}.lock"))
        self._allowed = allowed
        self._answers = answers
        self._clock = clock
        self._testing = threading.Lock()

    def create(
        self, actor: Actor, name: str, url: str, wanted: Sequence[EventType], idempotency_key: str | None = None
    ) -> tuple[str, WebhookRecord]:
        """Subscribe a receiver to some types of events, or to all if ``wanted`` is empty; returns the secret once.

        Every event after the return is sent to it. Requests with one ``idempotency_key`` subscribe one. Raises
        ``InputInvalid``, ``Conflict``, ``IdempotencyConflict``, and ``NotFound`` if a repeat's was deleted since.
        """
        read_url(url, self._allowed)
        secret, webhook_id, now = new_secret(), secrets.token_hex(8), self._clock()
        types = tuple(sorted(set(wanted)))
        sealed = self._seal.seal(secret, webhook_id)
        record = WebhookRecord(webhook_id, actor.tenant_id, name, url, types, sealed, now)

        def write(tx: Connection) -> None:
            if len(webhooks.list_webhooks(tx, actor.tenant_id)) >= MAX_WEBHOOKS:
                raise Conflict(f"There are {MAX_WEBHOOKS} webhooks already; delete one that is not needed.")
            webhooks.add_webhook(tx, record)
            of = f"webhook:{webhook_id}"
            audit.record(tx, actor, "webhook:create", of, at=now, name=name, url=url, events=types)

        with self._marker_lock.hold():
            self._marker.touch(mode=0o600)  # before the commit, after which no event may be missed
            new = MadeSecret("webhook", webhook_id, shown(secret))
            made = self._answers.secret_once(actor, idempotency_key, [name, url, types], new, write)
        with self._database.transaction() as tx:
            brokers.take_turns(tx)  # after those that looked for subscriptions before this one was committed
            return made.secret, webhooks.get_webhook(tx, actor.tenant_id, made.id)

    def delete(self, actor: Actor, webhook_id: str) -> tuple[WebhookRecord, Backlog]:
        """Delete a subscription with its unsent events; returns both. Raises ``NotFound``."""
        now = self._clock()
        with self._marker_lock.hold():
            with self._database.transaction() as tx:
                record = webhooks.get_webhook(tx, actor.tenant_id, webhook_id)
                backlog = webhooks.backlog(tx, actor.tenant_id).get(webhook_id, NOTHING)
                webhooks.remove_webhook(tx, actor.tenant_id, webhook_id)
                audit.record(tx, actor, "webhook:delete", f"webhook:{webhook_id}", at=now, url=record.url)
            self._update_marker()
        return record, backlog

    def look_for_any(self) -> None:
        """Record events from now on if there is a subscription; called at each start, since a restore may precede."""
        with self._marker_lock.hold():
            self._update_marker()

    def _update_marker(self) -> None:
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            subscribed = bool(webhooks.list_webhooks(tx))
        if subscribed:
            self._marker.touch(mode=0o600)
        else:
            self._marker.unlink(missing_ok=True)

    def all(self, tenant_id: str) -> Sequence[tuple[WebhookRecord, Backlog]]:
        """Return every subscription, oldest first, with its number of waiting and of dead events."""
        with self._database.snapshot() as tx:
            backlog = webhooks.backlog(tx, tenant_id)
            return [(record, backlog.get(record.id, NOTHING)) for record in webhooks.list_webhooks(tx, tenant_id)]

    def deliveries(
        self, tenant_id: str, webhook_id: str, *, limit: int, before: int | None, status: str | None
    ) -> Sequence[EventDeliveryRecord]:
        """Return the events of a subscription, newest first; raises ``NotFound``."""
        with self._database.snapshot() as tx:
            webhooks.get_webhook(tx, tenant_id, webhook_id)
            return webhooks.list_deliveries(tx, tenant_id, webhook_id, limit=limit, before=before, status=status)

    def redeliver(self, actor: Actor, webhook_id: str, ids: Sequence[int] | None) -> int:
        """Send delivered or dead events again, all dead ones if ``ids`` is ``None``; returns how many.

        Each keeps its event id. Raises ``NotFound``.
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
        if not self._testing.acquire(blocking=False):  # a slow receiver must not occupy every thread of the server
            raise Unavailable("Another webhook is being tested; try again in a few seconds.")
        try:
            event_id = secrets.token_hex(16)
            body = events.body_of(event_id, TEST, None, now, {})
            return self._sender.send(
                Message(record.id, record.url, record.sealed_secret, event_id, body), now=self._clock()
            )
        finally:
            self._testing.release()


def delay_after(attempts: int, *, jitter: float) -> timedelta | None:
    """Return the delay after a number of failed attempts: doubled each time, ``None`` to give up.

    ``jitter``, from 0 to 1, spreads it between three quarters and five quarters.
    """
    if attempts >= MAX_ATTEMPTS:
        return None
    doubled: timedelta = FIRST_DELAY * int(2 ** (attempts - 1))
    return min(doubled, MAX_DELAY) * (0.75 + jitter / 2)


class _Lane(threading.Thread):
    """Sends some events to one receiver, in turn; a daemon, so that no receiver delays the end of the process."""

    def __init__(
        self,
        tenant_id: str,
        send: Callable[[ClaimedEvent], bool],
        claimed: Sequence[ClaimedEvent],
        finished: threading.Event,
    ) -> None:
        super().__init__(name="webhook", daemon=True)
        self.tenant_id = tenant_id
        self._send = send
        self._claimed = claimed
        self._finished = finished
        self.delivered_any = False

    def run(self) -> None:
        try:
            for claimed in self._claimed:
                self.delivered_any |= self._send(claimed)
        except PortalError as error:
            log.warning("the outcome of a webhook delivery could not be recorded", extra={"problem": error.detail})
        except Exception:
            log.exception("a webhook delivery failed unexpectedly")
        finally:
            self._finished.set()


class Dispatcher:
    """Sends waiting events; runs in every serving process. A claimed event is left alone by others for its lease."""

    def __init__(
        self,
        database: Database,
        tenants: TenantDirectory,
        sender: Sender,
        rates: TenantRates,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._tenants = tenants
        self._rates = rates
        self._sender = sender
        self._clock = clock
        self._finished = threading.Event()
        self._busy: dict[str, list[_Lane]] = {}
        self._resting: dict[str, tuple[int, float]] = {}  # by webhook: consecutive rests, end of this one

    def run(self, stopping: threading.Event) -> None:
        """Send due events until ``stopping`` is set; the body of a thread."""
        while not stopping.is_set():
            self._finished.clear()
            started: list[_Lane] = []
            try:
                started = self._start_lanes()
            except PortalError as error:
                log.warning("webhook events cannot be sent now", extra={"problem": error.detail})
            except Exception:
                log.exception("webhook events cannot be sent now")
            if started:
                self._finished.wait(POLL_SECONDS)
            else:
                stopping.wait(POLL_SECONDS)

    def send_due(self) -> None:
        """Send due events, a few to each receiver, and return when that has finished."""
        self._start_lanes()
        self.join()

    def join(self) -> None:
        """Return when nothing is being sent any more."""
        for lanes in list(self._busy.values()):
            for lane in lanes:
                lane.join()

    def _start_lanes(self) -> list[_Lane]:
        """Claim due events for receivers that are free, and start to send them."""
        if not events.has_subscribers(self._database.engine):
            return []
        now = self._clock()
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            due = webhooks.due_webhooks(tx, now=now)
        for webhook_id in tuple(self._busy):
            self._is_free(webhook_id)  # a receiver rests from when its events have failed, not from when more are due
        free = [webhook for webhook in due if self._is_free(webhook.id)]
        busy = Counter(lane.tenant_id for lanes in self._busy.values() for lane in lanes if lane.is_alive())
        started: list[_Lane] = []
        for webhook in sorted(free, key=lambda one: busy[one.tenant_id]):
            lanes = self._lanes_to(webhook, self._room(webhook.tenant_id, busy), now)
            if lanes:
                self._busy[webhook.id] = list(lanes)
            for lane in lanes:
                lane.start()
            busy[webhook.tenant_id] += len(lanes)
            started += lanes
        return started

    def _room(self, tenant_id: str, busy: Counter[str]) -> int:
        """Return how many lanes another receiver of a tenant may have."""
        of_tenant = MAX_LANES_OF_TENANT - busy[tenant_id] if self._tenants.are_several else LANES
        return max(0, min(LANES, MAX_LANES - busy.total(), of_tenant))

    def _lanes_to(self, webhook: WebhookRecord, room: int, now: datetime) -> Sequence[_Lane]:
        """Claim due events of a receiver for as many lanes as there is room for."""
        tenant, limit = self._tenants.of(webhook.tenant_id), room * LANE_LENGTH
        if limit and tenant.quotas.webhook_deliveries_per_minute is not None:
            with self._database.snapshot(sees=ALL_TENANTS) as tx:
                limit = len(webhooks.due(tx, webhook.id, now=now, limit=limit))
            limit = self._rates.take_deliveries(tenant, limit).number  # what is left waits for the next minute
        if not limit:
            return ()
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            claimed = webhooks.claim(tx, webhook.id, now=now, limit=limit, lease_until=now + LEASE)
        send = functools.partial(self._send, webhook)
        number = min(room, len(claimed))
        return [_Lane(webhook.tenant_id, send, claimed[start::number], self._finished) for start in range(number)]

    def _is_free(self, webhook_id: str) -> bool:
        lanes = self._busy.get(webhook_id, [])
        if any(lane.is_alive() for lane in lanes):
            return False
        if lanes:
            del self._busy[webhook_id]
            rests = self._resting.pop(webhook_id, (0, 0.0))[0] + 1
            if not any(lane.delivered_any for lane in lanes):
                rest = min(2.0 ** (rests - 1), MAX_REST_SECONDS)
                self._resting[webhook_id] = rests, time.monotonic() + rest
        return self._resting.get(webhook_id, (0, 0.0))[1] <= time.monotonic()

    def _send(self, webhook: WebhookRecord, claimed: ClaimedEvent) -> bool:
        message = Message(webhook.id, webhook.url, webhook.sealed_secret, claimed.event_id, claimed.body)
        sent = self._sender.send(message, now=self._clock())
        failpoint("events.after_send")
        now = self._clock()
        if sent.problem is None:
            self._database.write(lambda tx: webhooks.mark_delivered(tx, claimed, now=now))
            metrics.counts.events.labels("delivered").inc()
            return True
        delay = delay_after(claimed.attempts, jitter=random.random())  # noqa: S311 - not a secret
        until = None if delay is None else now + delay
        problem = sent.problem
        self._database.write(lambda tx: webhooks.postpone(tx, claimed, until=until, problem=problem, now=now))
        metrics.counts.events.labels("failed" if until else "dead").inc()
        detail = {"webhook": webhook.id, "event": claimed.event_id, "attempts": claimed.attempts, "problem": problem}
        if until is None:
            log.error("a webhook event was given up", extra=detail)
        elif claimed.attempts == 1:
            log.warning("a webhook event was not accepted; it is sent again later", extra=detail)
        return False
