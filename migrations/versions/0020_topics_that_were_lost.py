"""Devices that have lost topics which they could read have their stored sessions ended, too."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("narrowed_generation", sa.BigInteger(), server_default="0", nullable=False))
    op.create_index(
        "ix_devices_narrowed",
        "devices",
        ["tenant_id", "narrowed_generation"],
        sqlite_where=sa.text("narrowed_generation > 0"),
        postgresql_where=sa.text("narrowed_generation > 0"),
    )


def downgrade() -> None:
    op.drop_index("ix_devices_narrowed", "devices")
    op.drop_column("devices", "narrowed_generation")
