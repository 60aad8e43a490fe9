"""A bundle is made when it is fetched: until then its delivery holds what it is made of, sealed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0037"
down_revision = "0036"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deliveries", sa.Column("sealed", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    # An older version would hand out what is sealed as a bundle.
    op.execute(
        "UPDATE deliveries SET status = 'expired', bundle = NULL, lease_until = NULL"
        " WHERE sealed AND status IN ('ready', 'fetching')"
    )
    op.drop_column("deliveries", "sealed")
