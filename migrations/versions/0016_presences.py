"""Each device has a row that says whether it was last seen connected to the broker."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "presences",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("identity", sa.String(length=64), nullable=False),
        sa.Column("state", sa.SmallInteger(), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state BETWEEN 0 AND 2", name=op.f("ck_presences_state")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_presences_tenant_id")),
        sa.PrimaryKeyConstraint("identity", name=op.f("pk_presences")),
    )
    op.execute(
        "INSERT INTO presences (tenant_id, identity, state, since)"
        " SELECT tenant_id, id, 0, created_at FROM devices ORDER BY id"
    )
    op.create_index("ix_presences_seen", "presences", ["tenant_id", "state", "since", "identity"])


def downgrade() -> None:
    op.drop_table("presences")
