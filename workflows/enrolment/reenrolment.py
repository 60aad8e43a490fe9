"""The use cases of a device that enrols though it has a certificate: its answer was lost, or it was reset."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

import db
from core import metrics
from core.device_status import DeviceStatus
from core.errors import EnrolmentRefused, StateConflict, TooManyAttempts
from core.states import EnrolmentStatus, ManufacturerStatus
from pki.est import EnrolmentRequest, is_for_key
from store import certificates, enrolment, renewal
from store.certificates import CertificateRecord
from store.database import Database
from store.devices import DeviceRecord, update_device
from store.enrolment import EnrolmentRecord
from workflows import audit, events
from workflows.audit import Actor
from workflows.credentials import CredentialMaker, Made, Wanted
from workflows.enrolment.means import AskedMeanwhile, Issued, Means, Waiting
from workflows.events import EventType
from workflows.registration import Onboarding

# Each certificate that replaces another puts that one on the CRL; a device whose answers are lost asks again and again.
MOST_IN_A_DAY = 5
REVOKED = "The enrolment token was revoked; ask an operator for another one."
EXPIRED = "The enrolment token has expired; ask an operator for another one."
UNREGISTERED = "The CA of the client certificate is not registered here any more."


def make(credentials: CredentialMaker, device_id: str, means: Means, request: EnrolmentRequest, now: datetime) -> Made:
    """Certify the key of a device's CSR, or one that is made for it, of the kind that ``csrattrs`` names."""
    days = means.terms.validity_days
    if request.key_made_here:
        return credentials.make_with_key(device_id, means.terms.key_types[0], days, now=now)
    return credentials.make(device_id, Wanted(csr=request.pem, validity_days=days), None, now=now)


def record_enrolled(
    tx: Connection, actor: Actor, action: str, device_id: str, request: EnrolmentRequest, made: Made, now: datetime
) -> None:
    """Record event with audit entry of a device that has been given a certificate."""
    issued = made.issued
    events.record(
        tx, actor.tenant_id, EventType.ENROLLED, device_id, at=now, serial_number=issued.serial_number,
        fingerprint=issued.fingerprint, expires_at=issued.not_after,
    )  # fmt: skip
    key = {"key": "made here"} if request.key_made_here else {"key_fingerprint": request.key_fingerprint}
    audit.record(tx, actor, action, f"device:{device_id}", at=now, serial_number=issued.serial_number, **key)


