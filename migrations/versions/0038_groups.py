"""Groups of devices, and of which group a device has its topics; every device until now has its own, or the default."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0038"
down_revision = "0037"
branch_labels = None
depends_on = None

_SCOPE = "(SELECT current_setting('portal.tenant', true))"


def upgrade() -> None:
    op.create_table(
        "device_groups",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("description", sa.String(256), nullable=False),
        sa.Column("filter", sa.JSON(), nullable=True),
        sa.Column("topics", sa.JSON(), nullable=True),
        sa.Column("validity_days", sa.Integer(), nullable=True),
        sa.Column("attestation_policy_id", sa.String(32), nullable=True),
        sa.Column("members", sa.Integer(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("validity_days BETWEEN 1 AND 36500", name=op.f("ck_device_groups_validity_days")),
        sa.CheckConstraint("members >= 0", name=op.f("ck_device_groups_members")),
        sa.CheckConstraint(
            "filter IS NULL OR (members = 0 AND topics IS NULL AND validity_days IS NULL"
            " AND attestation_policy_id IS NULL)",
            name=op.f("ck_device_groups_filter"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_device_groups_tenant_id")),
        sa.ForeignKeyConstraint(
            ["attestation_policy_id"],
            ["attestation_policies.id"],
            name=op.f("fk_device_groups_attestation_policy_id"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_device_groups")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("uq_device_groups_tenant_id_id")),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_device_groups_tenant_id_name")),
    )
    op.create_table(
        "group_members",
        sa.Column("group_id", sa.String(16), nullable=False),
        sa.Column("device_id", sa.String(36), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "group_id"],
            ["device_groups.tenant_id", "device_groups.id"],
            name=op.f("fk_group_members_tenant_id_group_id"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["devices.tenant_id", "devices.id"],
            name=op.f("fk_group_members_tenant_id_device_id"),
        ),
        sa.PrimaryKeyConstraint("group_id", "device_id", name=op.f("pk_group_members")),
    )
    op.create_index("ix_group_members_newest", "group_members", ["group_id", "created_at", "device_id"])
    op.create_index("ix_group_members_device", "group_members", ["device_id"])
    # Written out: alembic would make the table anew on SQLite for the sake of the constraint.
    op.execute(
        "ALTER TABLE devices ADD COLUMN topics_group_id VARCHAR(16)"
        " CONSTRAINT fk_devices_topics_group_id REFERENCES device_groups (id)"
    )
    op.create_index(
        "ix_devices_topics_group",
        "devices",
        ["topics_group_id"],
        sqlite_where=sa.text("topics_group_id IS NOT NULL"),
        postgresql_where=sa.text("topics_group_id IS NOT NULL"),
    )
    if op.get_bind().dialect.name == "postgresql":
        for table in ("device_groups", "group_members"):
            op.execute(f"CREATE POLICY {table}_of_tenant ON {table} USING (tenant_id = {_SCOPE} OR {_SCOPE} = '*')")
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")


def downgrade() -> None:
    raise RuntimeError("an older portal would leave devices the topics of their groups: restore a backup")
