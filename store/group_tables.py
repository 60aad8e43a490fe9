"""The tables of groups: named sets of devices, with what a group sets for its members."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from store.columns import OfTenant
from store.database import Base


class DeviceGroup(OfTenant, Base):
    """A named set of devices: those of ``group_members``, or with a ``filter`` those that fit it when asked for.

    What it sets holds for members alone: who fits a filter changes with each device's description.
    """

    __tablename__ = "device_groups"
    __table_args__ = (
        sa.UniqueConstraint("tenant_id", "id"),  # what composite foreign keys refer to
        sa.UniqueConstraint("tenant_id", "name"),
        sa.CheckConstraint("validity_days BETWEEN 1 AND 36500", name="validity_days"),
        sa.CheckConstraint("members >= 0", name="members"),
        sa.CheckConstraint(
            "filter IS NULL OR (members = 0 AND topics IS NULL AND validity_days IS NULL"
            " AND attestation_policy_id IS NULL)",
            name="filter",
        ),
    )

    id: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64))
    description: Mapped[str] = mapped_column(sa.String(256))
    # The conditions of the list of devices, by their names.
    filter: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    # Pairs of filter and access, in which {id} stands for the id of each device.
    topics: Mapped[list[list[str]] | None] = mapped_column(sa.JSON(none_as_null=True))
    validity_days: Mapped[int | None]
    attestation_policy_id: Mapped[str | None] = mapped_column(sa.String(32), sa.ForeignKey("attestation_policies.id"))
    members: Mapped[int] = mapped_column(default=0, server_default="0")
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class GroupMember(Base):
    """A device in a group; ``created_at`` is the device's, for lists in its order."""

    __tablename__ = "group_members"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "group_id"], ["device_groups.tenant_id", "device_groups.id"]),
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.Index("ix_group_members_newest", "group_id", "created_at", "device_id"),
        sa.Index("ix_group_members_device", "device_id"),
    )

    group_id: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    device_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.String(64))
    created_at: Mapped[datetime]
