"""A kept answer belongs to the token that asked for it, and ends with the device that it is about."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Of the answers that are there nothing says whose they are: they stay, and open for nobody.
    op.execute("ALTER TABLE idempotency_keys ADD COLUMN made_by VARCHAR(128)")
    op.execute("ALTER TABLE idempotency_keys ADD COLUMN device_id VARCHAR(36)")
    op.create_index(
        "ix_idempotency_keys_device",
        "idempotency_keys",
        ["device_id"],
        sqlite_where=sa.text("device_id IS NOT NULL"),
        postgresql_where=sa.text("device_id IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_idempotency_keys_device")
    op.drop_column("idempotency_keys", "device_id")
    op.drop_column("idempotency_keys", "made_by")
