"""The tables of events: who subscribed to them, what waits to be sent, which ends were announced."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from core.states import EventDeliveryStatus
from store.tables import Base, BigId, State, UtcDateTime


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
