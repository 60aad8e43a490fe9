"""The use case of a device that shows evidence beside its CSR: appraised once, before anything is issued."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy.engine import Connection

from attestation.anchors import Anchor
from attestation.appraisal import PolicyMode
from attestation.evidence import Claims, EvidenceType
from attestation.refusals import AttesterChanged, EvidenceMissing, KeyMismatch
from attestation.verification import AttestationResult, Evidence, attest
from core import metrics
from core.errors import AttestationRefused
from core.states import AttestationVerdict, ManufacturerStatus
from core.throttle import Throttle
from pki.algorithms import PublicKey, public_key_fingerprint
from store import attestation, audit, enrolment, groups, issuers
from store.attestation import AttestationRecord
from store.audit import Actor
from store.database import Database
from workflows import events
from workflows.attestation.evidence import ShownEvidence
from workflows.attestation.nonces import AttestationNonces, EndorsementKey, IssuedNonce, NonceHolder
from workflows.attestation.policies import RegisteredPolicy, find_policy
from workflows.events import EventType

log = logging.getLogger("portal.attestation")
_CLAIMS = TypeAdapter(Claims)


@dataclass(frozen=True, slots=True)
class Appraised:
    """What came of the evidence of a request: a result to be recorded with what is issued, or a refusal, or neither."""

    policy: RegisteredPolicy | None = None
    key_fingerprint: str = ""
    result: AttestationResult | None = None
    refusal: AttestationRefused | None = None

    def check(self) -> None:
        """Raise the refusal: call it before anything is issued."""
        if self.refusal is not None:
            raise self.refusal

    def audit_detail(self) -> dict[str, Any]:
        """Return what the audit entry of what is issued says of the evidence."""
        if self.result is None or self.policy is None:
            return {}
        of = f"{self.policy.id} {self.policy.version}"
        shown = {"type": self.result.evidence.type, "digest": self.result.evidence.digest, "policy": of}
        return {"attestation": {**shown, "verdict": _verdict_of(self.result), **_code_of(self.result)}}


NOT_APPRAISED = Appraised()


@dataclass(eq=False, repr=False)
class DeviceAttestations:
    """Appraises the evidence of devices by the policy of the enrolment token or manufacturer that admits them."""

    _database: Database
    _nonces: AttestationNonces
    _throttle: Throttle
    _clock: Callable[[], datetime]

    def appraise(
        self,
        policy_id: str | None,
        shown: ShownEvidence | None,
        *,
        holder: NonceHolder,
        key: PublicKey | None,
        device_id: str | None = None,
    ) -> Appraised:
        """Appraise the evidence for a key (``None`` for one that is made here); its nonce is spent in any case.

        That of a device with an id has to be of the root of trust that it has shown before. Raises nothing that the
        evidence is to blame for: ``Appraised.check`` does.
        """
        if policy_id is None and shown is None:
            return NOT_APPRAISED
        with self._database.snapshot() as tx:
            policy = find_policy(tx, holder.tenant_id, policy_id)
        try:
            result = self._result(policy, shown, holder, key)
            if device_id is not None and policy is not None and result is not None:
                result = self._of_same_attester(policy, result, holder.tenant_id, device_id)
        except AttestationRefused as refusal:
            return Appraised(policy, refusal=refusal)
        if result is not None:
            metrics.counts.attestations.labels(_verdict_of(result)).inc()
        fingerprint = "" if key is None else public_key_fingerprint(key)
        return Appraised(policy, fingerprint, result)

    def appraise_renewal(
        self, tenant_id: str, device_id: str, shown: ShownEvidence | None, key: PublicKey | None
    ) -> Appraised:
        """Appraise what a device shows that renews by itself; it needs nothing if its policy is for enrolment alone."""
        policy_id = self.policy_of(tenant_id, device_id)
        if shown is None:
            with self._database.snapshot() as tx:
                policy = find_policy(tx, tenant_id, policy_id)
            if policy is None or not policy.appraisal.on_renewal:
                return NOT_APPRAISED
        holder = NonceHolder.of_device(tenant_id, device_id)
        return self.appraise(policy_id, shown, holder=holder, key=key, device_id=device_id)

    def challenge(self, holder: NonceHolder, policy_id: str | None, key: EndorsementKey | None) -> IssuedNonce:
        """Give a nonce, with a credential for the TPM whose endorsement ``key`` the policy's anchors vouch for.

        Raises ``NotFound`` for the policy, a kind of ``AttestationRefused`` for the key.
        """
        policy = None
        if key is not None:
            with self._database.snapshot() as tx:
                policy = find_policy(tx, holder.tenant_id, policy_id)
        return self._nonces.issue(holder, policy, key)

    def policy_of(self, tenant_id: str, device_id: str) -> str | None:
        """Return the id of the policy of a device's group, or by which it has enrolled, or else was registered."""
        with self._database.snapshot() as tx:
            if (of_group := groups.policy_of(tx, tenant_id, device_id)) is not None:
                return of_group
            profile = enrolment.profile_of_device(tx, tenant_id, device_id)
            if profile is not None:
                return profile.attestation_policy_id
            kept = attestation.find_attestation(tx, tenant_id, device_id)
            return None if kept is None else kept.policy_id

    def policy_for(self, tenant_id: str, device_id: str | None, otherwise: str | None) -> str | None:
        """Return the id of the policy by which a device enrols: of its group, if it is known and has one that sets one.

        ``otherwise`` is that of its enrolment token or manufacturer.
        """
        if device_id is None:
            return otherwise
        with self._database.snapshot() as tx:
            return groups.policy_of(tx, tenant_id, device_id) or otherwise

    def _result(
        self,
        policy: RegisteredPolicy | None,
        shown: ShownEvidence | None,
        holder: NonceHolder,
        key: PublicKey | None,
    ) -> AttestationResult | None:
        mode = PolicyMode.OFF if policy is None else policy.appraisal.mode
        try:
            challenge = None if shown is None else self._nonces.spend(holder, shown.nonce)
            evidence = None if shown is None else Evidence(shown.type, shown.content())
        except AttestationRefused as refusal:
            if mode is PolicyMode.REQUIRE:
                raise
            if shown is None or mode is PolicyMode.OFF:
                return None
            evidence = Evidence(shown.type, shown.evidence.encode())
            return AttestationResult(evidence, None, (refusal.detail,), refusal.code)
        if policy is None or mode is PolicyMode.OFF:
            return None
        if challenge is None or evidence is None or key is None:
            if mode is PolicyMode.REQUIRE:
                raise _missing(policy, key)
            return None
        anchors = [*policy.anchors_for(evidence.type), *self._of_devices(holder.tenant_id)]
        return attest(
            policy.appraisal, evidence, challenge=challenge, public_key=key, anchors=anchors, now=self._clock()
        )

    def _of_devices(self, tenant_id: str) -> list[Anchor]:
        """Return the CAs by whose certificates devices enrol and connect: with none of those is evidence signed."""
        with self._database.snapshot() as tx:
            makers = enrolment.list_manufacturers(tx, tenant_id)
            own = issuers.list_issuers(tx, retired=True)
        registered = [one.der for one in makers if one.status is ManufacturerStatus.REGISTERED]
        return [Anchor(der, True, is_of_devices=True) for der in (*registered, *(one.der for one in own))]

    def _of_same_attester(
        self, policy: RegisteredPolicy, result: AttestationResult, tenant_id: str, device_id: str
    ) -> AttestationResult:
        """Return the result of a device's evidence, which another one's would not be.

        Else a thief of the device's key could have it certified for one in a root of trust of the thief's own. A
        result that is not of the device's root of trust keeps its claims: they are what the next one is compared with.
        """
        with self._database.snapshot() as tx:
            kept = attestation.find_attestation(tx, tenant_id, device_id)
        before = None if kept is None else claims_of(kept)
        if before is None or before.attester == "":
            return result
        if result.claims is None:
            return replace(result, claims=before)
        if result.claims.attester == before.attester:
            return result
        changed = AttesterChanged(
            "The evidence is of another root of trust than the device has shown before; if it was replaced, have the"
            " device enrol again, and an operator approve it."
        )
        if policy.appraisal.mode is PolicyMode.REQUIRE:
            raise changed
        # This code before that of the appraisal, which may pass by a later policy.
        return replace(result, claims=before, problems=(*result.problems, changed.detail), code=changed.code)

    def record_refusal(self, actor: Actor, appraised: Appraised, device_id: str | None) -> None:
        """Record that a device, known or not yet, was refused for its evidence; a flood of them is summarized."""
        refusal, policy, now = appraised.refusal, appraised.policy, self._clock()
        if refusal is None or policy is None:
            return
        metrics.counts.attestations.labels("refused").inc()
        if not self._throttle.failed(actor.address, now.timestamp(), counts=False).recorded:
            return
        with self._database.transaction() as tx:
            facts: dict[str, Any] = {
                "code": refusal.code,
                "detail": refusal.detail,
                "admitted": False,
                "by": actor.name,
            }
            events.record(tx, actor.tenant_id, EventType.ATTESTATION_FAILED, device_id, at=now, **facts)
            of = "attestation" if device_id is None else f"device:{device_id}"
            told = {"code": refusal.code, "policy": f"{policy.id} {policy.version}"}
            audit.record(tx, actor, "device:attest", of, at=now, outcome="refused", **told)


