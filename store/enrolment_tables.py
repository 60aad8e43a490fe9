"""The tables of devices that enrol: enrolment tokens, manufacturer CAs, and requests."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from core import states
from store.columns import BigId, OfTenant, partial_index
from store.database import Base

_APPROVALS = "approval IN ('at_once', 'operator')"
_REPEATED_SERIAL = "repeated_serial IN ('operator', 'same_device', 'new_device')"
_VALIDITY = "validity_days BETWEEN 1 AND 36500"


class _Profile:
    """The data that a device is registered with when it enrols, and the conditions for it."""

    type: Mapped[str] = mapped_column(sa.String(64))
    location: Mapped[str] = mapped_column(sa.String(128))
    firmware: Mapped[str] = mapped_column(sa.String(64))
    name_template: Mapped[str] = mapped_column(sa.String(128))
    key_types: Mapped[list[str]] = mapped_column(sa.JSON)
    validity_days: Mapped[int | None]
    approval: Mapped[states.Approval]
    repeated_serial: Mapped[states.RepeatedSerial] = mapped_column(server_default="new_device")
    # The certificate profile of the devices; ``NULL`` for the default one.
    profile_id: Mapped[str | None] = mapped_column(sa.String(32), sa.ForeignKey("certificate_profiles.id"))
    # ``NULL`` if evidence is not looked at.
    attestation_policy_id: Mapped[str | None] = mapped_column(sa.String(32), sa.ForeignKey("attestation_policies.id"))


class EnrolmentToken(OfTenant, _Profile, Base):
    """A secret, by its hash, with which devices enrol: one known device, or at most ``uses_allowed`` new ones."""

    __tablename__ = "enrolment_tokens"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.UniqueConstraint("secret_hash"),
        sa.Index("ix_enrolment_tokens_operator_token", "tenant_id", "operator_token_id"),
        sa.UniqueConstraint("tenant_id", "id"),
        sa.CheckConstraint(_APPROVALS, name="approval"),
        sa.CheckConstraint(_VALIDITY, name="validity_days"),
        sa.CheckConstraint("uses BETWEEN 0 AND uses_allowed", name="uses"),
        sa.CheckConstraint("device_id IS NULL OR uses_allowed = 1", name="one_device"),
        sa.CheckConstraint(_REPEATED_SERIAL, name="repeated_serial"),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    secret_hash: Mapped[str] = mapped_column(sa.String(64))
    name: Mapped[str] = mapped_column(sa.String(64))
    device_id: Mapped[str | None] = mapped_column(sa.String(36))
    uses_allowed: Mapped[int]
    uses: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    # The token of the operator who made it; ``None`` if that is not known.
    operator_token_id: Mapped[str | None] = mapped_column(sa.String(32), sa.ForeignKey("tokens.id"))


class Manufacturer(OfTenant, _Profile, Base):
    """A CA of factory certificates (IDevID); it is trusted once possession of its key was proven."""

    __tablename__ = "manufacturers"
    __table_args__ = (
        sa.UniqueConstraint("tenant_id", "id"),
        sa.CheckConstraint(_APPROVALS, name="approval"),
        sa.CheckConstraint(_VALIDITY, name="validity_days"),
        sa.CheckConstraint("status IN ('unproven', 'registered', 'removed')", name="status"),
        sa.CheckConstraint("status != 'registered' OR proven_at IS NOT NULL", name="proven_at"),
        sa.CheckConstraint("(status = 'removed') = (removed_at IS NOT NULL)", name="removed_at"),
        sa.CheckConstraint(_REPEATED_SERIAL, name="repeated_serial"),
        partial_index(
            "uq_manufacturers_one_of_a_ca", "tenant_id", "fingerprint", where="status != 'removed'", unique=True
        ),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64))
    der: Mapped[bytes]
    fingerprint: Mapped[str] = mapped_column(sa.String(64))
    not_after: Mapped[datetime]
    status: Mapped[states.ManufacturerStatus]
    nonce: Mapped[str] = mapped_column(sa.String(64))
    nonce_expires_at: Mapped[datetime]
    created_at: Mapped[datetime]
    proven_at: Mapped[datetime | None]
    removed_at: Mapped[datetime | None]


class EnrolmentRow(OfTenant, Base):
    """A device's first request for a certificate, however often it is repeated.

    ``identity`` tells one device from another among those that come by the same token or manufacturer: the SHA-256 of
    the key in its CSR, or of the key in its factory certificate. That is also the ``factory_key``, which is one
    device's whatever becomes of the manufacturer; ``None`` for one that had enrolled twice before this was so.
    ``serial_hash`` is one device's among those of a token, or of a manufacturer's CA: the SHA-256 of the serial number
    in the CSR, or of the CA's key and the serial number in the factory certificate. It is ``None`` if the token or
    manufacturer does not tell devices by it.
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
        sa.Index("uq_enrolments_one_of_a_factory_key", "tenant_id", "factory_key", unique=True),
        sa.Index("uq_enrolments_one_of_a_serial", "tenant_id", "token_id", "serial_hash", unique=True),
        partial_index(
            "uq_enrolments_one_of_a_factory_serial",
            *("tenant_id", "serial_hash"),
            where="manufacturer_id IS NOT NULL",
            unique=True,
        ),
        sa.Index("ix_enrolments_device", "tenant_id", "device_id"),
        partial_index("ix_enrolments_waiting", "tenant_id", "created_at", where="status = 'waiting'"),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    device_id: Mapped[str] = mapped_column(sa.String(36))
    token_id: Mapped[str | None] = mapped_column(sa.String(32))
    manufacturer_id: Mapped[str | None] = mapped_column(sa.String(32))
    identity: Mapped[str] = mapped_column(sa.String(64))
    factory_key: Mapped[str | None] = mapped_column(sa.String(64))
    key_fingerprint: Mapped[str] = mapped_column(sa.String(64))  # SHA-256 of the key to be certified
    status: Mapped[states.EnrolmentStatus]
    created_at: Mapped[datetime]
    decided_at: Mapped[datetime | None]
    certificate_id: Mapped[int | None] = mapped_column(sa.ForeignKey("certificates.id"))
    serial_hash: Mapped[str | None] = mapped_column(sa.String(64))
    # The serial number in the CSR or factory certificate, if it has one that is not longer.
    serial: Mapped[str | None] = mapped_column(sa.String(64))


