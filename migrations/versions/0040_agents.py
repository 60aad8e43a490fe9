"""Agents beside brokers elsewhere: how they join, which certificate counts, and what they were given."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0040"
down_revision = "0039"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "broker_agents",
        sa.Column("broker_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("code_hash", sa.String(64), nullable=True),
        sa.Column("code_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("certificate", sa.String(64), nullable=True),
        sa.Column("next_certificate", sa.String(64), nullable=True),
        *(column for page in ("held", "given") for column in _page(page)),
        sa.CheckConstraint("(code_hash IS NULL) = (code_expires_at IS NULL)", name=op.f("ck_broker_agents_code")),
        sa.ForeignKeyConstraint(
            ["broker_id"], ["brokers.id"], name=op.f("fk_broker_agents_broker_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("broker_id", name=op.f("pk_broker_agents")),
        sa.UniqueConstraint("code_hash", name=op.f("uq_broker_agents_code_hash")),
        sa.UniqueConstraint("certificate", name=op.f("uq_broker_agents_certificate")),
        sa.UniqueConstraint("next_certificate", name=op.f("uq_broker_agents_next_certificate")),
    )


def _page(name: str) -> list[sa.Column[object]]:
    return [
        sa.Column(f"{name}_generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(f"{name}_digest", sa.String(64), server_default="", nullable=False),
        sa.Column(f"{name}_is_last", sa.Boolean(), server_default=sa.false(), nullable=False),
    ]


def downgrade() -> None:
    op.drop_table("broker_agents")
