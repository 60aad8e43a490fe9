"""How many devices and applications each tenant has that are not revoked, for its quota."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit_heads", sa.Column("clients", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE audit_heads SET clients = (SELECT count(*) FROM devices"
        " WHERE devices.tenant_id = audit_heads.tenant_id AND devices.status <> 'revoked')"
    )


def downgrade() -> None:
    op.drop_column("audit_heads", "clients")
