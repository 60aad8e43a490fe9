"""The use cases around devices that are known and have no certificate yet: make known, approve, reject."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime

from sqlalchemy.engine import Connection

import audit
import db
import db_enrolment
import events
from audit import Actor
from db import Database, DeviceRecord
from db_enrolment import EnrolmentRecord
from errors import NotFound, StateConflict
from events import EventType
from lifecycle import DeviceStatus
from onboarding import Onboarding
from onboarding_terms import Registration

REJECTED = "privilege_withdrawn"  # the reason, of RFC 5280 section 5.3.1, that a rejected device is revoked with


class Approvals:
    """What an operator decides about pending devices."""

    def __init__(self, database: Database, onboarding: Onboarding, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._onboarding = onboarding
        self._clock = clock

    def expect(self, actor: Actor, wanted: Registration) -> str:
        """Make a device known that is to enrol by itself, and return its id; raises ``TopicRefused``."""
        now = self._clock()
        device_id = str(uuid.uuid4())
        topics = self._onboarding.check_topics(wanted.topics, device_id)
        with self._database.transaction() as tx:
            db.add_device(
                tx,
                tenant_id=actor.tenant_id,
                device_id=device_id,
                name=wanted.name,
                type=wanted.type,
                location=wanted.location,
                firmware=wanted.firmware,
                metadata=dict(wanted.metadata),
                status=DeviceStatus.PENDING,
                topics=None if topics is None else [(topic.filter, topic.access) for topic in topics],
                created_at=now,
                generation=0,
            )
            audit.record(tx, actor, "device:expect", f"device:{device_id}", at=now)
        return device_id

    def approve(self, actor: Actor, device_id: str) -> None:
        """Let a device in that has asked: it gets its certificate when it asks again. A repeat changes nothing.

        Raises ``DeviceNotFound``, ``StateConflict`` where the device is not pending or has not asked.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            self._pending(tx, actor.tenant_id, device_id, "approved")
            enrolment = db_enrolment.last_enrolment(tx, actor.tenant_id, device_id)
            if enrolment is None:
                raise StateConflict(
                    "The device has not asked to be let in yet; give it an enrolment token, which lets it in at once."
                )
            if enrolment.status == "waiting":
                db_enrolment.update_enrolment(tx, actor.tenant_id, enrolment.id, status="approved", decided_at=now)
                key = enrolment.key_fingerprint
                audit.record(tx, actor, "device:approve", f"device:{device_id}", at=now, key_fingerprint=key)

    def reject(self, actor: Actor, device_id: str) -> None:
        """Put a pending device out for good; a repeat changes nothing.

        Raises ``DeviceNotFound``, ``StateConflict`` where the device is not pending.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            if device.status is DeviceStatus.REVOKED and device.revocation_reason == REJECTED:
                return
            device = self._pending(tx, actor.tenant_id, device_id, "rejected")
            enrolment = db_enrolment.last_enrolment(tx, actor.tenant_id, device_id)
            if enrolment is not None:
                db_enrolment.update_enrolment(tx, actor.tenant_id, enrolment.id, status="rejected", decided_at=now)
            # The broker has never been told to let it in, so there is nothing to tell it now.
            db.revoke_device(
                tx, actor.tenant_id, device_id, revoked_at=now, reason=REJECTED, generation=device.generation
            )
            events.record(tx, actor.tenant_id, EventType.REVOKED, device_id, at=now, reason=REJECTED)
            audit.record(tx, actor, "device:reject", f"device:{device_id}", at=now)

    def _pending(self, tx: Connection, tenant_id: str, device_id: str, wanted: str) -> DeviceRecord:
        device = db.get_device(tx, tenant_id, device_id, for_update=True)
        if device.status is not DeviceStatus.PENDING:
            raise StateConflict(f"The device is {device.status}; only one that is pending can be {wanted}.")
        return device

    def request_of(self, tenant_id: str, device_id: str) -> EnrolmentRecord:
        """What a device has asked for last; raises ``DeviceNotFound``, ``NotFound`` where it never has."""
        with self._database.snapshot() as tx:
            db.get_device(tx, tenant_id, device_id)
            enrolment = db_enrolment.last_enrolment(tx, tenant_id, device_id)
        if enrolment is None:
            raise NotFound("The device has never asked to be let in.")
        return enrolment