def _missing(policy: RegisteredPolicy, key: PublicKey | None) -> EvidenceMissing:
    types = ", ".join(policy.appraisal.types or EvidenceType)
    if key is None:
        return EvidenceMissing(
            f"This enrolment requires attestation evidence ({types}) for the device's own key, and the portal was to"
            " make one; make a key on the device, and use POST /enroll."
        )
    return EvidenceMissing(
        f"This enrolment requires attestation evidence ({types}), and none was sent; get a nonce by"
        " POST /attestation/nonce, and send the evidence with POST /enroll."
    )


def record_result(
    tx: Connection, tenant_id: str, device_id: str, name: str, appraised: Appraised, *, now: datetime
) -> None:
    """Record what came of a device's evidence in the transaction that admits it, before its audit entry."""
    result, policy = appraised.result, appraised.policy
    if result is None or policy is None:
        return
    record = AttestationRecord(
        device_id=device_id,
        tenant_id=tenant_id,
        policy_id=policy.id,
        policy_version=policy.version,
        type=result.evidence.type,
        verdict=_verdict_of(result),
        code=result.code,
        problems=list(result.problems),
        claims={} if result.claims is None else _CLAIMS.dump_python(result.claims, mode="json"),
        evidence_digest=result.evidence.digest,
        key_fingerprint=appraised.key_fingerprint,
        appraised_at=now,
    )
    attestation.put_attestation(tx, record)
    if not result.passed:
        detail = " ".join(result.problems)
        facts: dict[str, Any] = {"name": name, "code": result.code, "detail": detail, "admitted": True}
        events.record(tx, tenant_id, EventType.ATTESTATION_FAILED, device_id, at=now, **facts)


def outdate_result(tx: Connection, tenant_id: str, device_id: str, key_fingerprint: str) -> None:
    """Record that a device was given a certificate for this key: evidence for another one says nothing about it."""
    problem = "The device was given a certificate for another key since, without evidence for that."
    attestation.outdate_attestation(
        tx, tenant_id, device_id, key_fingerprint=key_fingerprint, code=KeyMismatch.code, problem=problem
    )


def claims_of(record: AttestationRecord) -> Claims | None:
    """Return the claims that were kept, ``None`` if no evidence of the device has verified."""
    return _CLAIMS.validate_python(record.claims) if record.claims else None


def _verdict_of(result: AttestationResult) -> AttestationVerdict:
    return AttestationVerdict.PASSED if result.passed else AttestationVerdict.FAILED


def _code_of(result: AttestationResult) -> dict[str, str]:
    return {} if result.passed else {"code": result.code}
