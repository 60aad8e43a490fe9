"""The tables of brokers, which belong to the installation and to no tenant."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from store.columns import one_of
from store.database import Base
from store.node_tables import OF_NODES


class Broker(Base):
    """A broker, and the newest generation that it was seen to enforce.

    ``kind`` says who tells it: a portal ``node`` that runs beside it, or an ``agent``. It counts, for what is enforced,
    from ``joined_at`` on, and not while it is declared away (``away_since``).
    """

    __tablename__ = "brokers"
    __table_args__ = (
        sa.CheckConstraint(one_of("kind", "node", "agent"), name="kind"),
        sa.CheckConstraint(one_of("engine", "mosquitto", "rabbitmq"), name="engine"),
        sa.CheckConstraint("applied_generation >= 0", name="applied_generation"),
        sa.UniqueConstraint("name"),
    )

    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(63))
    kind: Mapped[str] = mapped_column(sa.String(16))
    engine: Mapped[str] = mapped_column(sa.String(16))
    # Of the node that it runs beside; NULL while the installation has one node, or for an agent's.
    node_id: Mapped[int | None] = mapped_column(sa.Integer)
    # What clients connect to, for people to read.
    address: Mapped[str | None] = mapped_column(sa.String(255))
    created_at: Mapped[datetime]
    joined_at: Mapped[datetime | None]
    away_since: Mapped[datetime | None]
    applied_generation: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    applied_at: Mapped[datetime | None]
    # When it, or who tells it, was last heard of, and what was wrong then.
    reported_at: Mapped[datetime | None]
    problem: Mapped[str | None] = mapped_column(sa.String(1000))
    # When it was last known who is connected to it, and whether it is known since. Of the broker of an only node that
    # is in a file of its data folder.
    presence_at: Mapped[datetime | None]
    presence_known: Mapped[bool] = mapped_column(server_default=sa.false())


class EnforcementSteps(Base):
    """When a broker was seen to obey the changes after generation ``since`` up to ``generation``, step by step."""

    __tablename__ = "enforcement_steps"
    __table_args__ = OF_NODES

    broker_id: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    generation: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    since: Mapped[int] = mapped_column(sa.BigInteger)
    at: Mapped[datetime]  # when these changes were first read, to be proven
    denied_at: Mapped[datetime | None]
    refused_at: Mapped[datetime | None]
    cut_at: Mapped[datetime | None]
    enforced_at: Mapped[datetime | None]
    problem: Mapped[str] = mapped_column(sa.String(1000))
