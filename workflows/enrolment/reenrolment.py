"""The use cases of a device that enrols though it has a certificate: its answer was lost, or it was reset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

import db
from core import metrics
from core.errors import EnrolmentRefused, StateConflict, TooManyAttempts
from core.states import DeviceStatus, EnrolmentStatus
from pki.est import is_for_key
from store import audit, certificates, enrolment, keys, renewal
from store.certificates import CertificateRecord
from store.database import Database
from store.devices import DeviceRecord, update_device
from store.enrolment import EnrolmentRecord
from workflows.admission import Issuance, record_issuances
from workflows.credentials import CredentialIssuer
from workflows.enrolment.credentials import (
    Enrolled,
    EnrolledMeanwhile,
    EnrolmentAttempt,
    EnrolmentCredential,
    Waiting,
    check_token,
)
from workflows.events import EventType
from workflows.memberships import life_in_groups
from workflows.profiles import terms_of_device
from workflows.reconciliation import Reconciler
from workflows.tenants import TenantDirectory

# Each certificate that replaces another puts that one on the CRL; a device whose answers are lost asks again and again.
MAX_IN_A_DAY = 5


@dataclass(eq=False, repr=False)
class Reenrolments:
    """Answers devices that have enrolled before, and replaces their certificates if that is allowed."""

    _database: Database
    _tenants: TenantDirectory
    _reconciler: Reconciler
    _credentials: CredentialIssuer
    _clock: Callable[[], datetime]

    def answer(
        self, attempt: EnrolmentAttempt, known: EnrolmentRecord, device: DeviceRecord, certificate: CertificateRecord
    ) -> Enrolled | Waiting:
        """Return the same certificate for the same key. A device with another key waits for an operator.

        One that is known by its serial number gets a certificate in place of the others, if its profile says so.

        Raises ``EnrolmentRefused``, ``StateConflict``, ``TooManyAttempts``, ``Unavailable``.
        """
        has_csr = attempt.request.csr is not None
        own_key = is_for_key(certificate.der, known.key_fingerprint)
        if known.key_fingerprint == attempt.key_fingerprint and own_key is has_csr:
            if has_csr:
                if certificate.revoked_at is None and certificate.not_after > self._clock():
                    return Enrolled(device.id, certificate.der, device.generation)
            elif self._is_current(attempt.credential, certificate):
                # If the last answer was held back because of the broker, one with another key would be, too.
                self._reconciler.wait_until_granted(device.generation)
                return self._replace(attempt, known, approved=False)
        has_proof = attempt.credential.manufacturer_id is not None  # which of its devices it is
        by_serial = known.identity != attempt.credential.identity
        if (has_proof or by_serial) and attempt.credential.replaces_at_once:
            return self._replace(attempt, known, approved=False)
        if not has_proof and not by_serial:
            raise StateConflict(
                "The device has enrolled, and the certificate has expired, was renewed, or is not for this key; make a"
                " new key, and ask an operator for another enrolment token."
            )
        return self._ask_operator(attempt, known)

    def _is_current(self, credential: EnrolmentCredential, certificate: CertificateRecord) -> bool:
        with self._database.snapshot() as tx:
            return renewal.is_current(tx, credential.tenant_id, certificate.device_id or "", certificate.fingerprint)

    def _ask_operator(self, attempt: EnrolmentAttempt, known: EnrolmentRecord) -> Enrolled | Waiting:
        """Have a device that comes with another key than before wait for an operator.

        Until then its certificate keeps working: a thief of its factory certificate cannot disconnect it.
        """
        key, credential = attempt.key_fingerprint, attempt.credential
        with self._database.snapshot() as tx:
            asked = enrolment.find_reenrolment(tx, credential.tenant_id, known.id)
        if asked is None or asked.key_fingerprint != key:
            attempt.appraised.check()
            now = self._clock()
            with self._database.transaction() as tx:
                if (token := credential.lock(tx)) is not None:
                    check_token(token, now)
                if attempt.request.csr is not None:
                    keys.check_key(tx, credential.tenant_id, key, known.device_id)
                enrolment.add_reenrolment(tx, credential.tenant_id, known.id, key_fingerprint=key, asked_at=now)
                device = f"device:{known.device_id}"
                audit.record(tx, attempt.actor, "device:ask_again", device, at=now, key_fingerprint=key)
            return Waiting(known.device_id)
        if asked.status is EnrolmentStatus.REJECTED:
            raise EnrolmentRefused("An operator has rejected this key of the device; ask with a new key.")
        if asked.status is EnrolmentStatus.WAITING:
            return Waiting(known.device_id)
        return self._replace(attempt, known, approved=True)

    def _replace(self, attempt: EnrolmentAttempt, known: EnrolmentRecord, *, approved: bool) -> Enrolled:
        """Give a device a certificate in place of all that it has, which are revoked: it has lost their keys."""
        now, credential, key = self._clock(), attempt.credential, attempt.key_fingerprint
        with self._database.snapshot() as tx:
            terms = terms_of_device(tx, db.get_device(tx, credential.tenant_id, known.device_id))
            life = life_in_groups(tx, credential.tenant_id, known.device_id)
        tenant = self._tenants.of(credential.tenant_id)
        issued = attempt.issue(self._credentials, tenant, known.device_id, terms, now, life=life)

        def record(tx: Connection) -> int:
            device = self._check_replaceable(tx, credential, known, now, approved=approved)
            if attempt.request.csr is not None:
                keys.check_key(tx, credential.tenant_id, key, known.device_id)
            if approved:
                enrolment.use_reenrolment(tx, credential.tenant_id, known.id, key)
            elif credential.find_enrolment(tx) != known:
                raise EnrolledMeanwhile
            generation = _end_all(tx, device, now)
            issuance = Issuance(
                actor=attempt.actor,
                credentials=issued,
                name=device.name,
                event=EventType.ENROLLED,
                action="device:enrol_again",
                detail=attempt.audit_detail(),
                attestation=attempt.appraised,
            )
            certificate_id = record_issuances(tx, [issuance], now=now)[0]
            values = {**credential.identity_of(key), "certificate_id": certificate_id}
            enrolment.update_enrolment(tx, credential.tenant_id, known.id, **values)
            credential.accept(tx, known)
            return generation

        generation = self._database.write(record)
        metrics.counts.renewals.labels("device").inc()
        return Enrolled(known.device_id, issued.der, generation, issued.key)

    def _check_replaceable(
        self, tx: Connection, credential: EnrolmentCredential, known: EnrolmentRecord, now: datetime, *, approved: bool
    ) -> DeviceRecord:
        """Return the device, locked, with its token or manufacturer, if it may be given another certificate now."""
        device = db.get_device(tx, credential.tenant_id, known.device_id, for_update=True)
        token = credential.lock(tx)
        if token is not None:
            check_token(token, None if approved else now)
        if device.status is not DeviceStatus.ACTIVE:
            raise EnrolmentRefused("The device has been revoked or suspended by an operator.")
        since = now - timedelta(days=1)
        if certificates.count_issued(tx, credential.tenant_id, known.device_id, since=since) >= MAX_IN_A_DAY:
            sentence = f"The device was given {MAX_IN_A_DAY} certificates within a day; ask again tomorrow."
            raise TooManyAttempts(sentence, retry_after=3600)
        return device


def _end_all(tx: Connection, device: DeviceRecord, now: datetime) -> int:
    """Revoke every certificate of a device, and its bundles; returns the generation that the broker must reach."""
    tenant_id, device_id = device.tenant_id, device.id
    generation = db.next_generation(tx, at=now)
    unfetched = renewal.unfetched_certificates(tx, tenant_id, device_id)
    renewal.revoke_unfetched(tx, unfetched, now=now, generation=generation)
    renewal.replace_current(tx, tenant_id, device_id, until=now, ends_when_used=False)
    renewal.revoke_replaced(tx, tenant_id, device_id, now=now, generation=generation)
    update_device(tx, tenant_id, device_id, {"generation": generation, "updated_at": now})
    return generation
