"""Appraisal policies of enrolment tokens and manufacturers, with the trust anchors that an admin has registered."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from attestation.anchors import Anchor, read_anchor
from attestation.appraisal import AppraisalPolicy, PolicyMode
from attestation.evidence import EvidenceType
from core.errors import AttestationPolicyInvalid, Forbidden
from core.roles import MAY, Permission
from store import attestation
from store.attestation import PolicyRecord
from store.audit import Actor
from store.database import Database
from store.enrolment import EnrolmentProfile


@dataclass(frozen=True, slots=True)
class AnchorRequest:
    """A trust anchor to be registered: a certificate or public key in PEM, for some types of evidence or for all.

    ``identifier``, in hex, is what evidence names a public key by.
    """

    pem: str
    types: tuple[EvidenceType, ...] = ()
    identifier: str = ""


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """An appraisal policy to be set."""

    policy: AppraisalPolicy
    anchors: Sequence[AnchorRequest]


@dataclass(frozen=True, slots=True)
class RegisteredPolicy:
    """An appraisal policy that is in force, in one of its versions."""

    id: str
    version: int
    appraisal: AppraisalPolicy
    anchors: Sequence[AnchorRequest]

    @classmethod
    def of(cls, record: PolicyRecord) -> RegisteredPolicy:
        """Read what the database holds."""
        anchors = [
            AnchorRequest(one["pem"], tuple(map(EvidenceType, one["types"])), one["identifier"])
            for one in record.anchors
        ]
        return cls(record.id, record.version, AppraisalPolicy.model_validate(record.policy), anchors)

    def anchors_for(self, type_: EvidenceType) -> list[Anchor]:
        """Return the anchors that vouch for evidence of a type; whether one has expired is for the verifier to say."""
        return [
            read_anchor(one.pem, bytes.fromhex(one.identifier), now=None)
            for one in self.anchors
            if not one.types or type_ in one.types
        ]


def check_policy(actor: Actor, wanted: PolicyRequest, *, now: datetime) -> None:
    """Raise ``Forbidden`` if the role may register no anchors; ``AttestationPolicyInvalid`` if they cannot be used."""
    if Permission.TOKENS not in MAY.get(actor.role, ()):
        raise Forbidden(
            f"The role {actor.role} may not set an appraisal policy, which says whose evidence counts; ask an admin."
        )
    if wanted.policy.mode is not PolicyMode.OFF and not wanted.anchors:
        raise AttestationPolicyInvalid(
            f"The mode {wanted.policy.mode} needs at least one anchor: nobody would vouch for any evidence."
        )
    for one in wanted.anchors:
        read_anchor(one.pem, bytes.fromhex(one.identifier), now=now)


def set_policy(tx: Connection, actor: Actor, policy_id: str | None, wanted: PolicyRequest, *, now: datetime) -> str:
    """Record a policy that was checked, or a new version of the one with this id; returns its id."""
    policy = wanted.policy.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    anchors = [{"pem": one.pem, "types": list(one.types), "identifier": one.identifier} for one in wanted.anchors]
    if policy_id is not None:
        attestation.replace_policy(tx, actor.tenant_id, policy_id, policy, anchors, now=now)
        return policy_id
    record = PolicyRecord(secrets.token_hex(8), actor.tenant_id, 1, policy, anchors, now)
    attestation.add_policy(tx, record)
    return record.id


def in_audit(wanted: PolicyRequest | None, *, now: datetime) -> dict[str, Any]:
    """Return what an audit entry says of a policy that was set: its mode, and each anchor's SHA-256."""
    if wanted is None:
        return {}
    anchors = [read_anchor(one.pem, bytes.fromhex(one.identifier), now=now).fingerprint for one in wanted.anchors]
    return {"attestation": wanted.policy.mode, "anchors": anchors}


def find_policy(tx: Connection, tenant_id: str, policy_id: str | None) -> RegisteredPolicy | None:
    """Return a policy by its id, ``None`` for none; raises ``NotFound``."""
    return None if policy_id is None else RegisteredPolicy.of(attestation.get_policy(tx, tenant_id, policy_id))


@dataclass(eq=False, repr=False)
class AttestationPolicies:
    """Reads the policies of enrolment tokens and manufacturers."""

    _database: Database

    def of_profiles(
        self, tenant_id: str, profiles: Sequence[EnrolmentProfile]
    ) -> Mapping[str | None, RegisteredPolicy]:
        """Return the policies of enrolment profiles by their ids."""
        return self.of_ids(tenant_id, [one.attestation_policy_id for one in profiles])

    def of_ids(self, tenant_id: str, policy_ids: Sequence[str | None]) -> Mapping[str | None, RegisteredPolicy]:
        """Return policies by their ids, of which ``None`` are passed over."""
        ids = [policy_id for policy_id in policy_ids if policy_id is not None]
        with self._database.snapshot() as tx:
            found = attestation.policies_by_id(tx, tenant_id, ids)
        return {policy_id: RegisteredPolicy.of(record) for policy_id, record in found.items()}
