"""The use case of a device that enrols by itself: decides whether it is its first time, a repeat, or another key."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError

import db
from config import KEY_TYPES
from core.errors import AttestationRefused, EnrolmentRefused, KeyRefused, Unavailable
from core.failpoints import failpoint
from core.states import DeviceStatus, EnrolmentStatus
from pki.est import EnrolmentRequest
from pki.profiles import DEFAULT
from store import certificates, keys
from store import enrolment as store_enrolment
from store.audit import Actor
from store.database import Database
from store.enrolment import EnrolmentProfile, EnrolmentRecord
from workflows.attestation.appraisal import DeviceAttestations
from workflows.attestation.evidence import ShownEvidence
from workflows.enrolment.credentials import Enrolled, EnrolledMeanwhile, EnrolmentAttempt, EnrolmentCredential, Waiting
from workflows.enrolment.first import FirstEnrolments
from workflows.enrolment.reenrolment import Reenrolments
from workflows.profiles import find_profiles
from workflows.reconciliation import Reconciler

_TRIES = 3


@dataclass(eq=False, repr=False)
class Enrolments:
    """Answers the same however often a device asks, so that an answer that was lost costs it nothing."""

    _database: Database
    _reconciler: Reconciler
    _first: FirstEnrolments
    _reenrolment: Reenrolments
    _attestations: DeviceAttestations

    def enrol(
        self,
        actor: Actor,
        credential: EnrolmentCredential,
        request: EnrolmentRequest,
        shown: ShownEvidence | None = None,
    ) -> Enrolled | Waiting:
        """Certify the key of a device's CSR, or one made for it, or have it wait, as the profile says.

        A key that the portal makes is in the answer and nowhere else. What evidence the device has ``shown`` counts
        wherever a certificate is issued; a repeat of an answer needs none. Raises ``EnrolmentRefused``, ``KeyRefused``,
        ``StateConflict``, ``TooManyAttempts``, ``Unavailable``, or a kind of ``AttestationRefused``.
        """
        _check_key_type(request, credential.profile)
        known = self._known_device(credential)
        policy_id = self._attestations.policy_for(credential.tenant_id, known, credential.profile.attestation_policy_id)
        appraised = self._attestations.appraise(
            policy_id,
            shown,
            holder=credential.nonce_holder,
            key=None if request.csr is None else request.csr.public_key,
            # An operator who approves another key may let another root of trust in.
            device_id=known if policy_id and credential.replaces_at_once else None,
        )
        try:
            outcome = self._once(EnrolmentAttempt(actor, credential, request, appraised))
        except AttestationRefused:
            self._attestations.record_refusal(actor, appraised, self._known_device(credential))
            raise
        if isinstance(outcome, Waiting):
            return outcome
        failpoint("enrol.after_commit")
        self._reconciler.wait_until_granted(outcome.generation)
        return outcome

    def key_types(self, tenant_id: str, profile: EnrolmentProfile | None, device_id: str | None) -> tuple[str, ...]:
        """Return the kinds of key that a CSR may have, the one to prefer first.

        They are those that both the enrolment profile (``None`` for a device that renews) and the certificate profile
        allow; that of a known device is its own.
        """
        name, kinds = (DEFAULT, KEY_TYPES) if profile is None else (profile.certificate_profile, profile.key_types)
        with self._database.snapshot() as tx:
            if device_id is not None:
                name = db.get_device(tx, tenant_id, device_id, kind=None).profile
            found = find_profiles(tx, tenant_id, [name]).get(name)
        return kinds if found is None else tuple(kind for kind in kinds if kind in found.key_types) or found.key_types

    def check_renewal_key(self, tenant_id: str, device_id: str, request: EnrolmentRequest) -> None:
        """Raise ``KeyRefused`` for a kind of key that the token or manufacturer of the device does not allow."""
        with self._database.snapshot() as tx:
            profile = store_enrolment.profile_of_device(tx, tenant_id, device_id)
        if profile is not None:
            _check_key_type(request, profile)

    def _known_device(self, credential: EnrolmentCredential) -> str | None:
        with self._database.snapshot() as tx:
            known = credential.find_enrolment(tx)
        return credential.device_id if known is None else known.device_id

    def _once(self, attempt: EnrolmentAttempt) -> Enrolled | Waiting:
        for _ in range(_TRIES):
            with self._database.snapshot() as tx:
                known = attempt.credential.find_enrolment(tx)
            try:
                if known is None:
                    return self._first.enrol(attempt)
                return self._again(attempt, known)
            except (IntegrityError, EnrolledMeanwhile):
                continue  # of two requests of one device the database accepted one: look at what that has made
        raise Unavailable("The device has asked several times at once; try again in a few seconds.")

    def _again(self, attempt: EnrolmentAttempt, known: EnrolmentRecord) -> Enrolled | Waiting:
        tenant_id = attempt.credential.tenant_id
        with self._database.snapshot() as tx:
            attempt.credential.check_not_revoked(tx)
            device = db.get_device(tx, tenant_id, known.device_id)
            certificate = None
            if known.certificate_id is not None:
                certificate = certificates.get_certificate(tx, tenant_id, known.certificate_id)
        if known.status is EnrolmentStatus.REJECTED or device.status in (DeviceStatus.REVOKED, DeviceStatus.SUSPENDED):
            raise EnrolmentRefused("The device has been rejected, revoked or suspended by an operator.")
        if certificate is not None:
            return self._reenrolment.answer(attempt, known, device, certificate)
        if known.status is EnrolmentStatus.APPROVED:
            return self._first.enrol_approved(attempt, known)
        if known.key_fingerprint != attempt.key_fingerprint:
            attempt.appraised.check()
            with self._database.transaction() as tx:
                key = attempt.key_fingerprint
                if attempt.request.csr is not None:
                    keys.check_key(tx, tenant_id, key, device.id)
                values = attempt.credential.identity_of(key)
                store_enrolment.update_enrolment(tx, tenant_id, known.id, **values)
        return Waiting(device.id)


def _check_key_type(request: EnrolmentRequest, profile: EnrolmentProfile) -> None:
    if request.csr is not None and request.csr.key_type not in profile.key_types:
        allowed = ", ".join(profile.key_types)
        raise KeyRefused(f"The CSR is for a key of the kind {request.csr.key_type}; make one of: {allowed}.")
