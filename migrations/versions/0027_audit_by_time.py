"""The audit record is listed by time, too."""

from __future__ import annotations

from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_audit_entries_at", "audit_entries", ["tenant_id", "at", "id"])


def downgrade() -> None:
    op.drop_index("ix_audit_entries_at", "audit_entries")
