"""The tables of device attestation: appraisal policies, nonces, and what came of evidence."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from core import states
from store.columns import OfTenant, one_of, partial_index
from store.database import Base


class AttestationPolicyRow(OfTenant, Base):
    """An appraisal policy with its trust anchors, that of one enrolment token or manufacturer.

    ``version`` counts its changes. ``policy`` is an ``attestation.appraisal.AppraisalPolicy``; ``anchors`` has each
    with ``pem``, ``types`` (empty for all) and ``identifier`` (in hex).
    """

    __tablename__ = "attestation_policies"
    __table_args__ = (
        sa.CheckConstraint("version > 0", name="version"),
        partial_index("ix_attestation_policies_changed", "id", "version", where="version > 1"),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    version: Mapped[int]
    policy: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    anchors: Mapped[list[Any]] = mapped_column(sa.JSON)
    updated_at: Mapped[datetime]


class AttestationNonce(OfTenant, Base):
    """A nonce that somebody, the ``holder``, has been given, by its SHA-256; once spent it has no ``seed`` any more."""

    __tablename__ = "attestation_nonces"
    __table_args__ = (
        sa.CheckConstraint("(seed IS NULL) = (spent_at IS NOT NULL)", name="seed"),
        sa.Index("ix_attestation_nonces_holder", "tenant_id", "holder"),
        sa.Index("ix_attestation_nonces_expiry", "expires_at"),
    )

    nonce_hash: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    seed: Mapped[bytes | None]
    holder: Mapped[str] = mapped_column(sa.String(96))
    expires_at: Mapped[datetime]
    spent_at: Mapped[datetime | None]


class AttestationRow(OfTenant, Base):
    """What came of the newest evidence of a device, by the policy as it was in ``policy_version``.

    ``evidence_digest`` and ``key_fingerprint`` are SHA-256 in hex: of the evidence, and of the key for which it was.
    """

    __tablename__ = "attestations"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.CheckConstraint(one_of("verdict", *states.AttestationVerdict), name="verdict"),
        sa.CheckConstraint("(verdict = 'passed') = (code = '')", name="code"),
        sa.Index("ix_attestations_policy", "policy_id", "policy_version", "device_id"),
    )

    device_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    policy_id: Mapped[str] = mapped_column(sa.String(32), sa.ForeignKey("attestation_policies.id"))
    policy_version: Mapped[int]
    type: Mapped[str] = mapped_column(sa.String(16))
    verdict: Mapped[states.AttestationVerdict]
    code: Mapped[str] = mapped_column(sa.String(64))
    problems: Mapped[list[str]] = mapped_column(sa.JSON)
    claims: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    evidence_digest: Mapped[str] = mapped_column(sa.String(64))
    key_fingerprint: Mapped[str] = mapped_column(sa.String(64))
    appraised_at: Mapped[datetime]
