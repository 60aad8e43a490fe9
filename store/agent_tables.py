"""The table of agents, each beside a broker elsewhere; they belong to the installation and to no tenant."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from store.database import Base


class BrokerAgent(Base):
    """An agent: how it joins, by which certificate it is known, and which changes it was given.

    ``code_hash`` is the SHA-256, in hex, of the code with which it joins once. ``certificate`` is the fingerprint of
    the certificate that counts, ``next_certificate`` that of its successor, which counts once it is shown. ``given`` is
    the newest page that it was sent, ``held`` the one before, which it has shown to have: each a generation, the digest
    of the page, and whether that was the last one up to the generation. ``presence_session`` names the whole set of
    clients that it has begun to tell last, to which all changes belong that follow, ``presence_number`` the newest
    report of it. ``runs`` are the newest runs of the agent, the present one first: see ``store.agents.Run``.
    ``copied_since`` is set once two were seen to run with one key: up to this generation one of them alone has proven.
    """

    __tablename__ = "broker_agents"
    __table_args__ = (
        sa.UniqueConstraint("code_hash"),
        sa.UniqueConstraint("certificate"),
        sa.UniqueConstraint("next_certificate"),
        sa.CheckConstraint("(code_hash IS NULL) = (code_expires_at IS NULL)", name="code"),
    )

    broker_id: Mapped[int] = mapped_column(
        sa.ForeignKey("brokers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    code_hash: Mapped[str | None] = mapped_column(sa.String(64))
    code_expires_at: Mapped[datetime | None]
    certificate: Mapped[str | None] = mapped_column(sa.String(64))
    next_certificate: Mapped[str | None] = mapped_column(sa.String(64))
    held_generation: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")
    held_digest: Mapped[str] = mapped_column(sa.String(64), default="", server_default="")
    held_is_last: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    given_generation: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")
    given_digest: Mapped[str] = mapped_column(sa.String(64), default="", server_default="")
    given_is_last: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    presence_session: Mapped[str] = mapped_column(sa.String(32), default="", server_default="")
    presence_number: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")
    runs: Mapped[list[Any]] = mapped_column(sa.JSON, default=list, server_default="[]")
    copied_since: Mapped[int | None] = mapped_column(sa.BigInteger)
