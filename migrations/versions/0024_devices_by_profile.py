"""Devices are listed by their certificate profile, newest first."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

_HAS_ONE = sa.text("profile_id IS NOT NULL")


def upgrade() -> None:
    op.drop_index("ix_devices_profile", "devices")
    columns = ["tenant_id", "profile_id", "created_at", "id"]
    op.create_index("ix_devices_profile", "devices", columns, sqlite_where=_HAS_ONE, postgresql_where=_HAS_ONE)


def downgrade() -> None:
    op.drop_index("ix_devices_profile", "devices")
    op.create_index("ix_devices_profile", "devices", ["profile_id"], sqlite_where=_HAS_ONE, postgresql_where=_HAS_ONE)
