"""The table of the web console's sessions."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from store.columns import OfTenant
from store.database import Base


class ConsoleSession(OfTenant, Base):
    """A browser that is logged in to the web console, for the operator token that it stands for.

    ``secret_hash`` is the SHA-256, in hex, of what the browser's cookie holds. ``address`` and ``user_agent`` are those
    of the login; ``last_seen_at`` is written once a minute at most. What has ended is deleted.
    """

    __tablename__ = "console_sessions"
    __table_args__ = (
        sa.UniqueConstraint("secret_hash"),
        sa.Index("ix_console_sessions_token", "tenant_id", "token_id", "created_at"),
        sa.Index("ix_console_sessions_expiry", "expires_at"),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    secret_hash: Mapped[str] = mapped_column(sa.String(64))
    token_id: Mapped[str] = mapped_column(sa.String(32), sa.ForeignKey("tokens.id"))
    created_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    address: Mapped[str] = mapped_column(sa.String(64))
    user_agent: Mapped[str] = mapped_column(sa.String(200))
