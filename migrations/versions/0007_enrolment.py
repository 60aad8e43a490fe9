"""Devices that enrol by themselves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "manufacturers",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("der", sa.LargeBinary(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("not_after", sa.DateTime(timezone=True), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("nonce_expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("proven_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("location", sa.String(length=128), nullable=False),
        sa.Column("firmware", sa.String(length=64), nullable=False),
        sa.Column("name_template", sa.String(length=128), nullable=False),
        sa.Column("key_types", sa.JSON(), nullable=False),
        sa.Column("validity_days", sa.Integer(), nullable=True),
        sa.Column("approval", sa.String(length=16), nullable=False),
        sa.CheckConstraint("(status = 'removed') = (removed_at IS NOT NULL)", name=op.f("ck_manufacturers_removed_at")),
        sa.CheckConstraint("approval IN ('at_once', 'operator')", name=op.f("ck_manufacturers_approval")),
        sa.CheckConstraint("status != 'registered' OR proven_at IS NOT NULL", name=op.f("ck_manufacturers_proven_at")),
        sa.CheckConstraint("status IN ('unproven', 'registered', 'removed')", name=op.f("ck_manufacturers_status")),
        sa.CheckConstraint("validity_days BETWEEN 1 AND 36500", name=op.f("ck_manufacturers_validity_days")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_manufacturers_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_manufacturers")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("uq_manufacturers_tenant_id_id")),
    )
    with op.batch_alter_table("manufacturers", schema=None) as batch_op:
        batch_op.create_index(
            "uq_manufacturers_one_of_a_ca",
            ["tenant_id", "fingerprint"],
            unique=True,
            sqlite_where=sa.text("status != 'removed'"),
            postgresql_where=sa.text("status != 'removed'"),
        )

    op.create_table(
        "enrolment_tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("secret_hash", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("device_id", sa.String(length=36), nullable=True),
        sa.Column("uses_allowed", sa.Integer(), nullable=False),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("location", sa.String(length=128), nullable=False),
        sa.Column("firmware", sa.String(length=64), nullable=False),
        sa.Column("name_template", sa.String(length=128), nullable=False),
        sa.Column("key_types", sa.JSON(), nullable=False),
        sa.Column("validity_days", sa.Integer(), nullable=True),
        sa.Column("approval", sa.String(length=16), nullable=False),
        sa.CheckConstraint("approval IN ('at_once', 'operator')", name=op.f("ck_enrolment_tokens_approval")),
        sa.CheckConstraint("device_id IS NULL OR uses_allowed = 1", name=op.f("ck_enrolment_tokens_one_device")),
        sa.CheckConstraint("uses BETWEEN 0 AND uses_allowed", name=op.f("ck_enrolment_tokens_uses")),
        sa.CheckConstraint("validity_days BETWEEN 1 AND 36500", name=op.f("ck_enrolment_tokens_validity_days")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["devices.tenant_id", "devices.id"],
            name=op.f("fk_enrolment_tokens_tenant_id_device_id"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_enrolment_tokens_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_enrolment_tokens")),
        sa.UniqueConstraint("secret_hash", name=op.f("uq_enrolment_tokens_secret_hash")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("uq_enrolment_tokens_tenant_id_id")),
    )
    op.create_table(
        "enrolments",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("device_id", sa.String(length=36), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=True),
        sa.Column("manufacturer_id", sa.String(length=32), nullable=True),
        sa.Column("identity", sa.String(length=64), nullable=False),
        sa.Column("key_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("decided_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("certificate_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.CheckConstraint(
            "(status = 'issued') = (certificate_id IS NOT NULL)", name=op.f("ck_enrolments_certificate")
        ),
        sa.CheckConstraint(
            "status IN ('waiting', 'approved', 'issued', 'rejected')", name=op.f("ck_enrolments_status")
        ),
        sa.CheckConstraint("(token_id IS NULL) != (manufacturer_id IS NULL)", name=op.f("ck_enrolments_means")),
        sa.ForeignKeyConstraint(["certificate_id"], ["certificates.id"], name=op.f("fk_enrolments_certificate_id")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["devices.tenant_id", "devices.id"],
            name=op.f("fk_enrolments_tenant_id_device_id"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "manufacturer_id"],
            ["manufacturers.tenant_id", "manufacturers.id"],
            name=op.f("fk_enrolments_tenant_id_manufacturer_id"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "token_id"],
            ["enrolment_tokens.tenant_id", "enrolment_tokens.id"],
            name=op.f("fk_enrolments_tenant_id_token_id"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_enrolments_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_enrolments")),
        sa.UniqueConstraint(
            "tenant_id", "manufacturer_id", "identity", name=op.f("uq_enrolments_tenant_id_manufacturer_id_identity")
        ),
        sa.UniqueConstraint(
            "tenant_id", "token_id", "identity", name=op.f("uq_enrolments_tenant_id_token_id_identity")
        ),
    )
    with op.batch_alter_table("enrolments", schema=None) as batch_op:
        batch_op.create_index("ix_enrolments_device", ["tenant_id", "device_id"], unique=False)
