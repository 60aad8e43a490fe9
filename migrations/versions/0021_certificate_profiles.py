"""Certificate profiles, and the names that they give to devices; every device until now has the built-in one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "certificate_profiles",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("default_days", sa.Integer(), nullable=True),
        sa.Column("max_days", sa.Integer(), nullable=True),
        sa.Column("key_types", sa.JSON(), nullable=False),
        sa.Column("extended_key_usage", sa.JSON(), nullable=False),
        sa.Column("dns_names", sa.JSON(), nullable=False),
        sa.Column("ip_addresses", sa.JSON(), nullable=False),
        sa.Column("organization", sa.String(length=256), nullable=True),
        sa.Column("organizational_unit", sa.String(length=256), nullable=True),
        sa.Column("serial_number", sa.String(length=256), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("name <> 'default'", name=op.f("ck_certificate_profiles_not_built_in")),
        sa.CheckConstraint("default_days BETWEEN 1 AND 36500", name=op.f("ck_certificate_profiles_default_days")),
        sa.CheckConstraint("max_days BETWEEN 1 AND 36500", name=op.f("ck_certificate_profiles_max_days")),
        sa.CheckConstraint("default_days <= max_days", name=op.f("ck_certificate_profiles_days")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_certificate_profiles_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_certificate_profiles")),
    )
    op.create_index(
        "uq_certificate_profiles_name",
        "certificate_profiles",
        ["tenant_id", "name"],
        unique=True,
        sqlite_where=sa.text("removed_at IS NULL"),
        postgresql_where=sa.text("removed_at IS NULL"),
    )
    op.create_table(
        "device_names",
        sa.Column("name", sa.String(length=253), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("device_id", sa.String(length=36), nullable=False),
        sa.Column("certificate_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["certificate_id"], ["certificates.id"], name=op.f("fk_device_names_certificate_id")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["devices.tenant_id", "devices.id"],
            name=op.f("fk_device_names_tenant_id_device_id"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_device_names_tenant_id")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_device_names")),
    )
    op.create_index("ix_device_names_device", "device_names", ["device_id"])
    for table in ("devices", "enrolment_tokens", "manufacturers"):
        # Written out: alembic would make the table anew on SQLite for the sake of the constraint.
        op.execute(
            f"ALTER TABLE {table} ADD COLUMN profile_id VARCHAR(32)"
            f" CONSTRAINT fk_{table}_profile_id REFERENCES certificate_profiles (id)"
        )
    op.create_index(
        "ix_devices_profile",
        "devices",
        ["profile_id"],
        sqlite_where=sa.text("profile_id IS NOT NULL"),
        postgresql_where=sa.text("profile_id IS NOT NULL"),
    )
    op.add_column("enrolments", sa.Column("serial", sa.String(length=64), nullable=True))


def downgrade() -> None:
    raise RuntimeError("an older portal would renew certificates without their names: restore a backup instead")
