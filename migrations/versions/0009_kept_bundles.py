"""A bundle may be fetched again for a while, by the client that fetched it first."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "kept_bundles",
        sa.Column("delivery_id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key_hash", sa.String(length=64), nullable=False),
        sa.Column("sealed_bundle", sa.LargeBinary(), nullable=False),
        sa.Column("length", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["delivery_id"], ["deliveries.id"], name=op.f("fk_kept_bundles_delivery_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_kept_bundles_tenant_id")),
        sa.PrimaryKeyConstraint("delivery_id", name=op.f("pk_kept_bundles")),
    )
    op.create_index("ix_kept_bundles_expiry", "kept_bundles", ["expires_at"])


def downgrade() -> None:
    op.drop_table("kept_bundles")
