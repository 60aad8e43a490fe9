"""Applications: clients that are not devices; every row until now is a device's."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Written out: alembic would make the table anew on SQLite for the sake of the constraints.
    op.execute(
        "ALTER TABLE devices ADD COLUMN kind VARCHAR(16) DEFAULT 'device' NOT NULL"
        " CONSTRAINT ck_devices_kind CHECK (kind IN ('device', 'application'))"
        " CONSTRAINT ck_devices_application_topics CHECK (kind = 'device' OR own_topics)"
    )
    op.create_index(
        "ix_devices_applications",
        "devices",
        ["tenant_id", "created_at", "id"],
        sqlite_where=sa.text("kind = 'application'"),
        postgresql_where=sa.text("kind = 'application'"),
    )
    changed = "BEFORE UPDATE OF kind ON devices"
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            f"CREATE TRIGGER devices_kind_is_final {changed} WHEN OLD.kind <> NEW.kind"
            " BEGIN SELECT RAISE(ABORT, 'the kind of a client is final'); END"
        )
    else:
        op.execute(
            f"CREATE TRIGGER devices_kind_is_final {changed} FOR EACH ROW WHEN (OLD.kind <> NEW.kind)"
            " EXECUTE FUNCTION portal_refuse('the kind of a client is final')"
        )


def downgrade() -> None:
    on = "" if op.get_bind().dialect.name == "sqlite" else " ON devices"
    op.execute(f"DROP TRIGGER devices_kind_is_final{on}")
    op.drop_index("ix_devices_applications", "devices")
    op.drop_column("devices", "kind")
