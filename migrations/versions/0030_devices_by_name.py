"""Devices are found by name, and listed in its order."""

from __future__ import annotations

from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_devices_name", "devices", ["tenant_id", "name", "created_at", "id"])


def downgrade() -> None:
    op.drop_index("ix_devices_name", "devices")
