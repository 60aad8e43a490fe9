"""The tables of the database with the constraints that have the last word."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from core.device_status import DeviceStatus
from core.states import (
    Approval,
    CertificateStatus,
    DeliveryStatus,
    EnrolmentStatus,
    EventDeliveryStatus,
    IssuerKind,
    IssuerStatus,
    ManufacturerStatus,
)

StateName = TypeVar("StateName", bound=StrEnum)
DEFAULT_TENANT = "default"
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows by itself only in INTEGER columns


class NaiveTimeError(ValueError, sa.exc.DontWrapMixin):
    """A time without a zone; SQLAlchemy raises it as it is."""


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware UTC time, to the microsecond; SQLite, which knows no zones, holds it as UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a time to UTC; raises ``NaiveTimeError`` for one without a zone, which is always a mistake."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise NaiveTimeError("a time without a zone must not reach the database")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return the time with its zone, UTC."""
        if value is None:
            return None
        time: datetime = value
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


class State(sa.TypeDecorator[StateName]):
    """A text of which only the values of an enum are used; a row holds the member."""

    impl = sa.String
    cache_ok = True

    def __init__(self, states: type[StateName], length: int = 16) -> None:
        """Take the enum, and the length that the column has in the database."""
        super().__init__(length)
        self.states = states

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Hand the member's text to the driver; a constraint of the table refuses any other."""
        return None if value is None else str(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> StateName | None:
        """Return the member."""
        return None if value is None else self.states(value)


def _one_of(column: str, *values: str) -> str:
    allowed = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({allowed})"


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can find it and an error can be told from another."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


# --- Tenants ---------------------------------------------------------------------------------------------------------


class Tenant(Base):
    """Who owns rows; one, ``default``, at first."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class IdempotencyKey(Base):
    """The sealed answer to a request that may be repeated; the key itself is not here, only a hash of it."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (sa.Index("ix_idempotency_keys_expiry", "expires_at"),)

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"), primary_key=True)
    key_hash: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    request_hash: Mapped[str] = mapped_column(sa.String(64))
    sealed_answer: Mapped[bytes] = mapped_column(sa.LargeBinary)
    generation: Mapped[int] = mapped_column(sa.BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Token(Base):
    """An operator's token, by the hash of its secret."""

    __tablename__ = "tokens"
    __table_args__ = (
        sa.CheckConstraint(_one_of("role", "admin", "operator", "auditor"), name="role"),
        sa.UniqueConstraint("token_hash"),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(sa.String(64))
    role: Mapped[str] = mapped_column(sa.String(16))
    token_hash: Mapped[str] = mapped_column(sa.String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class AuditEntry(Base):
    """Who did what, to what, when, from where, with which outcome; never changed, never removed."""

    __tablename__ = "audit_entries"
    __table_args__ = (
        sa.CheckConstraint(_one_of("outcome", "done", "refused"), name="outcome"),
        sa.UniqueConstraint("tenant_id", "number"),
        sa.Index("ix_audit_entries_object", "tenant_id", "object", "id"),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    actor: Mapped[str] = mapped_column(sa.String(128))
    action: Mapped[str] = mapped_column(sa.String(64))
    object: Mapped[str] = mapped_column(sa.String(128))
    outcome: Mapped[str] = mapped_column(sa.String(16))
    request_id: Mapped[str] = mapped_column(sa.String(64))
    address: Mapped[str] = mapped_column(sa.String(64))
    detail: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    # From 1 on without a gap, each with the hash of the one before: see workflows/audit.py.
    number: Mapped[int] = mapped_column(sa.BigInteger)
    previous_hash: Mapped[str] = mapped_column(sa.String(64))
    hash: Mapped[str] = mapped_column(sa.String(64))


class AuditHead(Base):
    """The last entry of the audit record, so that a missing one is noticed."""

    __tablename__ = "audit_heads"

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"), primary_key=True)
    number: Mapped[int] = mapped_column(sa.BigInteger)
    hash: Mapped[str] = mapped_column(sa.String(64))


class BrokerState(Base):
    """Which generation the broker should hold, with the newest one it was seen to enforce."""

    __tablename__ = "broker_state"
    __table_args__ = (
        sa.CheckConstraint("applied_generation <= generation", name="applied_generation"),
        sa.CheckConstraint("generation >= 0", name="generation"),
    )

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"), primary_key=True)
    generation: Mapped[int] = mapped_column(sa.BigInteger)
    applied_generation: Mapped[int] = mapped_column(sa.BigInteger)
    applied_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # Since when there has been a generation that the broker was not seen to enforce.
    pending_since: Mapped[datetime | None] = mapped_column(UtcDateTime)


# --- Devices, certificates and their issuers -------------------------------------------------------------------------


class Device(Base):
    """A device, under the UUID that is its identity everywhere."""

    __tablename__ = "devices"
    __table_args__ = (
        sa.UniqueConstraint("tenant_id", "id"),  # what composite foreign keys refer to
        sa.UniqueConstraint("tenant_id", "external_id"),
        sa.CheckConstraint(_one_of("status", *DeviceStatus), name="status"),
        sa.CheckConstraint("(status = 'revoked') = (revoked_at IS NOT NULL)", name="revoked_at"),
        sa.CheckConstraint("(status = 'revoked') = (revocation_reason IS NOT NULL)", name="revocation_reason"),
        sa.CheckConstraint("length(id) = 36", name="id_is_uuid"),
        sa.Index("ix_devices_newest", "tenant_id", "created_at", "id"),
        sa.Index("ix_devices_status", "tenant_id", "status", "created_at", "id"),
        sa.Index("ix_devices_type", "tenant_id", "type", "created_at", "id"),
        sa.Index("ix_devices_location", "tenant_id", "location", "created_at", "id"),
        sa.Index(
            "ix_devices_generation",
            "tenant_id",
            "generation",
            sqlite_where=sa.text("generation > 0"),
            postgresql_where=sa.text("generation > 0"),
        ),
        sa.Index(
            "ix_devices_own_topics",
            "tenant_id",
            "generation",
            sqlite_where=sa.text("own_topics"),
            postgresql_where=sa.text("own_topics"),
        ),
        sa.Index(
            "ix_devices_out",
            "tenant_id",
            "generation",
            sqlite_where=sa.text("status IN ('revoked', 'suspended')"),
            postgresql_where=sa.text("status IN ('revoked', 'suspended')"),
        ),
    )

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    external_id: Mapped[str | None] = mapped_column(sa.String(128))
    name: Mapped[str] = mapped_column(sa.String(128))
    type: Mapped[str] = mapped_column(sa.String(64))
    location: Mapped[str] = mapped_column(sa.String(128))
    firmware: Mapped[str] = mapped_column(sa.String(64))
    # "metadata" belongs to SQLAlchemy as an attribute; the column keeps the plain name.
    device_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", sa.JSON)
    own_topics: Mapped[bool] = mapped_column(default=False)
    status: Mapped[DeviceStatus] = mapped_column(State(DeviceStatus))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revocation_reason: Mapped[str | None] = mapped_column(sa.String(32))
    # The generation at which the broker's view of it last changed; 0: the broker need not be told.
    generation: Mapped[int] = mapped_column(sa.BigInteger, default=0)


class AclEntry(Base):
    """A topic of a device that has topics of its own; a device without any has the default ones."""

    __tablename__ = "acl_entries"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.UniqueConstraint("device_id", "filter"),
        sa.CheckConstraint(_one_of("access", "read", "write", "readwrite"), name="access"),
    )

    device_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.String(64))
    filter: Mapped[str] = mapped_column(sa.String(256))
    access: Mapped[str] = mapped_column(sa.String(16))


class IssuerRow(Base):
    """A certificate authority of the portal; its key is elsewhere."""

    __tablename__ = "issuers"
    __table_args__ = (
        sa.CheckConstraint(_one_of("kind", *IssuerKind), name="kind"),
        sa.CheckConstraint(_one_of("status", *IssuerStatus), name="status"),
        sa.UniqueConstraint("name"),
        sa.UniqueConstraint("fingerprint"),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(sa.String(64))
    kind: Mapped[IssuerKind] = mapped_column(State(IssuerKind))
    status: Mapped[IssuerStatus] = mapped_column(State(IssuerStatus))
    der: Mapped[bytes] = mapped_column(sa.LargeBinary)
    fingerprint: Mapped[str] = mapped_column(sa.String(64))
    not_after: Mapped[datetime] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # The last active one that has it is the one that issues; NULL: trusted already, not issuing yet.
    issuing_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # The generation of the last change to what its CRL must list.
    revoked_generation: Mapped[int] = mapped_column(sa.BigInteger, default=0)


class Crl(Base):
    """The newest CRL of an issuer."""

    __tablename__ = "crls"
    __table_args__ = (
        sa.CheckConstraint("number > 0", name="number"),
        sa.CheckConstraint("this_update < next_update", name="validity"),
    )

    issuer_id: Mapped[int] = mapped_column(sa.ForeignKey("issuers.id"), primary_key=True, autoincrement=False)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    number: Mapped[int] = mapped_column(sa.BigInteger)
    this_update: Mapped[datetime] = mapped_column(UtcDateTime)
    next_update: Mapped[datetime] = mapped_column(UtcDateTime)
    generation: Mapped[int] = mapped_column(sa.BigInteger)
    der: Mapped[bytes] = mapped_column(sa.LargeBinary)


class Certificate(Base):
    """A certificate the portal issued: to a device, a server of its own, or a canary.

    A ``lost`` one was issued after the copy that a restore has put back: it stays on the CRL.
    """

    __tablename__ = "certificates"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.UniqueConstraint("issuer_id", "serial_number"),
        sa.UniqueConstraint("fingerprint"),
        sa.CheckConstraint(_one_of("purpose", "device", "server", "canary", "lost"), name="purpose"),
        sa.CheckConstraint("(purpose = 'device') = (device_id IS NOT NULL)", name="owner"),
        sa.CheckConstraint(_one_of("status", *CertificateStatus), name="status"),
        sa.CheckConstraint("(status IN ('held', 'revoked')) = (revoked_at IS NOT NULL)", name="revoked_at"),
        sa.CheckConstraint("(revoked_at IS NULL) = (revocation_reason IS NULL)", name="revocation_reason"),
        sa.CheckConstraint("not_before < not_after", name="validity"),
        sa.CheckConstraint(
            "status IN ('held', 'revoked') OR (status = 'replaced') = (replaced_until IS NOT NULL)",
            name="replaced_until",
        ),
        sa.Index(
            "uq_certificates_one_active_a_device",
            "device_id",
            unique=True,
            sqlite_where=sa.text("status IN ('active', 'held') AND replaced_until IS NULL"),
            postgresql_where=sa.text("status IN ('active', 'held') AND replaced_until IS NULL"),
        ),
        sa.Index(
            "ix_certificates_generation",
            "generation",
            sqlite_where=sa.text("generation > 0"),
            postgresql_where=sa.text("generation > 0"),
        ),
        sa.Index(
            "ix_certificates_replaced",
            "replaced_until",
            sqlite_where=sa.text("status = 'replaced'"),
            postgresql_where=sa.text("status = 'replaced'"),
        ),
        sa.Index("ix_certificates_device", "device_id", "id"),
        sa.Index(
            "ix_certificates_end",  # of those in use
            "tenant_id",
            "not_after",
            "device_id",
            sqlite_where=sa.text("status IN ('active', 'held') AND replaced_until IS NULL"),
            postgresql_where=sa.text("status IN ('active', 'held') AND replaced_until IS NULL"),
        ),
        sa.Index(
            "ix_certificates_crl",  # with the id, so that which ones there are is read from it alone
            "issuer_id",
            "status",
            "not_after",
            "id",
            sqlite_where=sa.text("status IN ('held', 'revoked')"),
            postgresql_where=sa.text("status IN ('held', 'revoked')"),
        ),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    issuer_id: Mapped[int] = mapped_column(sa.ForeignKey("issuers.id"))
    device_id: Mapped[str | None] = mapped_column(sa.String(36))
    purpose: Mapped[str] = mapped_column(sa.String(16))
    serial_number: Mapped[str] = mapped_column(sa.String(40))
    fingerprint: Mapped[str] = mapped_column(sa.String(64))
    der: Mapped[bytes] = mapped_column(sa.LargeBinary)
    not_before: Mapped[datetime] = mapped_column(UtcDateTime)
    not_after: Mapped[datetime] = mapped_column(UtcDateTime)
    issued_at: Mapped[datetime] = mapped_column(UtcDateTime)
    status: Mapped[CertificateStatus] = mapped_column(State(CertificateStatus))
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revocation_reason: Mapped[str | None] = mapped_column(sa.String(32))
    # Of one that another has replaced: until when it goes on, at the longest or until the other was seen in use.
    replaced_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ends_when_used: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    # The generation at which it last came onto its issuer's CRL or went from it; 0: it never was on one.
    generation: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")


class Delivery(Base):
    """A bundle that waits for its one download; the bundle is gone once delivered, expired or revoked."""

    __tablename__ = "deliveries"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.CheckConstraint(_one_of("status", *DeliveryStatus), name="status"),
        sa.CheckConstraint("(status IN ('ready', 'fetching')) = (bundle IS NOT NULL)", name="bundle"),
        sa.CheckConstraint(_one_of("format", "zip", "p12", "pem"), name="format"),
        sa.CheckConstraint("(status = 'fetching') = (lease_until IS NOT NULL)", name="lease"),
        sa.Index("ix_deliveries_device", "device_id"),
        sa.Index(
            "ix_deliveries_expiry",
            "expires_at",
            sqlite_where=sa.text("status IN ('ready', 'fetching')"),
            postgresql_where=sa.text("status IN ('ready', 'fetching')"),
        ),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    device_id: Mapped[str] = mapped_column(sa.String(36))
    certificate_id: Mapped[int] = mapped_column(sa.ForeignKey("certificates.id"))
    status: Mapped[DeliveryStatus] = mapped_column(State(DeliveryStatus))
    bundle: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    format: Mapped[str] = mapped_column(sa.String(8), server_default="zip")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    delivered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


# --- Enrolment -------------------------------------------------------------------------------------------------------

_APPROVALS = "approval IN ('at_once', 'operator')"
_VALIDITY = "validity_days BETWEEN 1 AND 36500"


class _Profile:
    """What becomes of a device that is let in: the columns of its registration, with what it must keep to."""

    type: Mapped[str] = mapped_column(sa.String(64))
    location: Mapped[str] = mapped_column(sa.String(128))
    firmware: Mapped[str] = mapped_column(sa.String(64))
    name_template: Mapped[str] = mapped_column(sa.String(128))
    key_types: Mapped[list[str]] = mapped_column(sa.JSON)
    validity_days: Mapped[int | None]
    approval: Mapped[Approval] = mapped_column(State(Approval))


class EnrolmentToken(_Profile, Base):
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


class Manufacturer(_Profile, Base):
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


class Reenrolment(Base):
    """What a device that has enrolled asks for now, until it has it: one key, about which an operator decides."""

    __tablename__ = "reenrolments"
    __table_args__ = (
        sa.CheckConstraint("status IN ('waiting', 'approved', 'rejected')", name="status"),
        sa.CheckConstraint("(status = 'waiting') = (decided_at IS NULL)", name="decided_at"),
        sa.Index(
            "ix_reenrolments_waiting",
            "tenant_id",
            "asked_at",
            sqlite_where=sa.text("status = 'waiting'"),
            postgresql_where=sa.text("status = 'waiting'"),
        ),
    )

    enrolment_id: Mapped[int] = mapped_column(BigId, sa.ForeignKey("enrolments.id"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    key_fingerprint: Mapped[str] = mapped_column(sa.String(64))  # SHA-256 of the key to be certified
    status: Mapped[EnrolmentStatus] = mapped_column(State(EnrolmentStatus))
    asked_at: Mapped[datetime] = mapped_column(UtcDateTime)
    decided_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


# --- Events ----------------------------------------------------------------------------------------------------------


class Webhook(Base):
    """A subscription: the address that events are sent to, with its sealed secret."""

    __tablename__ = "webhooks"
    __table_args__ = (
        sa.UniqueConstraint("tenant_id", "id"),  # what composite foreign keys refer to
    )

    id: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(sa.String(64))
    url: Mapped[str] = mapped_column(sa.String(2048))
    # The types wanted, a comma on either side of each, or * for all of them, those of later versions too.
    events: Mapped[str] = mapped_column(sa.String(512))
    sealed_secret: Mapped[bytes] = mapped_column(sa.LargeBinary)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class WebhookDelivery(Base):
    """An event on its way to one subscriber; ``waiting`` until it was taken or given up as ``dead``."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "webhook_id"], ["webhooks.tenant_id", "webhooks.id"]),
        sa.CheckConstraint("status IN ('waiting', 'delivered', 'dead')", name="status"),
        sa.CheckConstraint("(status = 'waiting') = (ended_at IS NULL)", name="ended_at"),
        sa.CheckConstraint("status = 'waiting' OR lease_until IS NULL", name="lease"),
        sa.CheckConstraint("attempts >= 0", name="attempts"),
        sa.Index("ix_webhook_deliveries_webhook", "webhook_id", "id"),
        sa.Index("ix_webhook_deliveries_event", "event_id"),
        sa.Index("ix_webhook_deliveries_ended", "ended_at"),
        sa.Index(
            "ix_webhook_deliveries_dead",
            "webhook_id",
            sqlite_where=sa.text("status = 'dead'"),
            postgresql_where=sa.text("status = 'dead'"),
        ),
        sa.Index(
            "ix_webhook_deliveries_due",
            "webhook_id",
            "next_at",
            sqlite_where=sa.text("status = 'waiting'"),
            postgresql_where=sa.text("status = 'waiting'"),
        ),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.String(64))
    webhook_id: Mapped[str] = mapped_column(sa.String(16))
    event_id: Mapped[str] = mapped_column(sa.String(32))
    type: Mapped[str] = mapped_column(sa.String(32))
    device_id: Mapped[str | None] = mapped_column(sa.String(36))
    body: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    status: Mapped[EventDeliveryStatus] = mapped_column(State(EventDeliveryStatus))
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # Whoever sends it has it until then; after that it counts as not sent, and is sent again.
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_problem: Mapped[str | None] = mapped_column(sa.String(256))
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class ExpiryAnnouncement(Base):
    """A certificate of which was said that it ends soon, so that it is said once."""

    __tablename__ = "expiry_announcements"

    certificate_id: Mapped[int] = mapped_column(sa.ForeignKey("certificates.id"), primary_key=True, autoincrement=False)
    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"))
    announced_at: Mapped[datetime] = mapped_column(UtcDateTime)


METADATA = Base.metadata
