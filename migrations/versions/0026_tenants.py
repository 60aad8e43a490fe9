"""Tenants beside the first one: their state, topics, choices and quotas, and the role above those of a tenant."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # In one statement each, as SQLite adds a constraint to a table that is there with its column only.
    op.execute(
        "ALTER TABLE tenants ADD COLUMN status VARCHAR(16) DEFAULT 'active' NOT NULL"
        " CONSTRAINT ck_tenants_status CHECK (status IN ('active', 'suspended', 'removed'))"
    )
    op.execute(
        "ALTER TABLE tenants ADD COLUMN topic_prefix VARCHAR(256)"
        " CONSTRAINT ck_tenants_topic_prefix CHECK (topic_prefix IS NOT NULL OR id = 'default')"
    )
    for column in (
        sa.Column("choices", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("quotas", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("generation", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=True),
    ):
        op.add_column("tenants", column)
    op.create_index("uq_tenants_topic_prefix", "tenants", ["topic_prefix"], unique=True)
    op.create_index(
        "ix_tenants_generation",
        "tenants",
        ["generation"],
        sqlite_where=sa.text("generation > 0"),
        postgresql_where=sa.text("generation > 0"),
    )
    op.execute(
        "ALTER TABLE tokens ADD COLUMN is_system BOOLEAN DEFAULT FALSE NOT NULL"
        " CONSTRAINT ck_tokens_is_system CHECK (NOT is_system OR (role = 'admin' AND tenant_id = 'default'))"
    )


def downgrade() -> None:
    op.drop_column("tokens", "is_system")
    op.drop_index("ix_tenants_generation", "tenants")
    op.drop_index("uq_tenants_topic_prefix", "tenants")
    for column in ("changed_at", "generation", "quotas", "choices", "topic_prefix", "status"):
        op.drop_column("tenants", column)