class FactoryKey(Base):
    """A factory key that is not the one with which its device has enrolled first, by the SHA-256.

    Its certificate has that device's serial number. ``enrolment_id`` is ``None`` for the key of a revoked device that a
    restored backup did not have.
    """

    __tablename__ = "factory_keys"

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"), primary_key=True)
    factory_key: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    enrolment_id: Mapped[int | None] = mapped_column(BigId, sa.ForeignKey("enrolments.id"))


class ReenrolmentRow(OfTenant, Base):
    """The request of an enrolled device for another key, about which an operator decides."""

    __tablename__ = "reenrolments"
    __table_args__ = (
        sa.CheckConstraint("status IN ('waiting', 'approved', 'rejected')", name="status"),
        sa.CheckConstraint("(status = 'waiting') = (decided_at IS NULL)", name="decided_at"),
        partial_index("ix_reenrolments_waiting", "tenant_id", "asked_at", where="status = 'waiting'"),
    )

    enrolment_id: Mapped[int] = mapped_column(BigId, sa.ForeignKey("enrolments.id"), primary_key=True)
    key_fingerprint: Mapped[str] = mapped_column(sa.String(64))  # SHA-256 of the key to be certified
    status: Mapped[states.EnrolmentStatus]
    asked_at: Mapped[datetime]
    decided_at: Mapped[datetime | None]
