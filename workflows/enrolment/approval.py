"""The use cases of devices that wait for an operator: expect, approve, reject, list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

import db
from config import Settings
from core.errors import NotFound, StateConflict
from core.states import DeviceStatus, EnrolmentStatus
from store import audit
from store import enrolment as store_enrolment
from store.audit import Actor
from store.database import Database
from store.devices import DeviceRecord
from store.enrolment import EnrolmentRecord, ReenrolmentRecord, WaitingDevice
from store.quotas import count_clients
from workflows import events, memberships
from workflows.admission import add_pending, checked_topics
from workflows.credentials import DeviceRequest
from workflows.events import EventType
from workflows.tenants import TenantDirectory

REJECTED = "privilege_withdrawn"  # the reason, of RFC 5280 section 5.3.1, that a rejected device is revoked with
MAX_LISTED = 1000
ASKING = ("device:ask", "device:ask_again")  # the actions of a device in the audit record
MAX_LOOKED_AT = 20  # entries about a device, newest first


@dataclass(eq=False, repr=False)
class Approvals:
    """Decides about devices that are pending, or ask for a certificate for another key."""

    _settings: Settings
    _database: Database
    _tenants: TenantDirectory
    _clock: Callable[[], datetime]

    def expect(self, actor: Actor, request: DeviceRequest) -> str:
        """Add a device that is to enrol by itself, and return its id.

        Raises ``ExternalIdTaken``, ``ProfileRefused``, ``TopicRefused``, ``QuotaReached``, ``InputInvalid`` for an
        unknown group, ``GroupsDisagree``, ``Forbidden``.
        """
        now = self._clock()
        device_id = db.new_device_id(now)
        tenant = self._tenants.of(actor.tenant_id)
        own, most = checked_topics(self._settings, tenant, request.topics, device_id), tenant.quotas.devices
        with self._database.transaction() as tx:
            of_device = memberships.find_groups(tx, actor, request.groups)
            members = {device_id: of_device} if of_device else {}
            for error in memberships.refusals(tx, actor.tenant_id, members).values():
                raise error
            topics, group_id = memberships.topics_of_new(own, of_device)
            add_pending(tx, actor.tenant_id, device_id, request, topics, most=most, now=now, topics_group_id=group_id)
            memberships.put_into_groups(tx, actor.tenant_id, members, now=now)
            audit.record(tx, actor, "device:expect", f"device:{device_id}", at=now)
            memberships.record_put(tx, actor, members, now=now)
        return device_id

    def approve(self, actor: Actor, device_id: str, key_fingerprint: str | None = None) -> DeviceStatus:
        """Approve a device that has asked: it gets its certificate when it asks again. A repeat changes nothing.

        An active device that asks with another key is given a certificate for that key, and its others are revoked.
        With a ``key_fingerprint`` only that key is approved. Returns the device's status. Raises ``DeviceNotFound``,
        and ``StateConflict`` if the device has not asked, or asks with another key.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            device, enrolment, asked = self._asked(tx, actor.tenant_id, device_id)
            if asked is None:
                self._check_pending(device, "approved")
            if enrolment is None:
                raise StateConflict(
                    "The device has not asked for a certificate yet; give it an enrolment token, which admits it at"
                    " once."
                )
            key = enrolment.key_fingerprint if asked is None else asked.key_fingerprint
            if key_fingerprint not in (None, key):
                raise StateConflict("The device asks with another key now; check that key before you approve it.")
            if asked is not None:
                if asked.status is EnrolmentStatus.REJECTED:
                    raise StateConflict("This key was rejected; the device has to ask with a new one.")
                self._decide(tx, actor, device_id, asked, EnrolmentStatus.APPROVED, now)
            elif enrolment.status is EnrolmentStatus.WAITING:
                store_enrolment.update_enrolment(
                    tx, actor.tenant_id, enrolment.id, status=EnrolmentStatus.APPROVED, decided_at=now
                )
                audit.record(tx, actor, "device:approve", f"device:{device_id}", at=now, key_fingerprint=key)
        return device.status

    def reject(
        self, actor: Actor, device_id: str, key_fingerprint: str | None = None, *, why: str | None = None
    ) -> DeviceStatus:
        """Revoke a pending device for good; a repeat changes nothing.

        If an active device asks with another key, only that key is rejected. With a ``key_fingerprint`` only that key
        is. ``why`` is for the audit record. Returns the device's status. Raises ``DeviceNotFound``, and
        ``StateConflict`` if the device has not asked, or asks with another key.
        """
        now, detail = self._clock(), {} if why is None else {"why": why}
        with self._database.transaction() as tx:
            device, enrolment, asked = self._asked(tx, actor.tenant_id, device_id)
            if device.status is DeviceStatus.REVOKED and device.revocation_reason == REJECTED:
                return device.status
            key = asked or enrolment
            if key_fingerprint is not None and key is not None and key.key_fingerprint != key_fingerprint:
                raise StateConflict("The device asks with another key now; look at that key before you reject it.")
            if asked is not None:
                if asked.status is EnrolmentStatus.APPROVED:
                    raise StateConflict("This key is approved already; suspend or revoke the device instead.")
                self._decide(tx, actor, device_id, asked, EnrolmentStatus.REJECTED, now, detail)
                return device.status
            self._check_pending(device, "rejected")
            if enrolment is not None:
                store_enrolment.update_enrolment(
                    tx, actor.tenant_id, enrolment.id, status=EnrolmentStatus.REJECTED, decided_at=now
                )
            # The broker never admitted it, so nothing changes there.
            db.revoke_device(
                tx, actor.tenant_id, device_id, revoked_at=now, reason=REJECTED, generation=device.generation
            )
            events.record(tx, actor.tenant_id, EventType.REVOKED, device_id, at=now, reason=REJECTED)
            count_clients(tx, actor.tenant_id, -1)
            audit.record(tx, actor, "device:reject", f"device:{device_id}", at=now, **detail)
        return DeviceStatus.REVOKED

    def _asked(
        self, tx: Connection, tenant_id: str, device_id: str
    ) -> tuple[DeviceRecord, EnrolmentRecord | None, ReenrolmentRecord | None]:
        """Return a device, locked, its enrolment, and the other key that it asks for while it is active, if it does."""
        device = db.get_device(tx, tenant_id, device_id, for_update=True)
        enrolment = store_enrolment.last_enrolment(tx, tenant_id, device_id)
        if enrolment is None or device.status is not DeviceStatus.ACTIVE:
            return device, enrolment, None
        return device, enrolment, store_enrolment.find_reenrolment(tx, tenant_id, enrolment.id)

    def _decide(
        self,
        tx: Connection,
        actor: Actor,
        device_id: str,
        asked: ReenrolmentRecord,
        status: EnrolmentStatus,
        now: datetime,
        detail: Mapping[str, str] | None = None,
    ) -> None:
        key = asked.key_fingerprint
        if store_enrolment.decide_reenrolment(
            tx, actor.tenant_id, asked.enrolment_id, key_fingerprint=key, status=status, decided_at=now
        ):
            action = "device:approve" if status is EnrolmentStatus.APPROVED else "device:reject"
            told: dict[str, Any] = {"key_fingerprint": key, "again": True, **(detail or {})}
            audit.record(tx, actor, action, f"device:{device_id}", at=now, **told)

    def _check_pending(self, device: DeviceRecord, wanted: str) -> None:
        if device.status is not DeviceStatus.PENDING:
            raise StateConflict(f"The device is {device.status}; only one that is pending can be {wanted}.")

    def request_of(self, tenant_id: str, device_id: str) -> tuple[EnrolmentRecord, ReenrolmentRecord | None]:
        """Return a device's enrolment, and the other key that it asks for now, if it does.

        Raises ``DeviceNotFound``, and ``NotFound`` if it has never asked.
        """
        with self._database.snapshot() as tx:
            db.get_device(tx, tenant_id, device_id)
            enrolment = store_enrolment.last_enrolment(tx, tenant_id, device_id)
            if enrolment is None:
                raise NotFound("The device has never asked for a certificate.")
            return enrolment, store_enrolment.find_reenrolment(tx, tenant_id, enrolment.id)

    def asking(self, tenant_id: str) -> Sequence[WaitingDevice]:
        """Return the devices that wait for an operator, the longest waiting first, at most a thousand."""
        with self._database.snapshot() as tx:
            first = store_enrolment.waiting_enrolments(tx, tenant_id, limit=MAX_LISTED)
            again = store_enrolment.waiting_reenrolments(tx, tenant_id, limit=MAX_LISTED)
        return sorted((*first, *again), key=lambda asking: asking.asked_at)[:MAX_LISTED]

    def addresses(self, tenant_id: str, device_ids: Sequence[str]) -> Mapping[str, str]:
        """Return from which address each device has asked last, by its id; those are left out that have not."""
        found: dict[str, str] = {}
        with self._database.snapshot() as tx:
            for device_id in device_ids:
                of = {"object": f"device:{device_id}"}
                entries = audit.list_audit_entries(tx, tenant_id, limit=MAX_LOOKED_AT, filters=of)
                asked = [one.address for one in entries if one.action in ASKING]
                if asked:
                    found[device_id] = asked[0]
        return found
