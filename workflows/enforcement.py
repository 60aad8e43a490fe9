"""How a revocation or suspension took hold on the broker: each step with its time, once it was proven.

The reconciler notes the steps of each generation in a file of the data folder, a ring of the newest ones, which each
process reads. It need not survive anything: that the broker enforces a device's state is in the database.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy.engine import Connection

import db
from broker.control import Step
from core.states import DeviceStatus
from store import audit, brokers, devices, generations
from store.database import Database
from store.devices import DeviceRecord
from store.scope import ALL_TENANTS
from workflows import events
from workflows.events import EventType

log = logging.getLogger("portal.enforcement")

STEPS_FILE = ".enforcement"
SLOTS, SLOT_BYTES = 512, 256
_FIELDS = struct.Struct("<QQd4fH")  # since, generation, time of the snapshot, seconds from it to each step, length
_CHECK = struct.Struct("<I")
_PROBLEM_BYTES = SLOT_BYTES - _CHECK.size - _FIELDS.size
_CHANGES = {"device:revoke": DeviceStatus.REVOKED, "device:suspend": DeviceStatus.SUSPENDED}
_LOOKED_AT = 20  # audit entries of a device
ANSWER_SECONDS = 5.0  # for which one answer of the broker counts


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a reconciliation has proven of the changes after generation ``since`` up to ``generation``.

    ``at`` is when it read them from the database; ``problem`` is why it has failed.
    """

    since: int
    generation: int
    at: datetime
    proven: Mapping[Step, datetime]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StepsFile:
    """The newest attempts, each in the slot of its generation; one process writes at a time, and any reads."""

    path: Path

    def write(self, since: int, generation: int, at: float, seconds: Sequence[float], problem: str = "") -> None:
        """Write the slot of a generation; ``seconds`` are those of each step after ``at``, or not a number."""
        text = problem.encode()[:_PROBLEM_BYTES]
        body = _FIELDS.pack(since, generation, at, *seconds, len(text)) + text
        body = body.ljust(SLOT_BYTES - _CHECK.size, b"\0")
        with contextlib.suppress(OSError):  # what is proven does not depend on it
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, _CHECK.pack(zlib.crc32(body)) + body, generation % SLOTS * SLOT_BYTES)
            finally:
                os.close(descriptor)

    def read(self, generation: int) -> list[Attempt]:
        """Return the attempts that had a generation's changes to prove, oldest first; without those overwritten."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return []
        found = []
        for start in range(0, len(content) - SLOT_BYTES + 1, SLOT_BYTES):
            since, upto = struct.unpack_from("<QQ", content, start + _CHECK.size)
            if since < generation <= upto:
                attempt = _attempt(content[start : start + SLOT_BYTES])
                found += [] if attempt is None else [attempt]
        return sorted(found, key=lambda attempt: attempt.generation)

    def newest_of(self, generation: int) -> Attempt | None:
        """Return the last attempt to reach exactly this generation, ``None`` if it is not known."""
        try:
            with self.path.open("rb") as file:
                slot = os.pread(file.fileno(), SLOT_BYTES, generation % SLOTS * SLOT_BYTES)
        except OSError:
            return None
        found = _attempt(slot) if len(slot) == SLOT_BYTES else None
        return found if found is not None and found.generation == generation else None


def _attempt(slot: bytes) -> Attempt | None:
    body = slot[_CHECK.size :]
    if _CHECK.unpack_from(slot)[0] != zlib.crc32(body):
        return None  # it is being written
    since, generation, at, *seconds, length = _FIELDS.unpack_from(body)
    text = body[_FIELDS.size : _FIELDS.size + length].decode(errors="ignore")
    began = datetime.fromtimestamp(at, UTC)
    proven = {
        step: began + timedelta(seconds=after)
        for step, after in zip(Step, seconds, strict=True)
        if not math.isnan(after)
    }
    return Attempt(since, generation, began, proven, text)


@dataclass(slots=True)
class Progress:
    """Notes the steps of one reconciliation, which has read the changes just now.

    A repeat of one that has failed keeps the times of what that has proven.
    """

    _file: StepsFile
    since: int
    generation: int
    at: datetime
    _seconds: dict[Step, float] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        before = self._file.newest_of(self.generation)
        if before is not None and before.since == self.since and Step.ENFORCED not in before.proven:
            self._started -= (self.at - before.at).total_seconds()
            self.at = before.at
            self._seconds = {step: (at - before.at).total_seconds() for step, at in before.proven.items()}
        self._write("" if before is None else before.problem)

    def proven(self, *steps: Step) -> None:
        """Note that these steps were seen just now."""
        for step in steps:
            self._seconds.setdefault(step, time.monotonic() - self._started)
        self._write("")

    def failed(self, problem: str) -> None:
        """Note why it ends before the next step."""
        self._write(problem)

    def _write(self, problem: str) -> None:
        seconds = [self._seconds.get(step, math.nan) for step in Step]
        self._file.write(self.since, self.generation, self.at.timestamp(), seconds, problem)


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
    _file: StepsFile
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
        newest = next((entry for entry in entries if _is_told(entry)), None)
        is_enforced = device.generation <= state.applied_generation
        if newest is None or _CHANGES.get(newest.action) is not device.status:  # its topics have changed since
            recorded = device.revoked_at or device.updated_at
            problem = None if is_enforced else self._why_pending(device.generation)
            return Enforcement(device=device, recorded_at=recorded, proven={}, is_enforced=is_enforced, problem=problem)
        attempts = [one for one in self._file.read(device.generation) if one.at >= newest.at]
        found = self._taking_hold(newest.at, device.generation, attempts, is_enforced=is_enforced)
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
        is_enforced = generation <= self.applied_generation()
        attempts = self._file.read(generation)
        recorded_at = attempts[0].at if attempts else now
        return self._taking_hold(recorded_at, generation, attempts, is_enforced=is_enforced)

    def _taking_hold(
        self, recorded_at: datetime, generation: int, attempts: Sequence[Attempt], *, is_enforced: bool
    ) -> TakingHold:
        proven: dict[Step, datetime] = {}
        for attempt in attempts:
            for step, at in attempt.proven.items():
                proven.setdefault(step, at)
        if not is_enforced:  # what is recorded has the last word
            proven.pop(Step.ENFORCED, None)
        problem = attempts[-1].problem if attempts and not is_enforced else None
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
