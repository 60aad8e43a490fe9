"""How a revocation or suspension took hold on the broker: each step with its time, once it was proven.

The reconciler of each node notes the steps of the newest generations at its broker in the database, where all nodes
read them. They need not survive anything: that the brokers enforce a device's state is recorded by itself.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

import db
from broker.control import Step
from core.errors import PortalError
from core.states import DeviceStatus
from store import audit, brokers, devices, enforcement, generations
from store.database import Database
from store.devices import DeviceRecord
from store.enforcement import Attempt
from store.scope import ALL_TENANTS
from workflows import events
from workflows.events import EventType

log = logging.getLogger("portal.enforcement")

SHOWN_AFTER_SECONDS = 0.2  # in which nobody watches a reconciliation that is under way
PRUNED_EVERY = 64  # generations
_CHANGES = {"device:revoke": DeviceStatus.REVOKED, "device:suspend": DeviceStatus.SUSPENDED}
_LOOKED_AT = 20  # audit entries of a device
ANSWER_SECONDS = 5.0  # for which one answer of the broker counts


class Progress:
    """Notes when one reconciliation of a broker has proven each step; it has read the changes just now.

    What it has proven is recorded with what the broker enforces, by one transaction. Before that only once it takes
    longer, for who watches it, or if it has failed.
    """

    def __init__(self, database: Database, broker_id: int, since: int, generation: int, at: datetime) -> None:
        """Take the generation that the broker was seen to enforce, and the one that it is to be seen to enforce."""
        self._database = database
        self._broker_id, self._since, self._generation, self._at = broker_id, since, generation, at
        self._started = self._written = time.monotonic()
        self._proven: dict[str, datetime] = {}

    def proven(self, *steps: Step) -> None:
        """Note that these steps were seen just now."""
        self._proven |= {step: self._now() for step in steps if step not in self._proven}
        if time.monotonic() - self._written >= SHOWN_AFTER_SECONDS:
            self._write("")

    def failed(self, problem: str) -> None:
        """Record why it ends before the next step."""
        self._write(problem)

    def record(self, tx: Connection) -> None:
        """Record all steps, with the last one, in the transaction that records what the broker enforces."""
        enforcement.write(tx, self._attempt("", self._proven | {Step.ENFORCED: self._now()}))
        if self._generation // PRUNED_EVERY != self._since // PRUNED_EVERY:
            enforcement.prune(tx, self._broker_id, self._generation)

    def _write(self, problem: str) -> None:
        # What is proven does not depend on it.
        with contextlib.suppress(PortalError), self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
            enforcement.write(tx, self._attempt(problem, self._proven))
        self._written = time.monotonic()

    def _now(self) -> datetime:
        return self._at + timedelta(seconds=time.monotonic() - self._started)

    def _attempt(self, problem: str, proven: Mapping[str, datetime]) -> Attempt:
        return Attempt(self._broker_id, self._since, self._generation, self._at, proven, problem)


def note_applied(tx: Connection, broker_id: int, generation: int, *, at: datetime) -> None:
    """Record that a broker was seen to enforce ``generation``, with an event for each device that all now keep out.

    Who calls has taken its turn (``brokers.take_turns``).
    """
    before = brokers.announced_generation(tx) if (is_heard := events.has_subscribers(tx)) else 0
    brokers.set_applied_generation(tx, broker_id, generation, applied_at=at)
    after = brokers.announced_generation(tx) if is_heard else 0
    if after > before:
        for device_id in generations.devices_to_disconnect(tx, since=before, upto=after):
            tenant_id, kind = devices.owner_of(tx, device_id)
            events.record(tx, tenant_id, EventType.BROKER_ENFORCED, device_id, at=at, kind=kind, generation=after)


# --- What is shown of a device ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TakingHold:
    """How far a change has taken hold.

    ``recorded_at`` is when it was recorded. ``proven`` has the time of each step that was seen, as far as it is still
    known; ``is_enforced`` is certain. ``problem`` is why it is not, if a reconciliation has failed.
    """

    recorded_at: datetime
    proven: Mapping[Step, datetime]
    is_enforced: bool
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Enforcement(TakingHold):
    """How far the newest state of a device that is revoked or suspended has taken hold."""

    device: DeviceRecord


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was proven of a generation at all brokers that count, each step when the last of them had proven it.

    ``problem`` is that of the first one that has not proven all. ``first_at`` is when one of them began.
    """

    proven: Mapping[Step, datetime]
    problem: str
    first_at: datetime | None

    @classmethod
    def by(cls, tx: Connection, generation: int) -> _Seen:
        """Read it from the database."""
        of_broker: dict[int, list[Attempt]] = {}
        attempts = enforcement.attempts(tx, generation)
        for one in attempts:
            of_broker.setdefault(one.broker_id, []).append(one)
        each: list[Mapping[str, datetime]] = []
        problem = ""
        for record in brokers.list_brokers(tx):
            own, is_behind = of_broker.get(record.id, []), record.applied_generation < generation
            # One that enforces it, but whose steps are not known, has an agent, or has done so long ago.
            if record.counts and (own or is_behind):
                each.append({step: at for one in reversed(own) for step, at in one.proven.items()})
                problem = problem or (own[-1].problem if own and is_behind else "")
        first, *others = each or [{}]
        proven = {Step(step): max(one[step] for one in each) for step in first if all(step in one for one in others)}
        return cls(proven, problem, min((one.at for one in attempts), default=None))


