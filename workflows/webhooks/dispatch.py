"""Sends what waits in the outbox to those who subscribed, at least once."""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from core import metrics
from core.errors import PortalError
from core.failpoints import failpoint
from store import webhooks
from store.database import Database
from store.webhooks import Claim, WebhookRecord
from workflows import events
from workflows.webhooks.sending import Message, Sender, Sent

log = logging.getLogger("portal.webhooks")

POLL_SECONDS = 1.0
# What one process sends to one receiver at the same time, in lanes of so many events one after the other.
LANES = 4
LANE_LENGTH = 4
LEASE = timedelta(seconds=180)  # more than a lane's worth of receivers that hang

FIRST_DELAY = timedelta(seconds=5)
LONGEST_DELAY = timedelta(hours=2)
MOST_ATTEMPTS = 24  # over some 27 hours
# A receiver that takes nothing is left alone for a while, so that a long backlog does not burn itself out on it.
LONGEST_REST_SECONDS = 60.0


def delay_after(attempts: int, *, jitter: float) -> timedelta | None:
    """How long to wait after so many attempts in vain: doubled each time, ``None`` for no more.

    ``jitter``, from 0 to 1, spreads it between three quarters and five quarters.
    """
    if attempts >= MOST_ATTEMPTS:
        return None
    doubled: timedelta = FIRST_DELAY * int(2 ** (attempts - 1))
    return min(doubled, LONGEST_DELAY) * (0.75 + jitter / 2)


class _Lane(threading.Thread):
    """Sends some events to one receiver, one after the other; a daemon, so that no receiver delays the portal's end."""

    def __init__(self, send: Callable[[Claim], bool], claimed: Sequence[Claim], freed: threading.Event) -> None:
        super().__init__(name="webhook", daemon=True)
        self._send = send
        self._claimed = claimed
        self._freed = freed
        self.taken = False  # whether the receiver took any

    def run(self) -> None:
        try:
            for claimed in self._claimed:
                self.taken |= self._send(claimed)
        except PortalError as error:
            log.warning("how an event was sent cannot be recorded", extra={"problem": error.detail})
        except Exception:
            log.exception("an event could not be sent")
        finally:
            self._freed.set()


class Dispatcher:
    """Runs in every process that serves; what one has claimed, no other sends until the lease is over."""

    def __init__(self, database: Database, sender: Sender, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._sender = sender
        self._clock = clock
        self._freed = threading.Event()
        self._busy: dict[str, list[_Lane]] = {}
        self._resting: dict[str, tuple[int, float]] = {}  # by webhook: rests in a row, end of this one

    def run(self, stopping: threading.Event) -> None:
        """Send whatever is due until ``stopping`` is set; the body of a thread."""
        while not stopping.is_set():
            self._freed.clear()
            began: list[_Lane] = []
            try:
                began = self._begin()
            except PortalError as error:
                log.warning("no event can be sent now", extra={"problem": error.detail})
            except Exception:
                log.exception("no event can be sent now")
            if began:
                self._freed.wait(POLL_SECONDS)
            else:
                stopping.wait(POLL_SECONDS)

    def send_due(self) -> None:
        """Send what is due now, a few events to each receiver, and return when that has ended."""
        self._begin()
        self.join()

    def join(self) -> None:
        """Return when nothing is being sent any more."""
        for lanes in list(self._busy.values()):
            for lane in lanes:
                lane.join()

    def _begin(self) -> list[_Lane]:
        """Claim what is due for receivers that are free, and begin to send it."""
        if not events.has_subscribers(self._database.engine):
            return []
        now = self._clock()
        with self._database.snapshot() as tx:
            free = [webhook for webhook in webhooks.list_webhooks(tx) if self._is_free(webhook.id)]
            wanting = [webhook for webhook in free if webhooks.due(tx, webhook.id, now=now, most=1)]
        began: list[_Lane] = []
        for webhook in wanting:
            with self._database.transaction() as tx:
                claimed = webhooks.claim(tx, webhook.id, now=now, most=LANES * LANE_LENGTH, lease_until=now + LEASE)
            send = functools.partial(self._send, webhook)
            lanes = [_Lane(send, claimed[number::LANES], self._freed) for number in range(min(LANES, len(claimed)))]
            self._busy[webhook.id] = lanes
            for lane in lanes:
                lane.start()
            began += lanes
        return began

    def _is_free(self, webhook_id: str) -> bool:
        lanes = self._busy.get(webhook_id, [])
        if any(lane.is_alive() for lane in lanes):
            return False
        if lanes:
            del self._busy[webhook_id]
            rests = self._resting.pop(webhook_id, (0, 0.0))[0] + 1
            if not any(lane.taken for lane in lanes):
                rest = min(2.0 ** (rests - 1), LONGEST_REST_SECONDS)
                self._resting[webhook_id] = rests, time.monotonic() + rest
        return self._resting.get(webhook_id, (0, 0.0))[1] <= time.monotonic()

    def _send(self, webhook: WebhookRecord, claimed: Claim) -> bool:
        message = Message(webhook.id, webhook.url, webhook.sealed_secret, claimed.event_id, claimed.body)
        sent = self._sender.send(message, now=self._clock())
        failpoint("events.after_send")
        now = self._clock()
        if sent.problem is None:
            self._database.write(lambda tx: webhooks.end(tx, claimed, now=now))
            metrics.event_sent("delivered")
            return True
        delay = delay_after(claimed.attempts, jitter=random.random())  # noqa: S311 - no secret
        until = None if delay is None else now + delay
        problem = sent.problem
        self._database.write(lambda tx: webhooks.put_off(tx, claimed, until=until, problem=problem, now=now))
        metrics.event_sent("failed" if until else "dead")
        self._say(webhook, claimed, sent, dead=until is None)
        return False

    @staticmethod
    def _say(webhook: WebhookRecord, claimed: Claim, sent: Sent, *, dead: bool) -> None:
        detail = {"webhook": webhook.id, "event": claimed.event_id, "attempts": claimed.attempts}
        if dead:
            log.error("an event was given up", extra=detail | {"problem": sent.problem})
        elif claimed.attempts == 1:
            log.warning("an event was not taken; it is sent again later", extra=detail | {"problem": sent.problem})
