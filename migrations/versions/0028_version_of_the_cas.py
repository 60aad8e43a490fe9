"""A transaction sees by one value whether the CAs have changed, however many there are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("broker_state", sa.Column("issuers_version", sa.String(32), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("broker_state", "issuers_version")