class SharedAnswer:
    """Whether the broker answers, for those that ask again and again while it may hang: each question takes a second.

    One asks, and for ``ANSWER_SECONDS`` the others have its answer; who comes before there is one is told that it does.
    """

    def __init__(self, broker_answers: Callable[[], bool]) -> None:
        self._broker_answers = broker_answers
        self._asking = threading.Lock()
        self._last, self._until = True, 0.0

    def __call__(self) -> bool:
        """Return whether it does, or did just now."""
        if time.monotonic() >= self._until and self._asking.acquire(blocking=False):
            try:
                self._last = self._broker_answers()
                self._until = time.monotonic() + ANSWER_SECONDS
            finally:
                self._asking.release()
        return self._last


@dataclass(frozen=True, slots=True)
class Enforcements:
    """Reads how changes of devices took hold."""

    _database: Database
    _why_pending: Callable[[int], str | None]

    def of(self, tenant_id: str, device_id: str) -> Enforcement | None:
        """Return how a revoked or suspended device is kept out, ``None`` for others; raises ``DeviceNotFound``."""
        with self._database.snapshot() as tx:
            device = db.get_device(tx, tenant_id, device_id)
            if device.status not in _CHANGES.values():
                return None
            state = generations.get_broker_state(tx)
            of_device = {"object": device.name_in_audit}
            entries = audit.list_audit_entries(tx, tenant_id, limit=_LOOKED_AT, filters=of_device)
            seen = _Seen.by(tx, device.generation)
        newest = next((entry for entry in entries if _is_told(entry)), None)
        is_enforced = device.generation <= state.applied_generation
        if newest is None or _CHANGES.get(newest.action) is not device.status:  # its topics have changed since
            recorded = device.revoked_at or device.updated_at
            problem = None if is_enforced else self._why_pending(device.generation)
            return Enforcement(device=device, recorded_at=recorded, proven={}, is_enforced=is_enforced, problem=problem)
        found = self._taking_hold(newest.at, device.generation, seen, is_enforced=is_enforced)
        return Enforcement(
            device=device,
            recorded_at=newest.at,
            proven=found.proven,
            is_enforced=is_enforced,
            problem=found.problem,
        )

    def applied_generation(self) -> int:
        """Return the newest generation that the broker was seen to enforce."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return generations.get_broker_state(tx).applied_generation

    def of_generation(self, generation: int, now: datetime) -> TakingHold:
        """Return how far all changes up to a generation have taken hold; as recorded counts when it was first tried."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            is_enforced = generation <= generations.get_broker_state(tx).applied_generation
            seen = _Seen.by(tx, generation)
        recorded_at = now if seen.first_at is None else seen.first_at
        return self._taking_hold(recorded_at, generation, seen, is_enforced=is_enforced)

    def _taking_hold(self, recorded_at: datetime, generation: int, seen: _Seen, *, is_enforced: bool) -> TakingHold:
        proven = dict(seen.proven)
        if not is_enforced:  # what is recorded has the last word
            proven.pop(Step.ENFORCED, None)
        problem = None if is_enforced else seen.problem
        if not is_enforced and not problem:
            problem = self._why_pending(generation)
        return TakingHold(recorded_at=recorded_at, proven=proven, is_enforced=is_enforced, problem=problem)


def _is_told(entry: audit.AuditRecord) -> bool:
    """Return whether an entry is about a change that the broker was told."""
    if entry.outcome != "done":
        return False
    return entry.action in (*_CHANGES, "device:resume") or (
        entry.action == "device:update" and "topics" in entry.detail.get("changed", ())
    )
