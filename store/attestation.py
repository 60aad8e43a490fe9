"""Appraisal policies, nonces, and what came of the evidence of devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import NotFound
from core.states import AttestationVerdict
from store.attestation_tables import AttestationNonce, AttestationPolicyRow, AttestationRow
from store.database import columns_of
from store.devices import update_device

# --- Policies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PolicyRecord:
    """An appraisal policy and its anchors, in JSON, as ``AttestationPolicyRow`` says."""

    id: str
    tenant_id: str
    version: int
    policy: dict[str, Any]
    anchors: list[dict[str, Any]]
    updated_at: datetime


_policy = AttestationPolicyRow
_POLICIES = sa.select(*columns_of(PolicyRecord, _policy))


def add_policy(tx: Connection, record: PolicyRecord) -> None:
    """Record a policy."""
    tx.execute(sa.insert(_policy), {name: getattr(record, name) for name in PolicyRecord.__slots__})


def replace_policy(
    tx: Connection,
    tenant_id: str,
    policy_id: str,
    policy: dict[str, Any],
    anchors: list[dict[str, Any]],
    *,
    now: datetime,
) -> None:
    """Replace the content of a policy; its version rises by one."""
    values = {"policy": policy, "anchors": anchors, "updated_at": now, "version": _policy.version + 1}
    tx.execute(sa.update(_policy).where(_policy.tenant_id == tenant_id, _policy.id == policy_id).values(values))


def get_policy(tx: Connection, tenant_id: str, policy_id: str) -> PolicyRecord:
    """Read a policy; raises ``NotFound``."""
    row = tx.execute(_POLICIES.where(_policy.tenant_id == tenant_id, _policy.id == policy_id)).one_or_none()
    if row is None:
        raise NotFound(
            "There is no appraisal policy with this id; an enrolment token or manufacturer shows its policy_id."
        )
    return PolicyRecord(*row)


def policies_by_id(tx: Connection, tenant_id: str, policy_ids: Sequence[str]) -> dict[str, PolicyRecord]:
    """Return policies by their ids."""
    if not policy_ids:
        return {}
    rows = tx.execute(_POLICIES.where(_policy.tenant_id == tenant_id, _policy.id.in_(policy_ids)))
    return {row.id: PolicyRecord(*row) for row in rows}


# --- Nonces ----------------------------------------------------------------------------------------------------------


class NonceState(Enum):
    """What is known of a nonce that somebody presents."""

    GOOD = auto()
    UNKNOWN = auto()  # or somebody else's
    SPENT = auto()
    EXPIRED = auto()


@dataclass(frozen=True, slots=True)
class SpentNonce:
    """A nonce as it was when it was presented; it has a ``seed`` only if it was good."""

    state: NonceState
    seed: bytes = field(default=b"", repr=False)


_nonce = AttestationNonce
_COUNT_NONCES = (
    sa.select(sa.func.count())
    .select_from(_nonce)
    .where(_nonce.tenant_id == sa.bindparam("of_tenant"), _nonce.holder == sa.bindparam("of_holder"))
)
_FIND_NONCE = (
    sa.select(_nonce.seed, _nonce.expires_at)
    .where(
        _nonce.nonce_hash == sa.bindparam("of_nonce"),
        _nonce.tenant_id == sa.bindparam("of_tenant"),
        _nonce.holder == sa.bindparam("of_holder"),
    )
    .with_for_update()
)


def add_nonce(
    tx: Connection,
    tenant_id: str,
    holder: str,
    *,
    nonce_hash: str,
    seed: bytes,
    expires_at: datetime,
    limit: int,
) -> None:
    """Record a nonce for its holder; of more than ``limit`` the oldest are deleted."""
    surplus = tx.execute(_COUNT_NONCES, {"of_tenant": tenant_id, "of_holder": holder}).scalar_one() + 1 - limit
    if surplus > 0:
        own = (_nonce.tenant_id == tenant_id, _nonce.holder == holder)
        oldest = sa.select(_nonce.nonce_hash).where(*own).order_by(_nonce.expires_at).limit(surplus)
        tx.execute(sa.delete(_nonce).where(_nonce.nonce_hash.in_(oldest)))
    values = {"nonce_hash": nonce_hash, "tenant_id": tenant_id, "seed": seed, "holder": holder}
    tx.execute(sa.insert(_nonce), {**values, "expires_at": expires_at, "spent_at": None})


def spend_nonce(tx: Connection, tenant_id: str, holder: str, nonce_hash: str, *, now: datetime) -> SpentNonce:
    """Spend a nonce, whatever comes of it; return what it was."""
    found = {"of_nonce": nonce_hash, "of_tenant": tenant_id, "of_holder": holder}
    row = tx.execute(_FIND_NONCE, found).one_or_none()
    if row is None:
        return SpentNonce(NonceState.UNKNOWN)
    if row.seed is None:
        return SpentNonce(NonceState.SPENT)
    tx.execute(sa.update(_nonce).where(_nonce.nonce_hash == nonce_hash).values(seed=None, spent_at=now))
    return SpentNonce(NonceState.EXPIRED) if row.expires_at <= now else SpentNonce(NonceState.GOOD, row.seed)


def has_old_nonces(tx: Connection, *, before: datetime) -> bool:
    """Return whether there are nonces that expired before then."""
    return tx.execute(sa.select(sa.exists().where(_nonce.expires_at < before))).scalar_one()


def forget_nonces(tx: Connection, *, before: datetime) -> None:
    """Delete the nonces that expired before then."""
    tx.execute(sa.delete(_nonce).where(_nonce.expires_at < before))


# --- Results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttestationRecord:
    """What came of the newest evidence of a device; ``claims`` are the last that verified, or empty."""

    device_id: str
    tenant_id: str
    policy_id: str
    policy_version: int
    type: str
    verdict: AttestationVerdict
    code: str
    problems: list[str]
    claims: dict[str, Any]
    evidence_digest: str
    key_fingerprint: str
    appraised_at: datetime


_result = AttestationRow
_RESULTS = sa.select(*columns_of(AttestationRecord, _result))


def put_attestation(tx: Connection, record: AttestationRecord) -> None:
    """Record what came of a device's evidence in place of what came of its last."""
    own = (_result.tenant_id == record.tenant_id, _result.device_id == record.device_id)
    tx.execute(sa.delete(_result).where(*own))
    tx.execute(sa.insert(_result), {name: getattr(record, name) for name in AttestationRecord.__slots__})
    update_device(tx, record.tenant_id, record.device_id, {"attested": record.verdict})


