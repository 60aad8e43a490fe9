"""Brokers are rows; the one until now is the first, beside the only node."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0039"
down_revision = "0038"
branch_labels = None
depends_on = None

_FIRST = (
    "INSERT INTO brokers (name, kind, engine, created_at, joined_at, applied_generation, applied_at, reported_at)"
    " SELECT 'main', 'node', 'mosquitto', tenants.created_at, tenants.created_at, broker_state.applied_generation,"
    " broker_state.applied_at, broker_state.applied_at FROM broker_state, tenants WHERE tenants.id = 'default'"
)


def upgrade() -> None:
    op.create_table(
        "brokers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("engine", sa.String(16), nullable=False),
        sa.Column("node_id", sa.Integer(), nullable=True),
        sa.Column("address", sa.String(255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("joined_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("away_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("applied_generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("applied_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reported_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("problem", sa.String(1000), nullable=True),
        sa.CheckConstraint("kind IN ('node', 'agent')", name=op.f("ck_brokers_kind")),
        sa.CheckConstraint("engine IN ('mosquitto', 'rabbitmq')", name=op.f("ck_brokers_engine")),
        sa.CheckConstraint("applied_generation >= 0", name=op.f("ck_brokers_applied_generation")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_brokers")),
        sa.UniqueConstraint("name", name=op.f("uq_brokers_name")),
    )
    op.execute(_FIRST)
    op.add_column(
        "broker_state", sa.Column("announced_generation", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.execute("UPDATE broker_state SET announced_generation = applied_generation")


def downgrade() -> None:
    raise RuntimeError("an older portal would call enforced what one of several brokers enforces: restore a backup")
