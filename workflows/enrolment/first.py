"""The use cases of a device that enrols for the first time: admitted at once, or once an operator has approved it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

import db
from config import Settings
from core import metrics
from core.errors import EnrolmentRefused, StateConflict
from core.failpoints import failpoint
from core.states import Approval, DeviceStatus, EnrolmentStatus
from pki.profiles import DEFAULT, CertificateTerms
from store import audit, keys
from store import enrolment as store_enrolment
from store.database import Database
from store.devices import DeviceRecord
from store.enrolment import EnrolmentRecord
from workflows.admission import Admission, Admitted, add_pending, admit
from workflows.credentials import CredentialIssuer, DeviceRequest, IssuedCredentials
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
from workflows.profiles import find_profiles, terms_of, terms_of_device
from workflows.tenants import TenantDirectory, TenantRates

_UNFIT_FOR_A_NAME = re.compile(r"[^A-Za-z0-9._:/+-]+")


@dataclass(eq=False, repr=False)
class FirstEnrolments:
    """Admits devices that have no certificate of this portal yet."""

    _settings: Settings
    _database: Database
    _tenants: TenantDirectory
    _credentials: CredentialIssuer
    _rates: TenantRates
    _clock: Callable[[], datetime]

    def enrol(self, attempt: EnrolmentAttempt) -> Enrolled | Waiting:
        """Admit a device that has not asked before, or have it wait for an operator, as the profile says.

        Raises ``EnrolledMeanwhile``, ``EnrolmentRefused``, ``KeyCompromised``, ``KeyInUse``, ``NameInUse``,
        ``ProfileRefused``, ``QuotaReached``, ``TooManyRegistrations``.
        """
        now, credential = self._clock(), attempt.credential
        device_id = credential.device_id or db.new_device_id(now)
        at_once = credential.profile.approval is Approval.AT_ONCE
        terms, life = self._terms(credential, device_id), self._life(credential)
        tenant = self._tenants.of(credential.tenant_id)
        self._credentials.check(tenant, attempt.wanted, terms)
        attempt.appraised.check()  # of a device that will wait, too
        if at_once:
            self._rates.take_registration(tenant)
        issued = attempt.issue(self._credentials, tenant, device_id, terms, now, life=life) if at_once else None
        generation = self._database.write(lambda tx: self._record_first(tx, attempt, device_id, issued, now))
        if issued is None:
            return Waiting(device_id)
        return self._enrolled(issued, generation)

    def _terms(self, credential: EnrolmentCredential, device_id: str) -> CertificateTerms | None:
        """Return the terms by the certificate profile of the token or manufacturer, or of the one device of a token."""
        name, serial = credential.profile.certificate_profile, credential.recorded_serial
        if credential.device_id is None and name == DEFAULT:
            return None
        with self._database.snapshot() as tx:
            if credential.device_id is not None:
                device = db.get_device(tx, credential.tenant_id, device_id)
                profiles = find_profiles(tx, credential.tenant_id, [device.profile])
                return terms_of(profiles, device.profile, device_id, device, serial=serial)
            profiles = find_profiles(tx, credential.tenant_id, [name])
        return terms_of(profiles, name, device_id, _device_request(credential, None), serial=serial)

    def _life(self, credential: EnrolmentCredential) -> int | None:
        """Return for how many days a group says whose member the one device of a token is; others are in none yet."""
        if credential.device_id is None:
            return None
        with self._database.snapshot() as tx:
            return life_in_groups(tx, credential.tenant_id, credential.device_id)

    def _record_first(
        self, tx: Connection, attempt: EnrolmentAttempt, device_id: str, issued: IssuedCredentials | None, now: datetime
    ) -> int:
        """Write a device that has not asked before, with what was issued for it; returns the generation."""
        credential = attempt.credential
        number, tenant_id = self._count_use(tx, credential, now), credential.tenant_id
        if attempt.request.csr is not None:
            keys.check_key(tx, tenant_id, attempt.key_fingerprint, device_id)
        device: DeviceRequest | DeviceRecord = _device_request(credential, number)
        if credential.device_id is not None:
            device = self._pending(tx, tenant_id, device_id)
        generation, certificate_id = 0, None
        if issued is not None:
            admitted = self._admit(tx, attempt, device, issued, now)
            generation, certificate_id = admitted.generation, admitted.certificate_ids[0]
        elif isinstance(device, DeviceRequest):
            most = self._tenants.of(tenant_id).quotas.devices
            add_pending(tx, tenant_id, device_id, device, None, most=most, now=now)
        store_enrolment.add_enrolment(
            tx,
            tenant_id,
            device_id=device_id,
            token_id=credential.token_id,
            manufacturer_id=credential.manufacturer_id,
            identity=credential.identity,
            key_fingerprint=attempt.key_fingerprint,
            status=EnrolmentStatus.WAITING if issued is None else EnrolmentStatus.ISSUED,
            created_at=now,
            decided_at=None if issued is None else now,
            certificate_id=certificate_id,
            serial_hash=credential.serial_hash,
            serial=credential.recorded_serial,
        )
        if issued is None:
            key = attempt.key_fingerprint
            audit.record(tx, attempt.actor, "device:ask", f"device:{device_id}", at=now, key_fingerprint=key)
        failpoint("enrol.before_commit")
        return generation

    def enrol_approved(self, attempt: EnrolmentAttempt, known: EnrolmentRecord) -> Enrolled:
        """Admit a device that an operator has approved, with the key that was approved.

        Raises ``EnrolmentRefused``, ``StateConflict`` for another key, ``NameInUse``, ``ProfileRefused``.
        """
        now, credential = self._clock(), attempt.credential
        if known.key_fingerprint != attempt.key_fingerprint:
            raise StateConflict("An operator has approved another key of this device; ask with that one.")
        with self._database.snapshot() as tx:
            terms = terms_of_device(tx, db.get_device(tx, credential.tenant_id, known.device_id))
            life = life_in_groups(tx, credential.tenant_id, known.device_id)
        tenant = self._tenants.of(credential.tenant_id)
        self._rates.take_registration(tenant)
        issued = attempt.issue(self._credentials, tenant, known.device_id, terms, now, life=life)

        def record(tx: Connection) -> int:
            device = self._pending(tx, credential.tenant_id, known.device_id)
            if credential.manufacturer_id is not None:
                credential.lock(tx)
            admitted = self._admit(tx, attempt, device, issued, now)
            store_enrolment.update_enrolment(
                tx,
                credential.tenant_id,
                known.id,
                status=EnrolmentStatus.ISSUED,
                certificate_id=admitted.certificate_ids[0],
            )
            credential.accept(tx, known)
            return admitted.generation

        return self._enrolled(issued, self._database.write(record))

    def _count_use(self, tx: Connection, credential: EnrolmentCredential, now: datetime) -> int:
        """Check that the token or manufacturer still admits devices; returns the number of the device for its name."""
        token = credential.lock(tx)
        if credential.find_enrolment(tx) is not None:
            raise EnrolledMeanwhile
        if token is None:
            return 0
        check_token(token, now)
        if token.uses >= token.uses_allowed:
            raise EnrolmentRefused("The enrolment token is used up; ask an operator for another one.")
        store_enrolment.count_use(tx, credential.tenant_id, token.id)
        return token.uses + 1

    def _pending(self, tx: Connection, tenant_id: str, device_id: str) -> DeviceRecord:
        device = db.get_device(tx, tenant_id, device_id, for_update=True)
        if device.status is not DeviceStatus.PENDING:
            raise EnrolmentRefused("The device is not waiting to enrol any more.")
        return device

    def _admit(
        self,
        tx: Connection,
        attempt: EnrolmentAttempt,
        device: DeviceRequest | DeviceRecord,
        issued: IssuedCredentials,
        now: datetime,
    ) -> Admitted:
        admission = Admission(
            actor=attempt.actor,
            credentials=issued,
            name=device.name,
            event=EventType.ENROLLED,
            action="device:enrol",
            detail=attempt.audit_detail(),
            attestation=attempt.appraised,
            request=device if isinstance(device, DeviceRequest) else None,
        )
        most = self._tenants.of(attempt.credential.tenant_id).quotas.devices
        return admit(tx, [admission], style=self._settings.granting_style, most=most, now=now)

    def _enrolled(self, issued: IssuedCredentials, generation: int) -> Enrolled:
        metrics.counts.registrations.labels("device" if issued.key is None else "portal").inc()
        return Enrolled(issued.device_id, issued.der, generation, issued.key)


def _device_request(credential: EnrolmentCredential, number: int | None) -> DeviceRequest:
    """Return the device that a profile describes; ``number`` counts those of a token, ``None`` while it is not known.

    A name that needs the number is empty then.
    """
    profile = credential.profile
    if number is None and "{number}" in profile.name_template:
        profile = dataclasses.replace(profile, name_template="")
    serial = _UNFIT_FOR_A_NAME.sub("-", credential.serial).strip("-") or credential.identity[:12]
    name = profile.name_template.replace("{number}", str(number)).replace("{serial}", serial)
    return DeviceRequest(
        name=name[:128].rstrip(),
        type=profile.type,
        location=profile.location,
        firmware=profile.firmware,
        profile=None if profile.certificate_profile == DEFAULT else profile.certificate_profile,
    )
