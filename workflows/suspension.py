"""The use cases of suspending a device and of letting it back in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import db
from core.device_status import DeviceStatus, advance
from core.failpoints import failpoint
from store import devices
from store.database import Database
from workflows import audit, events
from workflows.audit import Actor
from workflows.enforcement import Enforcement
from workflows.events import EventType

log = logging.getLogger("portal.onboarding")


@dataclass(frozen=True, slots=True)
class Suspended:
    """The answer to both: whether the broker was seen to obey, or the ``problem`` that remains.

    ``suspended_at`` is ``None`` for a device that is in.
    """

    device_id: str
    status: DeviceStatus
    suspended_at: datetime | None
    enforced: bool
    problem: str | None


class Suspensions:
    """Parks a device that is lost, and brings it back when it is found."""

    def __init__(self, database: Database, enforcement: Enforcement, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._enforcement = enforcement
        self._clock = clock

    def suspend(self, actor: Actor, device_id: str) -> Suspended:
        """Put a device out until it is resumed: its certificates are on hold, its session is cut; may be repeated.

        Returns once the broker was seen to refuse it, or once that failed. Raises ``DeviceNotFound``, and
        ``StateConflict`` for a device that is revoked or has no certificate yet.
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
        return self._applied(device_id, DeviceStatus.SUSPENDED, since, generation)

    def resume(self, actor: Actor, device_id: str) -> Suspended:
        """Let a suspended device back in, with the certificates that it had; may be repeated.

        Raises ``DeviceNotFound``, and ``StateConflict`` for a device that is revoked or was never in.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            generation = device.generation
            if device.status is not DeviceStatus.ACTIVE:
                if device.status is not DeviceStatus.SUSPENDED:
                    advance(device.status, DeviceStatus.SUSPENDED)  # which says why it cannot be
                generation = db.next_generation(tx, actor.tenant_id, at=now)
                devices.resume_device(tx, actor.tenant_id, device_id, resumed_at=now, generation=generation)
                events.record(tx, actor.tenant_id, EventType.RESUMED, device_id, at=now)
                audit.record(tx, actor, "device:resume", f"device:{device_id}", at=now)
            failpoint("resume.before_commit")
        failpoint("resume.after_commit")
        return self._applied(device_id, DeviceStatus.ACTIVE, None, generation)

    def _applied(self, device_id: str, status: DeviceStatus, since: datetime | None, generation: int) -> Suspended:
        outcome = self._enforcement.apply(generation)
        enforced = outcome.covers(generation)
        if not enforced:
            log.error(
                "the broker does not know yet that a device was suspended or resumed",
                extra={"device_id": device_id, "status": status, "problem": outcome.problem},
            )
        return Suspended(device_id, status, since, enforced, None if enforced else outcome.problem)
