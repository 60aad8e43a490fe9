"""Nodes record their settings, so that those which differ are seen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0044"
down_revision = "0043"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("settings", sa.JSON(), nullable=True))
    op.create_table(
        "setting_changes",
        sa.Column("field", sa.String(63), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("field", name=op.f("pk_setting_changes")),
    )


def downgrade() -> None:
    raise RuntimeError("an older portal would not know which settings other nodes have: restore a backup")
