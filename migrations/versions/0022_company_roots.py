"""An issuing CA can be below the CAs of a company; which one signs the certificates of portal and broker is kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("issuers", sa.Column("above", sa.LargeBinary(), nullable=True))
    op.add_column("issuers", sa.Column("servers_since", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    raise RuntimeError("an older portal would not know of a company's root: restore a backup instead")
