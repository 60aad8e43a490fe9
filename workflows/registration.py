"""The use cases: register, update, revoke."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import db
from config import Settings
from core import metrics
from core.device_status import DeviceStatus, advance
from core.errors import ExternalIdTaken, StateConflict, Unavailable
from core.failpoints import failpoint
from core.topics import new_device_id
from store import bulk
from store.database import Database
from store.devices import update_device
from workflows import audit, events
from workflows.admission import Admission, admit, checked_topics
from workflows.audit import Actor
from workflows.credentials import CredentialAnswer, CredentialIssuer, DeviceRequest
from workflows.enforcement import Enforcement
from workflows.events import EventType
from workflows.idempotency import KeptAnswers, Sealed

log = logging.getLogger("portal.onboarding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered(CredentialAnswer):
    """The answer to a registration."""

    issued_at: datetime
    name: str
    status: str


@dataclass(frozen=True, slots=True)
class Revoked:
    """The answer to a revocation: whether the broker was seen to refuse the device, or the ``problem`` that remains."""

    device_id: str
    revoked_at: datetime
    reason: str
    enforced: bool
    problem: str | None


class Onboarding:
    """What is done to devices; every way in (REST, later EST, bulk, web) goes through here."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        enforcement: Enforcement,
        credentials: CredentialIssuer,
        *,
        pepper: bytes,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._database = database
        self._enforcement = enforcement
        self._credentials = credentials
        self._answers = KeptAnswers(database, pepper, clock)
        self._clock = clock

    # --- Register

    def register(self, actor: Actor, request: DeviceRequest, idempotency_key: str | None = None) -> Registered:
        """Register a device, once however often the same ``idempotency_key`` comes within 24 hours.

        Raises ``InputInvalid`` (``CsrInvalid``, ``TopicRefused``), ``IdempotencyConflict``, ``ExternalIdTaken``,
        ``Unavailable``.
        """
        sealed = self._answers.seal(actor.tenant_id, idempotency_key, _canonical(request)) if idempotency_key else None
        try:
            answer, generation = self._answers.once(
                sealed, Registered.from_json, lambda: self._register(actor, request, sealed)
            )
        except IntegrityError:
            if request.external_id is not None:
                with self._database.snapshot() as tx:
                    self._check_free(tx, actor.tenant_id, request.external_id)
            raise
        if answer.certificate is not None:
            self.wait_until_granted(generation)
        elif generation:
            self._enforcement.wake()
        failpoint("register.before_answer")
        return answer

    @staticmethod
    def _check_free(tx: Connection, tenant_id: str, external_id: str) -> None:
        device_id = bulk.owner_of(tx, tenant_id, external_id)
        if device_id is not None:
            raise ExternalIdTaken(f"The external_id is that of device {device_id}; leave it out or give another.")

    def _register(self, actor: Actor, request: DeviceRequest, sealed: Sealed | None) -> tuple[Registered, int]:
        now = self._clock()
        device_id = new_device_id(now)
        topics = checked_topics(self._settings, request.topics, device_id)
        issued = self._credentials.issue(device_id, request, topics, now=now)
        with_csr = issued.bundle is None
        answer = Registered.of(issued, issued_at=now, name=request.name, status=DeviceStatus.ACTIVE)
        admission = Admission(
            credentials=issued,
            name=request.name,
            event=EventType.REGISTERED,
            action="device:register",
            detail={"key": "csr" if with_csr else "made here"},
            request=request,
            topics=topics,
        )

        def record(tx: Connection) -> int:
            if request.external_id is not None:
                self._check_free(tx, actor.tenant_id, request.external_id)
            admitted = admit(tx, actor, [admission], style=self._settings.acl_style, now=now)
            if sealed is not None:
                self._answers.keep(tx, sealed, answer.to_json(), generation=admitted.generation)
            failpoint("register.before_commit")
            return admitted.generation

        generation = self._database.write(record)
        metrics.registered(with_csr=with_csr)
        failpoint("register.after_commit")
        return answer, generation

    # --- Update

    def update(self, actor: Actor, device_id: str, values: Mapping[str, Any], topics: Any = ...) -> None:
        """Change what is known of a device; ``topics`` as in a registration, left out to keep them.

        Raises ``DeviceNotFound``, ``StateConflict`` for a revoked device, ``TopicRefused``.
        """
        now = self._clock()
        checked = None if topics is ... else checked_topics(self._settings, topics, device_id)
        generation = 0
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            if device.status is DeviceStatus.REVOKED:
                raise StateConflict("The device is revoked, which is final; register it anew to change it.")
            update_device(tx, actor.tenant_id, device_id, {**values, "updated_at": now})
            if topics is not ...:
                generation = db.next_generation(tx, actor.tenant_id, at=now)
                pairs = None if checked is None else [(topic.filter, topic.access) for topic in checked]
                db.replace_topics(tx, actor.tenant_id, device_id, pairs, generation=generation)
            changed = sorted(values) + ([] if topics is ... else ["topics"])
            audit.record(tx, actor, "device:update", f"device:{device_id}", at=now, changed=changed)
        if generation:
            self._enforcement.apply(generation)  # taking topics away is a revocation: it does not lag

    # --- Revoke

    def revoke(self, actor: Actor, device_id: str, reason: str) -> Revoked:
        """Put a device out for good; a repeat gives the first answer's time and reason.

        Returns once the broker was seen to refuse it, or once that failed. Raises ``DeviceNotFound``.
        """
        started, now = time.monotonic(), self._clock()
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            repeated = device.status is DeviceStatus.REVOKED
            if repeated:
                generation, revoked_at, reason = (
                    device.generation,
                    device.revoked_at,
                    device.revocation_reason or reason,
                )
            else:
                advance(device.status, DeviceStatus.REVOKED)
                generation, revoked_at = db.next_generation(tx, actor.tenant_id, at=now), now
                db.revoke_device(tx, actor.tenant_id, device_id, revoked_at=now, reason=reason, generation=generation)
                events.record(tx, actor.tenant_id, EventType.REVOKED, device_id, at=now, reason=reason)
                audit.record(tx, actor, "device:revoke", f"device:{device_id}", at=now, reason=reason)
            failpoint("revoke.before_commit")
        failpoint("revoke.after_commit")
        if not repeated:
            metrics.revoked()
        outcome = self._enforcement.apply(generation)
        enforced = outcome.covers(generation)
        if enforced and not repeated:
            metrics.enforced(time.monotonic() - started)
        if not enforced:
            log.error(
                "a revocation is not enforced by the broker yet",
                extra={"device_id": device_id, "problem": outcome.problem},
            )
        return Revoked(device_id, revoked_at or now, reason, enforced, None if enforced else outcome.problem)

    # --- Credentials that are about to leave

    def wait_until_granted(self, generation: int) -> None:
        """Return once credentials made at ``generation`` will work; raises ``Unavailable`` where that takes too long.

        A broker that is not running will read the files at its start, so for it they are enough.
        """
        outcome = self._enforcement.apply(generation)
        if outcome.covers(generation):
            return
        if outcome.installed >= generation and not self._enforcement.broker_answers():
            return
        raise Unavailable("The device is registered, but the broker does not know it yet; try again in a few seconds.")


def _canonical(request: DeviceRequest) -> bytes:
    values = dataclasses.asdict(dataclasses.replace(request, csr=None))
    values["csr"] = request.csr and request.csr.pem
    if values["external_id"] is None:
        del values["external_id"]  # as in answers kept by a portal that did not know the field
    return json.dumps(values, sort_keys=True, default=list).encode()
