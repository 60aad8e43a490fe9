"""Two agents that run with one key were taken for one: each run has an id, and one that comes back is noticed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0046"
down_revision = "0045"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("broker_agents", sa.Column("runs", sa.JSON(), server_default="[]", nullable=False))
    op.add_column("broker_agents", sa.Column("copied_since", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    raise RuntimeError("an older portal would believe two agents with one key: restore a backup")
