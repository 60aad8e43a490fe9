"""A device whose manufacturer gave it another factory certificate is known by its serial number, if that is wanted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Written out: alembic would make the table anew on SQLite for the sake of the constraint. Manufacturers that are
    # registered already keep their way.
    op.execute(
        "ALTER TABLE manufacturers ADD COLUMN repeated_serial VARCHAR(16) DEFAULT 'new_device' NOT NULL"
        " CONSTRAINT ck_manufacturers_repeated_serial"
        " CHECK (repeated_serial IN ('operator', 'same_device', 'new_device'))"
    )
    op.create_index(
        "uq_enrolments_one_of_a_factory_serial",
        "enrolments",
        ["tenant_id", "serial_hash"],
        unique=True,
        sqlite_where=sa.text("manufacturer_id IS NOT NULL"),
        postgresql_where=sa.text("manufacturer_id IS NOT NULL"),
    )
    op.create_table(
        "factory_keys",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("factory_key", sa.String(length=64), nullable=False),
        sa.Column("enrolment_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.ForeignKeyConstraint(["enrolment_id"], ["enrolments.id"], name=op.f("fk_factory_keys_enrolment_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_factory_keys_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", "factory_key", name=op.f("pk_factory_keys")),
    )


def downgrade() -> None:
    raise RuntimeError("an older portal would take one device for two: restore a backup instead")