def outdate_attestation(
    tx: Connection, tenant_id: str, device_id: str, *, key_fingerprint: str, code: str, problem: str
) -> None:
    """Mark what a device's evidence has shown as outdated if that was for another key."""
    passed = (_result.verdict == AttestationVerdict.PASSED, _result.key_fingerprint != key_fingerprint)
    outdated = AttestationVerdict.OUTDATED
    query = sa.update(_result).where(_result.tenant_id == tenant_id, _result.device_id == device_id, *passed)
    if tx.execute(query.values(verdict=outdated, code=code, problems=[problem])).rowcount:
        update_device(tx, tenant_id, device_id, {"attested": outdated})


def find_attestation(tx: Connection, tenant_id: str, device_id: str) -> AttestationRecord | None:
    """Return what came of a device's newest evidence, ``None`` if it has shown none."""
    own = (_result.tenant_id == tenant_id, _result.device_id == device_id)
    row = tx.execute(_RESULTS.where(*own)).one_or_none()
    return None if row is None else AttestationRecord(*row)


def results_of_older_policies(tx: Connection, *, limit: int) -> Sequence[AttestationRecord]:
    """Return results, at most ``limit``, by a version of one policy that is not its newest."""
    changed = sa.text("attestation_policies.version > 1")  # as text, like the condition of the partial index
    older = (_result.policy_id == _policy.id, _result.policy_version < _policy.version)
    behind = sa.select(_policy.id, _policy.version).where(changed, sa.exists().where(*older)).limit(1)
    policy = tx.execute(behind).one_or_none()
    if policy is None:
        return []
    query = _RESULTS.where(_result.policy_id == policy.id, _result.policy_version < policy.version)
    return [AttestationRecord(*row) for row in tx.execute(query.limit(limit))]


def update_attestation(tx: Connection, record: AttestationRecord, **values: Any) -> bool:
    """Set columns of a result, and the verdict of its device.

    One that was replaced or changed since it was read stays as it is: returns false.
    """
    columns = (_result.device_id, _result.appraised_at, _result.code, _result.policy_version)
    same = [column == getattr(record, column.key) for column in columns]
    changed = tx.execute(sa.update(_result).where(_result.tenant_id == record.tenant_id, *same).values(values))
    if not changed.rowcount:
        return False
    update_device(tx, record.tenant_id, record.device_id, {"attested": values.get("verdict", record.verdict)})
    return True
