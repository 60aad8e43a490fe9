"""The table of devices that have enrolled and ask again with another key."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from core.states import EnrolmentStatus
from store.tables import Base, BigId, State, UtcDateTime


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
