"""Browsers that are logged in to the web console have a row each, so that each can be listed and ended."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0036"
down_revision = "0035"
branch_labels = None
depends_on = None

_SCOPE = "(SELECT current_setting('portal.tenant', true))"


def upgrade() -> None:
    op.create_table(
        "console_sessions",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("token_id", sa.String(32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("address", sa.String(64), nullable=False),
        sa.Column("user_agent", sa.String(200), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_console_sessions_tenant_id")),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name=op.f("fk_console_sessions_token_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_console_sessions")),
        sa.UniqueConstraint("secret_hash", name=op.f("uq_console_sessions_secret_hash")),
    )
    op.create_index("ix_console_sessions_token", "console_sessions", ["tenant_id", "token_id", "created_at"])
    op.create_index("ix_console_sessions_expiry", "console_sessions", ["expires_at"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            f"CREATE POLICY console_sessions_of_tenant ON console_sessions"
            f" USING (tenant_id = {_SCOPE} OR {_SCOPE} = '*')"
        )
        op.execute("ALTER TABLE console_sessions ENABLE ROW LEVEL SECURITY")


def downgrade() -> None:
    op.drop_table("console_sessions")
