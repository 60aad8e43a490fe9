"""The steps by which a change took hold were in a file of each node, which the others did not see."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0045"
down_revision = "0044"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "enforcement_steps",
        sa.Column("broker_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("generation", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("denied_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("refused_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cut_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("enforced_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("problem", sa.String(1000), nullable=False),
        sa.PrimaryKeyConstraint("broker_id", "generation", name=op.f("pk_enforcement_steps")),
    )


def downgrade() -> None:
    raise RuntimeError("an older portal would keep the steps in a file again: restore a backup")
