"""What people were told by mail is remembered, so that it is said once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None

_SCOPE = "(SELECT current_setting('portal.tenant', true))"


def upgrade() -> None:
    op.create_table(
        "mailed_matters",
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False),
        sa.Column("said_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_mailed_matters_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", "kind", "subject", name=op.f("pk_mailed_matters")),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            f"CREATE POLICY mailed_matters_of_tenant ON mailed_matters USING (tenant_id = {_SCOPE} OR {_SCOPE} = '*')"
        )
        op.execute("ALTER TABLE mailed_matters ENABLE ROW LEVEL SECURITY")


def downgrade() -> None:
    op.drop_table("mailed_matters")
