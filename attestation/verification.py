"""Verify evidence of any type and appraise it by the policy: the attestation result (RFC 9334 §8.4). Grants nothing.

What the policy is, and which anchors are registered for the type of evidence, is for the caller to know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from attestation import eat_cwt, eat_jwt, psa, tpm
from attestation.anchors import Anchor
from attestation.appraisal import AppraisalPolicy, PolicyMode, appraise
from attestation.evidence import Challenge, Claims, EvidenceType
from attestation.refusals import AppraisalFailed
from core.errors import AttestationRefused
from pki.algorithms import PublicKey

Verify = Callable[[bytes, Challenge, PublicKey, Sequence[Anchor], datetime], Claims]
VERIFIERS: Mapping[EvidenceType, Verify] = {
    EvidenceType.EAT_JWT: eat_jwt.verify,
    EvidenceType.EAT_CWT: eat_cwt.verify,
    EvidenceType.PSA: psa.verify,
    EvidenceType.TPM: tpm.verify,
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a device sent beside its CSR."""

    type: EvidenceType
    content: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the content, in hex."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True, slots=True)
class AttestationResult:
    """What came out: ``claims`` unless the evidence did not verify, and what is wrong, each as a sentence.

    ``code`` is that of the refusal, empty if there is none.
    """

    evidence: Evidence
    claims: Claims | None
    problems: tuple[str, ...] = ()
    code: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the evidence verified and satisfies the policy."""
        return not self.code


def attest(
    policy: AppraisalPolicy,
    evidence: Evidence,
    *,
    challenge: Challenge,
    public_key: PublicKey,
    anchors: Sequence[Anchor],
    now: datetime,
) -> AttestationResult:
    """Return the result for a device that asks for a certificate.

    Under ``require`` it has passed: raises a kind of ``AttestationRefused`` otherwise, as ``record`` never does.
    """
    requires = policy.mode is PolicyMode.REQUIRE
    try:
        claims = VERIFIERS[evidence.type](evidence.content, challenge, public_key, anchors, now)
    except AttestationRefused as refusal:
        if requires:
            raise
        return AttestationResult(evidence, None, (refusal.detail,), refusal.code)
    problems = appraise(policy, claims)
    if problems and requires:
        raise AppraisalFailed(f"The evidence does not satisfy the appraisal policy: {' '.join(problems)}")
    return AttestationResult(evidence, claims, problems, AppraisalFailed.code if problems else "")