class Reenrolment:
    """Decides what a device is answered that has enrolled before, and replaces its certificates where it may."""

    def __init__(
        self,
        database: Database,
        onboarding: Onboarding,
        credentials: CredentialMaker,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._onboarding = onboarding
        self._credentials = credentials
        self._clock = clock

    def answer(
        self,
        actor: Actor,
        means: Means,
        request: EnrolmentRequest,
        known: EnrolmentRecord,
        device: DeviceRecord,
        certificate: CertificateRecord,
    ) -> Issued | Waiting:
        """Give the same certificate for the same key. A device with another one waits for an operator.

        Raises ``EnrolmentRefused``, ``StateConflict``, ``TooManyAttempts``, ``Unavailable``.
        """
        own_key = is_for_key(certificate.der, known.key_fingerprint)
        if known.key_fingerprint == request.key_fingerprint and own_key is not request.key_made_here:
            if not request.key_made_here:
                if certificate.revoked_at is None and certificate.not_after > self._clock():
                    return Issued(device.id, certificate.der, device.generation)
            elif self._is_current(means, certificate):
                # Where the broker is what kept the answer back, another key would be kept back, too.
                self._onboarding.wait_until_granted(device.generation)
                return self._replace(actor, means, request, known, approved=False)
        if means.manufacturer_id is None:
            raise StateConflict(
                "The device has enrolled, and the certificate is over, renewed, or not for this key; make a new key,"
                " and ask an operator for another enrolment token."
            )
        return self._by_leave(actor, means, request, known)

    def _is_current(self, means: Means, certificate: CertificateRecord) -> bool:
        with self._database.snapshot() as tx:
            return renewal.is_current(tx, means.tenant_id, certificate.device_id or "", certificate.fingerprint)

    def _by_leave(
        self, actor: Actor, means: Means, request: EnrolmentRequest, known: EnrolmentRecord
    ) -> Issued | Waiting:
        """Have a device that comes with another key than before wait for an operator.

        Until then it is let in as before: whoever has taken a birth certificate out of a device cannot put that out.
        """
        key = request.key_fingerprint
        with self._database.snapshot() as tx:
            asked = enrolment.find_reenrolment(tx, means.tenant_id, known.id)
        if asked is None or asked.key_fingerprint != key:
            now = self._clock()
            with self._database.transaction() as tx:
                self._check_manufacturer(tx, means)
                enrolment.add_reenrolment(tx, means.tenant_id, known.id, key_fingerprint=key, asked_at=now)
                audit.record(tx, actor, "device:ask_again", f"device:{known.device_id}", at=now, key_fingerprint=key)
            return Waiting(known.device_id)
        if asked.status is EnrolmentStatus.REJECTED:
            raise EnrolmentRefused("An operator has turned this key of the device down; ask with a new key.")
        if asked.status is EnrolmentStatus.WAITING:
            return Waiting(known.device_id)
        return self._replace(actor, means, request, known, approved=True)

    def _replace(
        self, actor: Actor, means: Means, request: EnrolmentRequest, known: EnrolmentRecord, *, approved: bool
    ) -> Issued:
        """Give a device a certificate in the place of all that it has, which end at once: it has lost their keys."""
        now = self._clock()
        made = make(self._credentials, known.device_id, means, request, now)

        def record(tx: Connection) -> int:
            device = db.get_device(tx, means.tenant_id, known.device_id, for_update=True)
            self._check_means(tx, means, now)
            if device.status is not DeviceStatus.ACTIVE:
                raise EnrolmentRefused("The device has been revoked or suspended by an operator.")
            if approved:
                enrolment.use_reenrolment(tx, means.tenant_id, known.id, request.key_fingerprint)
            elif self._find(tx, means) != known:
                raise AskedMeanwhile
            since = now - timedelta(days=1)
            if certificates.count_issued(tx, means.tenant_id, known.device_id, since=since) >= MOST_IN_A_DAY:
                sentence = f"The device was given {MOST_IN_A_DAY} certificates within a day; ask again tomorrow."
                raise TooManyAttempts(sentence, retry_after=3600)
            generation = db.next_generation(tx, means.tenant_id, at=now)
            unfetched = renewal.unfetched(tx, means.tenant_id, known.device_id)
            renewal.drop_unfetched(tx, unfetched, now=now, generation=generation)
            renewal.replace_current(tx, means.tenant_id, known.device_id, until=now, ends_when_used=False)
            renewal.end_replaced(tx, means.tenant_id, known.device_id, now=now, generation=generation)
            update_device(tx, means.tenant_id, known.device_id, {"generation": generation, "updated_at": now})
            certificate_id = self._credentials.record(tx, means.tenant_id, known.device_id, made, now=now)
            values = {"key_fingerprint": request.key_fingerprint, "certificate_id": certificate_id}
            enrolment.update_enrolment(tx, means.tenant_id, known.id, **values)
            record_enrolled(tx, actor, "device:enrol_again", known.device_id, request, made, now)
            return generation

        generation = self._database.write(record)
        metrics.renewed(by_device=True)
        return Issued(known.device_id, made.issued.der, generation, made.key)

    def _find(self, tx: Connection, means: Means) -> EnrolmentRecord | None:
        return enrolment.find_enrolment(
            tx,
            means.tenant_id,
            token_id=means.token_id,
            manufacturer_id=means.manufacturer_id,
            identity=means.identity,
        )

    def _check_means(self, tx: Connection, means: Means, now: datetime) -> None:
        if means.token_id is None:
            self._check_manufacturer(tx, means)
            return
        token = enrolment.lock_enrolment_token(tx, means.tenant_id, means.token_id)
        if token.revoked_at is not None:
            raise EnrolmentRefused(REVOKED)
        if token.expires_at <= now:
            raise EnrolmentRefused(EXPIRED)

    def _check_manufacturer(self, tx: Connection, means: Means) -> None:
        record = enrolment.get_manufacturer(tx, means.tenant_id, means.manufacturer_id or "", for_update=True)
        if record.status is not ManufacturerStatus.REGISTERED:
            raise EnrolmentRefused(UNREGISTERED)
