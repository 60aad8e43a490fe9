"""The tables of certificate profiles, and of the names that certificates give to devices."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from store.columns import BigId, OfTenant, partial_index
from store.database import Base


class CertificateProfileRow(OfTenant, Base):
    """A certificate profile. The row of a removed one stays, for the devices that had it; its name is free again.

    A row is changed, never replaced: a device is renewed under its profile as that is then.
    """

    __tablename__ = "certificate_profiles"
    __table_args__ = (
        sa.CheckConstraint("name <> 'default'", name="not_built_in"),
        sa.CheckConstraint("default_days BETWEEN 1 AND 36500", name="default_days"),
        sa.CheckConstraint("max_days BETWEEN 1 AND 36500", name="max_days"),
        sa.CheckConstraint("default_days <= max_days", name="days"),
        partial_index("uq_certificate_profiles_name", "tenant_id", "name", where="removed_at IS NULL", unique=True),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64))
    default_days: Mapped[int | None]
    max_days: Mapped[int | None]
    key_types: Mapped[list[str]] = mapped_column(sa.JSON)
    extended_key_usage: Mapped[list[str]] = mapped_column(sa.JSON)
    dns_names: Mapped[list[str]] = mapped_column(sa.JSON)
    ip_addresses: Mapped[list[str]] = mapped_column(sa.JSON)
    organization: Mapped[str | None] = mapped_column(sa.String(256))
    organizational_unit: Mapped[str | None] = mapped_column(sa.String(256))
    serial_number: Mapped[str | None] = mapped_column(sa.String(256))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    removed_at: Mapped[datetime | None]


class DeviceName(OfTenant, Base):
    """A DNS name or address that certificates give to a device, and ``certificate_id``, the last of them.

    One name is one device's in its tenant. It is free for another device once the first one's certificates up to that
    one are revoked or have expired (``store/names.py``).
    """

    __tablename__ = "device_names"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.Index("ix_device_names_device", "device_id"),
    )

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(253), primary_key=True)  # in lower case
    device_id: Mapped[str] = mapped_column(sa.String(36))
    certificate_id: Mapped[int] = mapped_column(BigId, sa.ForeignKey("certificates.id"))
