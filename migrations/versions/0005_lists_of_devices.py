"""Indexes for every filter of the list of devices."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_FILTERS = ("status", "type", "location")
_IN_USE = "status IN ('active', 'held') AND replaced_until IS NULL"


def upgrade() -> None:
    for column in _FILTERS:
        op.create_index(f"ix_devices_{column}", "devices", ["tenant_id", column, "created_at", "id"])
    op.create_index(
        "ix_certificates_end",
        "certificates",
        ["tenant_id", "not_after", "device_id"],
        sqlite_where=sa.text(_IN_USE),
        postgresql_where=sa.text(_IN_USE),
    )


def downgrade() -> None:
    op.drop_index("ix_certificates_end", "certificates")
    for column in _FILTERS:
        op.drop_index(f"ix_devices_{column}", "devices")
