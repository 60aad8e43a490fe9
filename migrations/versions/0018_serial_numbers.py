"""A device that enrols again with the same token is known by its serial number; tokens say what becomes of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Written out: alembic would make the table anew on SQLite for the sake of the constraint. Tokens that are in use
    # already keep their way.
    op.execute(
        "ALTER TABLE enrolment_tokens ADD COLUMN repeated_serial VARCHAR(16) DEFAULT 'new_device' NOT NULL"
        " CONSTRAINT ck_enrolment_tokens_repeated_serial"
        " CHECK (repeated_serial IN ('operator', 'same_device', 'new_device'))"
    )
    op.add_column("enrolments", sa.Column("serial_hash", sa.String(length=64), nullable=True))
    op.create_index(
        "uq_enrolments_one_of_a_serial", "enrolments", ["tenant_id", "token_id", "serial_hash"], unique=True
    )


def downgrade() -> None:
    raise RuntimeError("an older portal would take one device for two: restore a backup instead")
