"""What the broker must enforce is read for all tenants at once: the indexes begin with the generation."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

_INDEXES = {
    "ix_devices_generation": ("generation", "generation > 0"),
    "ix_devices_narrowed": ("narrowed_generation", "narrowed_generation > 0"),
    "ix_devices_own_topics": ("generation", "own_topics"),
    "ix_devices_out": ("generation", "status IN ('revoked', 'suspended')"),
}


def upgrade() -> None:
    _create_again(())


def downgrade() -> None:
    _create_again(("tenant_id",))


def _create_again(before: Sequence[str]) -> None:
    for name, (column, condition) in _INDEXES.items():
        op.drop_index(name, "devices")
        where = sa.text(condition)
        op.create_index(name, "devices", [*before, column], sqlite_where=where, postgresql_where=where)
