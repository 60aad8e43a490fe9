"""Device attestation: policies, nonces, and what came of evidence; until now nobody was asked for any."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "attestation_policies",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("policy", sa.JSON(), nullable=False),
        sa.Column("anchors", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("version > 0", name=op.f("ck_attestation_policies_version")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_attestation_policies_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attestation_policies")),
    )
    op.create_index(
        "ix_attestation_policies_changed",
        "attestation_policies",
        ["id", "version"],
        sqlite_where=sa.text("version > 1"),
        postgresql_where=sa.text("version > 1"),
    )
    op.create_table(
        "attestation_nonces",
        sa.Column("nonce_hash", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("seed", sa.LargeBinary(), nullable=True),
        sa.Column("holder", sa.String(length=96), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("spent_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(seed IS NULL) = (spent_at IS NOT NULL)", name=op.f("ck_attestation_nonces_seed")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_attestation_nonces_tenant_id")),
        sa.PrimaryKeyConstraint("nonce_hash", name=op.f("pk_attestation_nonces")),
    )
    op.create_index("ix_attestation_nonces_holder", "attestation_nonces", ["tenant_id", "holder"])
    op.create_index("ix_attestation_nonces_expiry", "attestation_nonces", ["expires_at"])
    op.create_table(
        "attestations",
        sa.Column("device_id", sa.String(length=36), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("policy_id", sa.String(length=32), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("type", sa.String(length=16), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("problems", sa.JSON(), nullable=False),
        sa.Column("claims", sa.JSON(), nullable=False),
        sa.Column("evidence_digest", sa.String(length=64), nullable=False),
        sa.Column("key_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("appraised_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("verdict IN ('passed', 'failed', 'outdated')", name=op.f("ck_attestations_verdict")),
        sa.CheckConstraint("(verdict = 'passed') = (code = '')", name=op.f("ck_attestations_code")),
        sa.ForeignKeyConstraint(["policy_id"], ["attestation_policies.id"], name=op.f("fk_attestations_policy_id")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["devices.tenant_id", "devices.id"],
            name=op.f("fk_attestations_tenant_id_device_id"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_attestations_tenant_id")),
        sa.PrimaryKeyConstraint("device_id", name=op.f("pk_attestations")),
    )
    op.create_index("ix_attestations_policy", "attestations", ["policy_id", "policy_version", "device_id"])
    for table in ("enrolment_tokens", "manufacturers"):
        # Written out: alembic would make the table anew on SQLite for the sake of the constraint.
        op.execute(
            f"ALTER TABLE {table} ADD COLUMN attestation_policy_id VARCHAR(32)"
            f" CONSTRAINT fk_{table}_attestation_policy_id REFERENCES attestation_policies (id)"
        )
    op.add_column("devices", sa.Column("attested", sa.String(length=16), nullable=True))
    op.create_index(
        "ix_devices_attested",
        "devices",
        ["tenant_id", "attested", "created_at", "id"],
        sqlite_where=sa.text("attested IS NOT NULL"),
        postgresql_where=sa.text("attested IS NOT NULL"),
    )


def downgrade() -> None:
    raise RuntimeError("an older portal would admit devices without the evidence that is required: restore a backup")
