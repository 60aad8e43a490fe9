"""The audit record's Merkle tree, kept by its right edge; SQLite's REPLACE goes past no trigger."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from core.merkle import Edge
from store.audit import canonical
from store.database import UtcDateTime

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_HEADS = sa.table("audit_heads", sa.column("tenant_id"), sa.column("edge", sa.LargeBinary()))
_PLAIN = ("tenant_id", "number", "previous_hash", "actor", "action", "object", "outcome", "request_id", "address")
_ENTRIES = sa.table(
    "audit_entries", sa.column("at", UtcDateTime()), sa.column("detail", sa.JSON()), *map(sa.column, _PLAIN)
)


def upgrade() -> None:
    connection = op.get_bind()
    op.add_column("audit_heads", sa.Column("edge", sa.LargeBinary(), nullable=True))
    for tenant_id in connection.execute(sa.select(_HEADS.c.tenant_id)).scalars().all():
        edge = Edge(0, b"")
        query = sa.select(_ENTRIES).where(_ENTRIES.c.tenant_id == tenant_id).order_by(_ENTRIES.c.number)
        with connection.execute(query, execution_options={"yield_per": 1000}) as rows:
            for row in rows.mappings():
                edge.append(canonical(row))
        own = _HEADS.c.tenant_id == tenant_id
        connection.execute(sa.update(_HEADS).where(own).values(edge=edge.packed()))
    with op.batch_alter_table("audit_heads") as batch:
        batch.alter_column("edge", existing_type=sa.LargeBinary(), nullable=False)
    if connection.dialect.name == "sqlite":
        # INSERT OR REPLACE deletes the entry in its way without asking the trigger against deletion.
        op.execute(
            "CREATE TRIGGER audit_entries_unreplaced BEFORE INSERT ON audit_entries WHEN EXISTS (SELECT 1 FROM"
            " audit_entries WHERE id = NEW.id OR (tenant_id = NEW.tenant_id AND number = NEW.number))"
            " BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END"
        )


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER audit_entries_unreplaced")
    op.drop_column("audit_heads", "edge")
