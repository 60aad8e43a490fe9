"""A revoked device whose external id was freed for its successor keeps a record of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("former_external_id", sa.String(length=128), nullable=True))


def downgrade() -> None:
    op.drop_column("devices", "former_external_id")
