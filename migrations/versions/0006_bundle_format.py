"""A delivery remembers the form that its bundle is in."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Written out: alembic would make the table anew on SQLite for the sake of the constraint.
    op.execute(
        "ALTER TABLE deliveries ADD COLUMN format VARCHAR(8) DEFAULT 'zip' NOT NULL"
        " CONSTRAINT ck_deliveries_format CHECK (format IN ('zip', 'p12', 'pem'))"
    )


def downgrade() -> None:
    op.drop_column("deliveries", "format")
