"""Operators log in by an identity provider: their tokens say who they are, and no login is repeated."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0035"
down_revision = "0034"
branch_labels = None
depends_on = None

_LOGIN = sa.text("login_hash IS NOT NULL")


def upgrade() -> None:
    op.add_column("tokens", sa.Column("subject", sa.String(128), nullable=True))
    op.add_column("tokens", sa.Column("login_hash", sa.String(64), nullable=True))
    op.create_index(
        "uq_tokens_login_hash",
        "tokens",
        ["login_hash"],
        unique=True,
        sqlite_where=_LOGIN,
        postgresql_where=_LOGIN,
    )


def downgrade() -> None:
    op.drop_index("uq_tokens_login_hash", "tokens")
    op.drop_column("tokens", "login_hash")
    op.drop_column("tokens", "subject")
