"""Fields of requests and answers about attestation: evidence, appraisal policies, and what came of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from attestation.appraisal import MAX_ENVIRONMENTS, MAX_MEASUREMENTS, AppraisalPolicy, PolicyMode, ReferenceTriple
from attestation.evidence import EvidenceType
from core.states import AttestationVerdict
from web.api.fields import Fingerprint
from web.api.routing import AnswerModel, RequestModel, Timestamp
from workflows.attestation.evidence import ShownEvidence
from workflows.attestation.policies import AnchorRequest, PolicyRequest, RegisteredPolicy

MAX_ANCHORS = 32
PolicyId = Annotated[str, Field(pattern="^[0-9a-f]{16}$", description="The `policy_id` of an appraisal policy")]
AnchorPem = Annotated[str, Field(min_length=1, max_length=16384, description="One certificate or public key, PEM")]
# What is longer than evidence can be is refused as evidence, once its nonce is spent.
EvidenceText = Annotated[
    str,
    Field(max_length=1 << 20, description="Base64url without padding; a JWT as it is"),
]
NonceText = Annotated[str, Field(max_length=256, description="The nonce that was given, as it was given")]


class EvidenceRequest(RequestModel):
    """Evidence about the device and the key of its CSR, made for the nonce, which is spent by it."""

    type: EvidenceType
    nonce: NonceText
    evidence: EvidenceText

    def shown(self) -> ShownEvidence:
        """Return it as the use cases have it."""
        return ShownEvidence(self.type, self.nonce, self.evidence)


class RegisteredEvidence(EvidenceRequest):
    """Evidence that an operator passes on, with the policy of a token or a manufacturer by which it is appraised."""

    policy_id: PolicyId


class AnchorModel(RequestModel):
    """A trust anchor, for evidence of these `types`; none stands for all.

    An `identifier` (hex) is what evidence names a public key by: a key id, a UEID or a PSA instance id.
    """

    pem: AnchorPem
    types: list[EvidenceType] = Field(default=[], max_length=len(EvidenceType))
    identifier: Annotated[str, Field(pattern="^([0-9a-f]{2}){0,64}$")] = ""


def _as_anchor(value: object) -> object:
    return {"pem": value} if isinstance(value, str) else value


# Not a union to read it by: a problem would be reported for each member, under a name that no client knows.
_Anchor = Annotated[AnchorModel, BeforeValidator(_as_anchor, json_schema_input_type=AnchorPem | AnchorModel)]


# In full it is a schema of which a reader of the OpenAPI text would see little else.
_REFERENCE_VALUES: Any = {
    "type": "array",
    "maxItems": MAX_ENVIRONMENTS,
    "items": {
        "type": "object",
        "properties": {
            "environment": {"type": "object", "description": "`class`, with `class_id` (hex), `vendor`, `model`"},
            "measurements": {
                "type": "array",
                "maxItems": MAX_MEASUREMENTS,
                "items": {"type": "object", "description": "`mkey`, the component, and `mval`, what it has to be"},
            },
        },
        "required": ["environment"],
        "additionalProperties": False,
    },
    "description": "In the terms of CoRIM: see docs/attestation.md",
}


class AttestationPolicyRequest(AppraisalPolicy):
    """What evidence devices have to show; an anchor in PEM alone is one for all types of evidence."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    reference_values: Annotated[list[ReferenceTriple], WithJsonSchema(_REFERENCE_VALUES)] = Field(
        default=[], max_length=MAX_ENVIRONMENTS
    )
    anchors: list[_Anchor] = Field(default=[], max_length=MAX_ANCHORS)

    def wanted(self) -> PolicyRequest:
        """Return it as the use cases have it."""
        policy = AppraisalPolicy.model_validate(self.model_dump(by_alias=True, exclude={"anchors"}))
        return PolicyRequest(policy, [AnchorRequest(one.pem, tuple(one.types), one.identifier) for one in self.anchors])


class AttestationPolicyModel(AnswerModel):
    """An appraisal policy; `version` counts its changes."""

    policy_id: str
    version: int
    mode: PolicyMode
    types: list[EvidenceType]
    lifecycle: list[str]
    debug: list[str]
    on_renewal: bool
    reference_values: list[dict[str, Any]]
    anchors: list[AnchorModel]

    @classmethod
    def shown(cls, policy: RegisteredPolicy | None) -> AttestationPolicyModel | None:
        """Return a policy as answers show it."""
        if policy is None:
            return None
        content = policy.appraisal.model_dump(mode="json", by_alias=True, exclude_none=True)
        anchors = [AnchorModel(pem=one.pem, types=list(one.types), identifier=one.identifier) for one in policy.anchors]
        return cls(**content, policy_id=policy.id, version=policy.version, anchors=anchors)


class AttestationModel(AnswerModel):
    """What came of the newest evidence of a device, which was for the key with this fingerprint.

    `outdated`: it satisfied the policy when it was shown, and would not satisfy that of today. `claims` are the last
    that were verified of the device's root of trust, empty if none were; `problems` say in sentences what is wrong.
    """

    verdict: AttestationVerdict
    type: EvidenceType
    appraised_at: Timestamp
    code: str
    problems: list[str]
    policy_id: str
    policy_version: int
    evidence_digest: Fingerprint
    key_fingerprint: Fingerprint
    claims: dict[str, Any]


class NonceAnswer(AnswerModel):
    """A nonce, in Base64url; for a TPM with an EK certificate what takes its place, for TPM2_ActivateCredential.

    `credential` is a TPM2B_ID_OBJECT, `secret` a TPM2B_ENCRYPTED_SECRET, both in Base64. What they open is the nonce
    that TPM2_Certify and TPM2_Quote sign; evidence is still sent with `nonce`.
    """

    omit_none = True

    nonce: str
    expires_at: Timestamp
    credential: str | None = None
    secret: str | None = None
