"""The use cases that take a device from the broker: revocation, which is final, and suspension, with the way back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

import db
from core import metrics
from core.errors import StateConflict
from core.failpoints import failpoint
from core.states import DeviceStatus, advance
from store import audit, devices
from store.audit import Actor
from store.database import Database
from workflows import events
from workflows.events import EventType
from workflows.reconciliation import Reconciler

log = logging.getLogger("portal.revocation")


@dataclass(frozen=True, slots=True)
class Revoked:
    """The answer to a revocation: whether the broker was seen to refuse the device, or the ``problem`` that remains."""

    device_id: str
    revoked_at: datetime
    reason: str
    enforced: bool
    problem: str | None


@dataclass(frozen=True, slots=True)
class Suspended:
    """The answer to suspension and resumption: whether the broker was seen to obey, or the ``problem`` that remains.

    ``suspended_at`` is ``None`` for an active device.
    """

    device_id: str
    status: DeviceStatus
    suspended_at: datetime | None
    enforced: bool
    problem: str | None


@dataclass(eq=False, repr=False)
class DeviceRevocations:
    """Revokes, suspends and resumes devices; each answer comes once the broker obeys, or has failed to."""

    _database: Database
    _reconciler: Reconciler
    _clock: Callable[[], datetime]

    def revoke(self, actor: Actor, device_id: str, reason: str) -> Revoked:
        """Revoke a device for good, with its certificates and bundles; a repeat gives the first time and reason.

        Raises ``DeviceNotFound``.
        """
        started, now = time.monotonic(), self._clock()

        def write(tx: Connection) -> tuple[bool, int, datetime, str]:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            if device.status is DeviceStatus.REVOKED:
                return True, device.generation, device.revoked_at or now, device.revocation_reason or reason
            generation = db.next_generation(tx, actor.tenant_id, at=now)
            db.revoke_device(tx, actor.tenant_id, device_id, revoked_at=now, reason=reason, generation=generation)
            events.record(tx, actor.tenant_id, EventType.REVOKED, device_id, at=now, reason=reason)
            audit.record(tx, actor, "device:revoke", f"device:{device_id}", at=now, reason=reason)
            failpoint("revoke.before_commit")
            return False, generation, now, reason

        repeated, generation, revoked_at, given = self._database.write(write)
        failpoint("revoke.after_commit")
        if not repeated:
            metrics.counts.revocations.inc()
        enforced, problem = self._apply(device_id, DeviceStatus.REVOKED, generation)
        if enforced and not repeated:
            metrics.counts.enforce_seconds.observe(time.monotonic() - started)
        return Revoked(device_id, revoked_at, given, enforced, problem)

    def suspend(self, actor: Actor, device_id: str) -> Suspended:
        """Put a device's certificates on hold and disconnect it, until it is resumed; may be repeated.

        Raises ``DeviceNotFound``, and ``StateConflict`` for a device that is revoked or has no certificate yet.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            generation = device.generation
            if device.status is not DeviceStatus.SUSPENDED:
                advance(device.status, DeviceStatus.SUSPENDED)
                generation = db.next_generation(tx, actor.tenant_id, at=now)
                devices.suspend_device(tx, actor.tenant_id, device_id, suspended_at=now, generation=generation)
                events.record(tx, actor.tenant_id, EventType.SUSPENDED, device_id, at=now)
                audit.record(tx, actor, "device:suspend", f"device:{device_id}", at=now)
            since = devices.suspended_since(tx, actor.tenant_id, device_id)
            failpoint("suspend.before_commit")
        failpoint("suspend.after_commit")
        enforced, problem = self._apply(device_id, DeviceStatus.SUSPENDED, generation)
        return Suspended(device_id, DeviceStatus.SUSPENDED, since, enforced, problem)

    def resume(self, actor: Actor, device_id: str) -> Suspended:
        """Make a suspended device active again, with the certificates that it had; may be repeated.

        Raises ``DeviceNotFound``, and ``StateConflict`` for a device that is revoked or was never active.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            generation = device.generation
            if device.status is not DeviceStatus.ACTIVE:
                if device.status is DeviceStatus.PENDING:  # its certificate makes it active, nothing else
                    raise StateConflict("A device that is pending cannot be resumed: it was never suspended.")
                advance(device.status, DeviceStatus.ACTIVE)
                generation = db.next_generation(tx, actor.tenant_id, at=now)
                devices.resume_device(tx, actor.tenant_id, device_id, resumed_at=now, generation=generation)
                events.record(tx, actor.tenant_id, EventType.RESUMED, device_id, at=now)
                audit.record(tx, actor, "device:resume", f"device:{device_id}", at=now)
            failpoint("resume.before_commit")
        failpoint("resume.after_commit")
        enforced, problem = self._apply(device_id, DeviceStatus.ACTIVE, generation)
        return Suspended(device_id, DeviceStatus.ACTIVE, None, enforced, problem)

    def _apply(self, device_id: str, status: DeviceStatus, generation: int) -> tuple[bool, str | None]:
        """Have the broker obey; returns whether it was seen to, else the problem."""
        outcome = self._reconciler.apply(generation)
        if outcome.covers(generation):
            return True, None
        log.error(
            "the broker does not enforce a device's new status yet",
            extra={"device_id": device_id, "status": status, "problem": outcome.problem},
        )
        return False, outcome.problem
