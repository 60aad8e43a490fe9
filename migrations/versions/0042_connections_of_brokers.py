"""A connection belongs to a broker: at which one an identity was seen, and when each was last heard."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0042"
down_revision = "0041"
branch_labels = None
depends_on = None

# Until now every node wrote as if its broker were the only one; each is told everybody at its next start.
_SEEN = "UPDATE presences SET broker_id = (SELECT min(id) FROM brokers WHERE kind = 'node') WHERE state <> 0"


def upgrade() -> None:
    op.add_column("presences", sa.Column("broker_id", sa.Integer(), nullable=True))
    op.add_column("presences", sa.Column("left_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("presences", sa.Column("also_at", sa.JSON(), nullable=True))
    op.execute(_SEEN)
    op.add_column("brokers", sa.Column("presence_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("brokers", sa.Column("presence_known", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("broker_agents", sa.Column("presence_session", sa.String(32), server_default="", nullable=False))
    op.add_column("broker_agents", sa.Column("presence_number", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    raise RuntimeError("an older portal would take what one broker tells for what all do: restore a backup")
