"""The use cases of a device that enrols by itself: let in by a token, or by the certificate it was born with."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import db
from config import Settings
from core import metrics
from core.device_status import DeviceStatus, advance
from core.errors import EnrolmentRefused, KeyRefused, StateConflict, Unavailable
from core.failpoints import failpoint
from core.setting_values import AclStyle
from core.states import Approval, EnrolmentStatus, ManufacturerStatus
from core.topics import new_device_id
from pki.est import EnrolmentRequest
from store import certificates
from store import enrolment as store_enrolment
from store.database import Database
from store.devices import update_device
from store.enrolment import EnrolmentProfile, EnrolmentRecord
from workflows import audit
from workflows.audit import Actor
from workflows.credentials import CredentialMaker, Made
from workflows.enrolment.means import AskedMeanwhile, Enrolled, Issued, Means, Waiting
from workflows.enrolment.reenrolment import EXPIRED, REVOKED, UNREGISTERED, Reenrolment, make, record_enrolled
from workflows.registration import Onboarding

_TRIES = 3
_UNFIT_FOR_A_NAME = re.compile(r"[^A-Za-z0-9._:/+-]+")


class Enrolment:
    """Answers the same however often a device asks, so that an answer that was lost costs it nothing."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        onboarding: Onboarding,
        credentials: CredentialMaker,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._database = database
        self._onboarding = onboarding
        self._credentials = credentials
        self._clock = clock
        self._reenrolment = Reenrolment(database, onboarding, credentials, clock)

    def enrol(self, actor: Actor, means: Means, request: EnrolmentRequest) -> Enrolled | Waiting:
        """Certify the key of a device's CSR, or one made for it, or have it wait, as the terms of its ``means`` say.

        A key that is made here is in the answer and nowhere else. Raises ``EnrolmentRefused``, ``KeyRefused``,
        ``StateConflict``, ``TooManyAttempts``, ``Unavailable``.
        """
        _check_key_type(request, means.terms)
        outcome = self._once(actor, means, request)
        if isinstance(outcome, Waiting):
            return outcome
        failpoint("enrol.after_commit")
        self._onboarding.wait_until_granted(outcome.generation)
        return Enrolled(outcome.device_id, outcome.certificate, outcome.key)

    def check_renewal_key(self, tenant_id: str, device_id: str, request: EnrolmentRequest) -> None:
        """Raise ``KeyRefused`` for a kind of key that is not allowed by what has let the device in."""
        with self._database.snapshot() as tx:
            enrolment = store_enrolment.last_enrolment(tx, tenant_id, device_id)
            if enrolment is None:
                return
            if enrolment.token_id is not None:
                terms = store_enrolment.get_enrolment_token(tx, tenant_id, enrolment.token_id).terms
            else:
                terms = store_enrolment.get_manufacturer(tx, tenant_id, enrolment.manufacturer_id or "").terms
        _check_key_type(request, terms)

    def _once(self, actor: Actor, means: Means, request: EnrolmentRequest) -> Issued | Waiting:
        for _ in range(_TRIES):
            with self._database.snapshot() as tx:
                known = self._find(tx, means)
            try:
                if known is None:
                    return self._first(actor, means, request)
                return self._again(actor, means, request, known)
            except (IntegrityError, AskedMeanwhile):
                continue  # of two requests of one device the database let one through: look at what that has made
        raise Unavailable("The device has asked several times at once; try again in a few seconds.")

    def _find(self, tx: Connection, means: Means) -> EnrolmentRecord | None:
        return store_enrolment.find_enrolment(
            tx,
            means.tenant_id,
            token_id=means.token_id,
            manufacturer_id=means.manufacturer_id,
            identity=means.identity,
        )

    # --- The first time

    def _first(self, actor: Actor, means: Means, request: EnrolmentRequest) -> Issued | Waiting:
        now = self._clock()
        device_id = means.device_id or new_device_id(now)
        at_once = means.terms.approval is Approval.AT_ONCE
        made = make(self._credentials, device_id, means, request, now) if at_once else None

        def record(tx: Connection) -> int:
            number = self._admit(tx, means, now)
            if means.device_id is None:
                self._add_device(tx, means, device_id, number, now)
            elif db.get_device(tx, means.tenant_id, device_id, for_update=True).status is not DeviceStatus.PENDING:
                raise EnrolmentRefused("The device that the enrolment token is for is not waiting to enrol any more.")
            generation, certificate_id = 0, None
            if made is not None:
                # Under the pattern style a new device with the default topics is let in with no word to the broker.
                told = means.device_id is not None or self._settings.acl_style is AclStyle.PER_DEVICE
                generation, certificate_id = self._let_in(tx, means, device_id, made, now, told=told)
            store_enrolment.add_enrolment(
                tx,
                means.tenant_id,
                device_id=device_id,
                token_id=means.token_id,
                manufacturer_id=means.manufacturer_id,
                identity=means.identity,
                key_fingerprint=request.key_fingerprint,
                status=EnrolmentStatus.WAITING if made is None else EnrolmentStatus.ISSUED,
                created_at=now,
                decided_at=None if made is None else now,
                certificate_id=certificate_id,
            )
            self._record(tx, actor, device_id, request, made, now)
            failpoint("enrol.before_commit")
            return generation

        generation = self._database.write(record)
        if made is None:
            return Waiting(device_id)
        metrics.registered(with_csr=not request.key_made_here)
        return Issued(device_id, made.issued.der, generation, made.key)

    def _admit(self, tx: Connection, means: Means, now: datetime) -> int:
        """Check that the token or manufacturer still lets devices in, and count; returns the device's number.

        From here on no other device can come by the same one until the transaction ends.
        """
        if means.token_id is None:
            self._check_manufacturer(tx, means)
        else:
            token = store_enrolment.lock_enrolment_token(tx, means.tenant_id, means.token_id)
        if self._find(tx, means) is not None:
            raise AskedMeanwhile
        if means.token_id is None:
            return 0
        if token.revoked_at is not None:
            raise EnrolmentRefused(REVOKED)
        if token.expires_at <= now:
            raise EnrolmentRefused(EXPIRED)
        if token.uses >= token.uses_allowed:
            raise EnrolmentRefused("The enrolment token is used up; ask an operator for another one.")
        store_enrolment.count_use(tx, means.tenant_id, means.token_id)
        return token.uses + 1

    def _check_manufacturer(self, tx: Connection, means: Means) -> None:
        record = store_enrolment.get_manufacturer(tx, means.tenant_id, means.manufacturer_id or "", for_update=True)
        if record.status is not ManufacturerStatus.REGISTERED:
            raise EnrolmentRefused(UNREGISTERED)

    def _add_device(self, tx: Connection, means: Means, device_id: str, number: int, now: datetime) -> None:
        serial = _UNFIT_FOR_A_NAME.sub("-", means.serial).strip("-") or means.identity[:12]
        name = means.terms.name_template.replace("{number}", str(number)).replace("{serial}", serial)
        db.add_device(
            tx,
            tenant_id=means.tenant_id,
            device_id=device_id,
            name=name[:128].rstrip(),
            type=means.terms.type,
            location=means.terms.location,
            firmware=means.terms.firmware,
            metadata={},
            status=DeviceStatus.PENDING,
            topics=None,
            created_at=now,
            generation=0,
        )

    # --- Again

    def _again(self, actor: Actor, means: Means, request: EnrolmentRequest, known: EnrolmentRecord) -> Issued | Waiting:
        with self._database.snapshot() as tx:
            if means.token_id is not None:
                token = store_enrolment.get_enrolment_token(tx, means.tenant_id, means.token_id)
                if token.revoked_at is not None:
                    raise EnrolmentRefused(REVOKED)
            device = db.get_device(tx, means.tenant_id, known.device_id)
            certificate = None
            if known.certificate_id is not None:
                certificate = certificates.get_certificate(tx, means.tenant_id, known.certificate_id)
        if known.status is EnrolmentStatus.REJECTED or device.status in (DeviceStatus.REVOKED, DeviceStatus.SUSPENDED):
            raise EnrolmentRefused("The device has been rejected, revoked or suspended by an operator.")
        if certificate is not None:
            return self._reenrolment.answer(actor, means, request, known, device, certificate)
        if known.status is EnrolmentStatus.APPROVED:
            return self._issue_approved(actor, means, request, known)
        if known.key_fingerprint != request.key_fingerprint:
            with self._database.transaction() as tx:
                key = request.key_fingerprint
                store_enrolment.update_enrolment(tx, means.tenant_id, known.id, key_fingerprint=key)
        return Waiting(device.id)

    def _issue_approved(
        self, actor: Actor, means: Means, request: EnrolmentRequest, known: EnrolmentRecord
    ) -> Issued | Waiting:
        now = self._clock()
        if known.key_fingerprint != request.key_fingerprint:
            raise StateConflict("An operator has approved another key of this device; ask with that one.")
        made = make(self._credentials, known.device_id, means, request, now)

        def record(tx: Connection) -> int:
            device = db.get_device(tx, means.tenant_id, known.device_id, for_update=True)
            if means.manufacturer_id is not None:
                self._check_manufacturer(tx, means)
            if device.status is not DeviceStatus.PENDING:
                raise EnrolmentRefused("The device is not waiting to enrol any more.")
            generation, certificate_id = self._let_in(tx, means, known.device_id, made, now, told=True)
            store_enrolment.update_enrolment(
                tx, means.tenant_id, known.id, status=EnrolmentStatus.ISSUED, certificate_id=certificate_id
            )
            self._record(tx, actor, known.device_id, request, made, now)
            return generation

        generation = self._database.write(record)
        metrics.registered(with_csr=not request.key_made_here)
        return Issued(known.device_id, made.issued.der, generation, made.key)

    # --- What both do

    def _let_in(
        self, tx: Connection, means: Means, device_id: str, made: Made, now: datetime, *, told: bool
    ) -> tuple[int, int]:
        """Make a pending device active with its certificate; returns the generation and the certificate's id."""
        generation = db.next_generation(tx, means.tenant_id, at=now) if told else 0
        status = advance(DeviceStatus.PENDING, DeviceStatus.ACTIVE)
        values = {"status": status, "generation": generation, "updated_at": now}
        update_device(tx, means.tenant_id, device_id, values)
        return generation, self._credentials.record(tx, means.tenant_id, device_id, made, now=now)

    def _record(
        self, tx: Connection, actor: Actor, device_id: str, request: EnrolmentRequest, made: Made | None, now: datetime
    ) -> None:
        if made is not None:
            record_enrolled(tx, actor, "device:enrol", device_id, request, made, now)
        else:
            key = request.key_fingerprint
            audit.record(tx, actor, "device:ask", f"device:{device_id}", at=now, key_fingerprint=key)


def _check_key_type(request: EnrolmentRequest, terms: EnrolmentProfile) -> None:
    if not request.key_made_here and request.key_type not in terms.key_types:
        allowed = ", ".join(terms.key_types)
        raise KeyRefused(f"The CSR is for a key of the kind {request.key_type}; make one of: {allowed}.")
