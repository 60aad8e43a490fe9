"""A device is recognized by the key of its factory certificate, whichever manufacturer's CA it comes by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("enrolments", sa.Column("factory_key", sa.String(length=64), nullable=True))
    # Of several enrolments with one factory key, that of a revoked device decides about the next one; else the newest.
    op.execute(
        "UPDATE enrolments SET factory_key = identity WHERE manufacturer_id IS NOT NULL AND id = (SELECT e.id"
        " FROM enrolments e JOIN devices d ON d.tenant_id = e.tenant_id AND d.id = e.device_id"
        " WHERE e.tenant_id = enrolments.tenant_id AND e.identity = enrolments.identity"
        " AND e.manufacturer_id IS NOT NULL ORDER BY CASE WHEN d.status = 'revoked' THEN 0 ELSE 1 END, e.id DESC"
        " LIMIT 1)"
    )
    op.create_index("uq_enrolments_one_of_a_factory_key", "enrolments", ["tenant_id", "factory_key"], unique=True)


def downgrade() -> None:
    raise RuntimeError("an older portal would admit revoked devices by another manufacturer: restore a backup instead")
