"""The tables of devices that enrol by themselves: who lets them in, who has asked."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from core.states import Approval, EnrolmentStatus, ManufacturerStatus
from store.tables import Base, BigId, State, UtcDateTime

_APPROVALS = "approval IN ('at_once', 'operator')"
_VALIDITY = "validity_days BETWEEN 1 AND 36500"


class _Terms:
    """What becomes of a device that is let in: the columns of its registration, with what it must keep to."""

    type: Mapped[str] = mapped_column(sa.String(64))
    location: Mapped[str] = mapped_column(sa.String(128))
    firmware: Mapped[str] = mapped_column(sa.String(64))
    name_template: Mapped[str] = mapped_column(sa.String(128))
    key_types: Mapped[list[str]] = mapped_column(sa.JSON)
    validity_days: Mapped[int | None]
    approval: Mapped[Approval] = mapped_column(State(Approval))


class EnrolmentToken(_Terms, Base):
    """A secret, by its hash, with which devices enrol: one that is known already, or as many as ``uses_allowed``."""

    __tablename__ = "enrolment_tokens"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.UniqueConstraint("secret_hash"),
        sa.UniqueConstraint("tenant_id", "id"),
        sa.CheckConstraint(_APPROVALS, name="approval"),
        sa.CheckConstraint(_VALIDITY, name="validity_days"),
        sa.CheckConstraint("uses BETWEEN 0 AND uses_allowed", name="uses"),
        sa.CheckConstraint("device_id IS NULL OR uses_allowed = 1", name="one_device"),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    secret_hash: Mapped[str] = mapped_column(sa.String(64))
    name: Mapped[str] = mapped_column(sa.String(64))
    device_id: Mapped[str | None] = mapped_column(sa.String(36))
    uses_allowed: Mapped[int]
    uses: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Manufacturer(_Terms, Base):
    """A CA whose certificates devices are born with; it counts once somebody has shown to have its key."""

    __tablename__ = "manufacturers"
    __table_args__ = (
        sa.UniqueConstraint("tenant_id", "id"),
        sa.CheckConstraint(_APPROVALS, name="approval"),
        sa.CheckConstraint(_VALIDITY, name="validity_days"),
        sa.CheckConstraint("status IN ('unproven', 'registered', 'removed')", name="status"),
        sa.CheckConstraint("status != 'registered' OR proven_at IS NOT NULL", name="proven_at"),
        sa.CheckConstraint("(status = 'removed') = (removed_at IS NOT NULL)", name="removed_at"),
        sa.Index(
            "uq_manufacturers_one_of_a_ca",
            "tenant_id",
            "fingerprint",
            unique=True,
            sqlite_where=sa.text("status != 'removed'"),
            postgresql_where=sa.text("status != 'removed'"),
        ),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(sa.String(64))
    der: Mapped[bytes] = mapped_column(sa.LargeBinary)
    fingerprint: Mapped[str] = mapped_column(sa.String(64))
    not_after: Mapped[datetime] = mapped_column(UtcDateTime)
    status: Mapped[ManufacturerStatus] = mapped_column(State(ManufacturerStatus))
    nonce: Mapped[str] = mapped_column(sa.String(64))
    nonce_expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    proven_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    removed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Enrolment(Base):
    """A device that has asked to be let in, once however often it asks.

    ``identity`` tells one device from another among those that come by the same token or manufacturer: the SHA-256 of
    the key in its CSR, or of the key in the certificate it was born with.
    """

    __tablename__ = "enrolments"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.ForeignKeyConstraint(["tenant_id", "token_id"], ["enrolment_tokens.tenant_id", "enrolment_tokens.id"]),
        sa.ForeignKeyConstraint(["tenant_id", "manufacturer_id"], ["manufacturers.tenant_id", "manufacturers.id"]),
        sa.UniqueConstraint("tenant_id", "token_id", "identity"),
        sa.UniqueConstraint("tenant_id", "manufacturer_id", "identity"),
        sa.CheckConstraint("(token_id IS NULL) != (manufacturer_id IS NULL)", name="means"),
        sa.CheckConstraint("status IN ('waiting', 'approved', 'issued', 'rejected')", name="status"),
        sa.CheckConstraint("(status = 'issued') = (certificate_id IS NOT NULL)", name="certificate"),
        sa.Index("ix_enrolments_device", "tenant_id", "device_id"),
        sa.Index(
            "ix_enrolments_waiting",
            "tenant_id",
            "created_at",
            sqlite_where=sa.text("status = 'waiting'"),
            postgresql_where=sa.text("status = 'waiting'"),
        ),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    device_id: Mapped[str] = mapped_column(sa.String(36))
    token_id: Mapped[str | None] = mapped_column(sa.String(32))
    manufacturer_id: Mapped[str | None] = mapped_column(sa.String(32))
    identity: Mapped[str] = mapped_column(sa.String(64))
    key_fingerprint: Mapped[str] = mapped_column(sa.String(64))  # SHA-256 of the key to be certified
    status: Mapped[EnrolmentStatus] = mapped_column(State(EnrolmentStatus))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    decided_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    certificate_id: Mapped[int | None] = mapped_column(sa.ForeignKey("certificates.id"))
