"""A name in certificates is one device's in its tenant: another tenant could take it, and be told that it is taken."""

from __future__ import annotations

from collections.abc import Sequence

from alembic import op

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _make_key(["tenant_id", "name"])


def downgrade() -> None:
    _make_key(["name"])


def _make_key(columns: Sequence[str]) -> None:
    with op.batch_alter_table("device_names") as batch:
        batch.drop_constraint(op.f("pk_device_names"), type_="primary")
        batch.create_primary_key(op.f("pk_device_names"), columns)
