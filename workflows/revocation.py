"""The use cases that take devices from the broker: revocation, which is final, and suspension, with the way back."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, TypeVar

from sqlalchemy.engine import Connection

import db
from core import metrics
from core.errors import StateConflict
from core.failpoints import failpoint
from core.states import ClientKind, DeviceStatus, advance
from pki.issuers import Reason
from store import devices
from store.audit import Actor
from store.database import Database
from store.devices import DeviceRecord
from store.quotas import count_clients
from workflows import events
from workflows.changes import ActionRefused, Changes, write_in_batches
from workflows.events import EventType
from workflows.reconciliation import Reconciler

log = logging.getLogger("portal.revocation")


class Action(StrEnum):
    """What can be done to the access of many devices at once."""

    REVOKE = "revoke"
    SUSPEND = "suspend"
    RESUME = "resume"


@dataclass(frozen=True, slots=True)
class Revoked:
    """The answer to a revocation: whether the broker was seen to refuse the device, or the ``problem`` that remains."""

    device_id: str
    revoked_at: datetime
    reason: str
    enforced: bool = False
    problem: str | None = None
    repeated: bool = field(default=False, compare=False)  # it was revoked before
    generation: int = field(default=0, compare=False)  # the one that the broker must enforce


@dataclass(frozen=True, slots=True)
class Suspended:
    """The answer to suspension and resumption: whether the broker was seen to obey, or the ``problem`` that remains.

    ``suspended_at`` is ``None`` for an active device.
    """

    device_id: str
    status: DeviceStatus
    suspended_at: datetime | None
    enforced: bool = False
    problem: str | None = None
    repeated: bool = field(default=False, compare=False)  # it was so before
    generation: int = field(default=0, compare=False)  # the one that the broker must enforce


_Answer = TypeVar("_Answer", bound=Revoked | Suspended)
_A = TypeVar("_A", bound=Revoked | Suspended, covariant=True)


@dataclass(frozen=True, slots=True)
class _Written(Generic[_A]):
    """What was recorded, of which the broker may not know yet; ``repeated``: the device was as asked for before."""

    answer: _A
    generation: int
    repeated: bool


def _alone(
    tx: Connection, actor: Actor, now: datetime, change: Callable[[Changes], _Written[_Answer]]
) -> _Written[_Answer]:
    changes = Changes(tx, actor, now)
    written = change(changes)
    changes.end()
    return written


@dataclass(eq=False, repr=False)
class DeviceRevocations:
    """Revokes devices and applications, suspends and resumes devices.

    Each answer comes once the broker obeys, or has failed to; with ``waits=False`` at most a moment after the change is
    recorded, and whoever asked watches it take hold (``workflows/enforcement.py``).
    """

    _database: Database
    _reconciler: Reconciler
    _clock: Callable[[], datetime]

    def revoke(
        self,
        actor: Actor,
        device_id: str,
        reason: str,
        *,
        kind: ClientKind = ClientKind.DEVICE,
        waits: bool = True,
    ) -> Revoked:
        """Revoke a device or application for good, with its certificates and bundles.

        A repeat gives the first time, and the first reason unless the new one is worse. Raises ``DeviceNotFound``,
        ``ApplicationNotFound``.
        """
        started, now = time.monotonic(), self._clock()
        written = self._database.write(
            lambda tx: _alone(tx, actor, now, lambda changes: _revoke(changes, device_id, reason, kind))
        )
        failpoint("revoke.after_commit")
        answer = self._enforced([written], waits=waits)[0]
        _count(written, answer, started)
        return answer

    def suspend(self, actor: Actor, device_id: str, *, waits: bool = True) -> Suspended:
        """Put a device's certificates on hold and disconnect it, until it is resumed; may be repeated.

        Raises ``DeviceNotFound``, and ``StateConflict`` for a device that is revoked or has no certificate yet.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            written = _alone(tx, actor, now, lambda changes: _suspend(changes, device_id))
            failpoint("suspend.before_commit")
        failpoint("suspend.after_commit")
        return self._enforced([written], waits=waits)[0]

    def resume(self, actor: Actor, device_id: str) -> Suspended:
        """Make a suspended device active again, with the certificates that it had; may be repeated.

        Raises ``DeviceNotFound``, and ``StateConflict`` for a device that is revoked or was never active.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            written = _alone(tx, actor, now, lambda changes: _resume(changes, device_id))
            failpoint("resume.before_commit")
        failpoint("resume.after_commit")
        answer = self._enforced([written])[0]
        self._reconciler.crls.take_off()
        return answer

    def act(
        self, actor: Actor, action: Action, device_ids: Sequence[str], reason: str, *, waits: bool = True
    ) -> Iterator[Revoked | Suspended | ActionRefused]:
        """Do the same to many devices, with one reconciliation for all; yield an answer for each, in their order.

        One that is refused keeps none of the others from it. If the portal ends midway, the devices that were recorded
        are enforced at its next start; to repeat it all does no harm.
        """
        started, now, writer = time.monotonic(), self._clock(), _WRITERS[action]
        written, refused = write_in_batches(
            self._database, actor, now, device_ids, lambda changes, device_id: writer(changes, device_id, reason)
        )
        answers = dict(zip(written, self._enforced([*written.values()], waits=waits), strict=True))
        if action is Action.RESUME:
            self._reconciler.crls.take_off()
        for device_id, answer in answers.items():
            if isinstance(answer, Revoked):
                _count(written[device_id], answer, started)
        for device_id in device_ids:
            yield refused[device_id] if device_id in refused else answers[device_id]

    def _enforced(self, written: Sequence[_Written[_Answer]], *, waits: bool = True) -> list[_Answer]:
        """Have the broker obey; return the answers, which say whether it was seen to, or else the problem."""
        if not written:
            return []
        apply = self._reconciler.apply_everywhere if waits else self._reconciler.apply_soon
        outcome = apply(max(item.generation for item in written))
        answers = []
        for item in written:
            enforced = outcome.covers(item.generation)
            problem = None if enforced else outcome.problem
            repeated = item.repeated
            answer = dataclasses.replace(item.answer, enforced=enforced, problem=problem, repeated=repeated)
            answers.append(dataclasses.replace(answer, generation=item.generation))
        pending = [answer.device_id for answer in answers if not answer.enforced]
        if pending and outcome.problem is not None:
            log.error(
                "the broker does not enforce the new status of devices yet",
                extra={"device_id": pending[0], "devices": len(pending), "problem": outcome.problem},
            )
        return answers


# --- In a transaction: each raises before it writes anything ---------------------------------------------------------


def _revoke(changes: Changes, device_id: str, reason: str, kind: ClientKind = ClientKind.DEVICE) -> _Written[Revoked]:
    tx, now = changes.tx, changes.now
    device = db.get_device(tx, changes.tenant_id, device_id, kind=kind, for_update=True)
    if device.status is DeviceStatus.REVOKED:
        return _revoked_again(changes, device, reason)
    generation = changes.generation()
    db.revoke_device(tx, changes.tenant_id, device_id, revoked_at=now, reason=reason, generation=generation)
    events.record(tx, changes.tenant_id, EventType.REVOKED, device_id, kind=kind, at=now, reason=reason)
    count_clients(tx, changes.tenant_id, -1)
    changes.record(f"{kind}:revoke", device.name_in_audit, reason=reason)
    failpoint("revoke.before_commit")
    return _Written(Revoked(device_id, now, reason), generation, repeated=False)


def _revoked_again(changes: Changes, device: DeviceRecord, reason: str) -> _Written[Revoked]:
    """Keep what was recorded, but for a reason that is worse: whoever reads the CRL must learn of a stolen key."""
    tx, now = changes.tx, changes.now
    at, before = device.revoked_at or now, device.revocation_reason or Reason.UNSPECIFIED
    if not Reason(reason).is_worse_than(before):
        return _Written(Revoked(device.id, at, before), device.generation, repeated=True)
    generation = changes.generation()
    db.change_reason(tx, device, reason, at=now, generation=generation)
    events.record(tx, changes.tenant_id, EventType.REVOKED, device.id, kind=device.kind, at=now, reason=reason)
    changes.record(f"{device.kind}:revoke", device.name_in_audit, reason=reason, before=before)
    return _Written(Revoked(device.id, at, reason), generation, repeated=True)


def _suspend(changes: Changes, device_id: str) -> _Written[Suspended]:
    tx, now = changes.tx, changes.now
    device = db.get_device(tx, changes.tenant_id, device_id, for_update=True)
    generation, repeated = device.generation, device.status is DeviceStatus.SUSPENDED
    if not repeated:
        advance(device.status, DeviceStatus.SUSPENDED)
        generation = changes.generation()
        devices.suspend_device(tx, changes.tenant_id, device_id, suspended_at=now, generation=generation)
        events.record(tx, changes.tenant_id, EventType.SUSPENDED, device_id, at=now)
        changes.record("device:suspend", f"device:{device_id}")
    since = devices.suspended_since(tx, changes.tenant_id, device_id)
    return _Written(Suspended(device_id, DeviceStatus.SUSPENDED, since), generation, repeated)


def _resume(changes: Changes, device_id: str) -> _Written[Suspended]:
    tx, now = changes.tx, changes.now
    device = db.get_device(tx, changes.tenant_id, device_id, for_update=True)
    generation, repeated = device.generation, device.status is DeviceStatus.ACTIVE
    if not repeated:
        if device.status is DeviceStatus.PENDING:  # its certificate makes it active, nothing else
            raise StateConflict("A device that is pending cannot be resumed: it was never suspended.")
        advance(device.status, DeviceStatus.ACTIVE)
        generation = changes.generation()
        devices.resume_device(tx, changes.tenant_id, device_id, resumed_at=now, generation=generation)
        events.record(tx, changes.tenant_id, EventType.RESUMED, device_id, at=now)
        changes.record("device:resume", f"device:{device_id}")
    return _Written(Suspended(device_id, DeviceStatus.ACTIVE, None), generation, repeated)


_Writer = Callable[[Changes, str, str], _Written[Revoked | Suspended]]
_WRITERS: dict[Action, _Writer] = {
    Action.REVOKE: _revoke,
    Action.SUSPEND: lambda changes, device_id, _reason: _suspend(changes, device_id),
    Action.RESUME: lambda changes, device_id, _reason: _resume(changes, device_id),
}


def _count(written: _Written[Revoked | Suspended], answer: Revoked, started: float) -> None:
    if not written.repeated:
        metrics.counts.revocations.inc()
        if answer.enforced:
            metrics.counts.enforce_seconds.observe(time.monotonic() - started)
