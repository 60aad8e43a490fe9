"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
    )
    op.create_table(
        "audit_entries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("object", sa.String(length=128), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("previous_hash", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.CheckConstraint("outcome IN ('done', 'refused')", name=op.f("ck_audit_entries_outcome")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_audit_entries_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_entries")),
        sa.UniqueConstraint("tenant_id", "number", name=op.f("uq_audit_entries_tenant_id_number")),
    )
    with op.batch_alter_table("audit_entries", schema=None) as batch_op:
        batch_op.create_index("ix_audit_entries_object", ["tenant_id", "object", "id"], unique=False)

    op.create_table(
        "audit_heads",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_audit_heads_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_audit_heads")),
    )
    op.create_table(
        "broker_state",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("applied_generation", sa.BigInteger(), nullable=False),
        sa.Column("applied_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("pending_since", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("applied_generation <= generation", name=op.f("ck_broker_state_applied_generation")),
        sa.CheckConstraint("generation >= 0", name=op.f("ck_broker_state_generation")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_broker_state_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_broker_state")),
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("external_id", sa.String(length=128), nullable=True),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("location", sa.String(length=128), nullable=False),
        sa.Column("firmware", sa.String(length=64), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("own_topics", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revocation_reason", sa.String(length=32), nullable=True),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "(status = 'revoked') = (revocation_reason IS NOT NULL)", name=op.f("ck_devices_revocation_reason")
        ),
        sa.CheckConstraint("(status = 'revoked') = (revoked_at IS NOT NULL)", name=op.f("ck_devices_revoked_at")),
        sa.CheckConstraint("status IN ('pending', 'active', 'suspended', 'revoked')", name=op.f("ck_devices_status")),
        sa.CheckConstraint("length(id) = 36", name=op.f("ck_devices_id_is_uuid")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_devices_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("tenant_id", "external_id", name=op.f("uq_devices_tenant_id_external_id")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("uq_devices_tenant_id_id")),
    )
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.create_index("ix_devices_generation", ["tenant_id", "generation"], unique=False)
        batch_op.create_index("ix_devices_newest", ["tenant_id", "created_at", "id"], unique=False)

    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key_hash", sa.String(length=64), nullable=False),
        sa.Column("request_hash", sa.String(length=64), nullable=False),
        sa.Column("sealed_answer", sa.LargeBinary(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_idempotency_keys_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", "key_hash", name=op.f("pk_idempotency_keys")),
    )
    with op.batch_alter_table("idempotency_keys", schema=None) as batch_op:
        batch_op.create_index("ix_idempotency_keys_expiry", ["expires_at"], unique=False)

    op.create_table(
        "issuers",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("der", sa.LargeBinary(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("not_after", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_generation", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('root', 'issuing')", name=op.f("ck_issuers_kind")),
        sa.CheckConstraint("status IN ('active', 'retired')", name=op.f("ck_issuers_status")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_issuers_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_issuers")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_issuers_fingerprint")),
        sa.UniqueConstraint("name", name=op.f("uq_issuers_name")),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("role IN ('admin', 'operator', 'auditor')", name=op.f("ck_tokens_role")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_tokens_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_tokens_token_hash")),
    )
    op.create_table(
        "acl_entries",
        sa.Column("device_id", sa.String(length=36), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("filter", sa.String(length=256), nullable=False),
        sa.Column("access", sa.String(length=16), nullable=False),
        sa.CheckConstraint("access IN ('read', 'write', 'readwrite')", name=op.f("ck_acl_entries_access")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["devices.tenant_id", "devices.id"],
            name=op.f("fk_acl_entries_tenant_id_device_id"),
        ),
        sa.PrimaryKeyConstraint("device_id", "position", name=op.f("pk_acl_entries")),
        sa.UniqueConstraint("device_id", "filter", name=op.f("uq_acl_entries_device_id_filter")),
    )
    op.create_table(
        "certificates",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("issuer_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("device_id", sa.String(length=36), nullable=True),
        sa.Column("purpose", sa.String(length=16), nullable=False),
        sa.Column("serial_number", sa.String(length=40), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("der", sa.LargeBinary(), nullable=False),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=False),
        sa.Column("not_after", sa.DateTime(timezone=True), nullable=False),
        sa.Column("issued_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revocation_reason", sa.String(length=32), nullable=True),
        sa.CheckConstraint("(purpose = 'device') = (device_id IS NOT NULL)", name=op.f("ck_certificates_owner")),
        sa.CheckConstraint(
            "(status IN ('held', 'revoked')) = (revoked_at IS NOT NULL)", name=op.f("ck_certificates_revoked_at")
        ),
        sa.CheckConstraint("purpose IN ('device', 'server', 'canary', 'lost')", name=op.f("ck_certificates_purpose")),
        sa.CheckConstraint("status IN ('active', 'replaced', 'held', 'revoked')", name=op.f("ck_certificates_status")),
        sa.CheckConstraint(
            "(revoked_at IS NULL) = (revocation_reason IS NULL)", name=op.f("ck_certificates_revocation_reason")
        ),
        sa.CheckConstraint("not_before < not_after", name=op.f("ck_certificates_validity")),
        sa.ForeignKeyConstraint(["issuer_id"], ["issuers.id"], name=op.f("fk_certificates_issuer_id")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["devices.tenant_id", "devices.id"],
            name=op.f("fk_certificates_tenant_id_device_id"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_certificates_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_certificates")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_certificates_fingerprint")),
        sa.UniqueConstraint("issuer_id", "serial_number", name=op.f("uq_certificates_issuer_id_serial_number")),
    )
    with op.batch_alter_table("certificates", schema=None) as batch_op:
        batch_op.create_index(
            "ix_certificates_crl",
            ["issuer_id", "not_after"],
            unique=False,
            sqlite_where=sa.text("status IN ('held', 'revoked')"),
            postgresql_where=sa.text("status IN ('held', 'revoked')"),
        )
        batch_op.create_index("ix_certificates_device", ["device_id", "id"], unique=False)
        batch_op.create_index(
            "uq_certificates_one_active_a_device",
            ["device_id"],
            unique=True,
            sqlite_where=sa.text("status IN ('active', 'held')"),
            postgresql_where=sa.text("status IN ('active', 'held')"),
        )

    op.create_table(
        "crls",
        sa.Column(
            "issuer_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("this_update", sa.DateTime(timezone=True), nullable=False),
        sa.Column("next_update", sa.DateTime(timezone=True), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("der", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("number > 0", name=op.f("ck_crls_number")),
        sa.CheckConstraint("this_update < next_update", name=op.f("ck_crls_validity")),
        sa.ForeignKeyConstraint(["issuer_id"], ["issuers.id"], name=op.f("fk_crls_issuer_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_crls_tenant_id")),
        sa.PrimaryKeyConstraint("issuer_id", name=op.f("pk_crls")),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("device_id", sa.String(length=36), nullable=False),
        sa.Column("certificate_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("bundle", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(status = 'fetching') = (lease_until IS NOT NULL)", name=op.f("ck_deliveries_lease")),
        sa.CheckConstraint(
            "(status IN ('ready', 'fetching')) = (bundle IS NOT NULL)", name=op.f("ck_deliveries_bundle")
        ),
        sa.CheckConstraint(
            "status IN ('ready', 'fetching', 'delivered', 'expired', 'revoked')", name=op.f("ck_deliveries_status")
        ),
        sa.ForeignKeyConstraint(["certificate_id"], ["certificates.id"], name=op.f("fk_deliveries_certificate_id")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["devices.tenant_id", "devices.id"],
            name=op.f("fk_deliveries_tenant_id_device_id"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_deliveries_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deliveries")),
    )
    with op.batch_alter_table("deliveries", schema=None) as batch_op:
        batch_op.create_index("ix_deliveries_device", ["device_id"], unique=False)
        batch_op.create_index(
            "ix_deliveries_expiry",
            ["expires_at"],
            unique=False,
            sqlite_where=sa.text("status IN ('ready', 'fetching')"),
            postgresql_where=sa.text("status IN ('ready', 'fetching')"),
        )

    _make_revocation_final()


def downgrade() -> None:
    raise RuntimeError("there is nothing before the first schema: restore a backup instead")


def _make_revocation_final() -> None:
    """Let the database itself refuse to bring back what was revoked, whoever asks."""
    if op.get_bind().dialect.name == "sqlite":
        for table in ("devices", "certificates"):
            op.execute(
                f"CREATE TRIGGER {table}_revoked_is_final BEFORE UPDATE OF status ON {table}"
                " WHEN OLD.status = 'revoked' AND NEW.status <> 'revoked'"
                " BEGIN SELECT RAISE(ABORT, 'revoked is final'); END"
            )
        op.execute(
            "CREATE TRIGGER audit_entries_unchanged BEFORE UPDATE ON audit_entries"
            " BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END"
        )
        op.execute(
            "CREATE TRIGGER audit_entries_undeleted BEFORE DELETE ON audit_entries"
            " BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END"
        )
        return
    op.execute(
        "CREATE FUNCTION portal_refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    for table in ("devices", "certificates"):
        op.execute(
            f"CREATE TRIGGER {table}_revoked_is_final BEFORE UPDATE OF status ON {table} FOR EACH ROW"
            " WHEN (OLD.status = 'revoked' AND NEW.status <> 'revoked')"
            " EXECUTE FUNCTION portal_refuse('revoked is final')"
        )
    op.execute(
        "CREATE TRIGGER audit_entries_append_only BEFORE UPDATE OR DELETE ON audit_entries FOR EACH ROW"
        " EXECUTE FUNCTION portal_refuse('the audit record is append-only')"
    )
