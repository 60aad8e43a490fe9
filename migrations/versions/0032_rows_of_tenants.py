"""PostgreSQL itself keeps the rows of tenants apart; the state of the broker is the installation's, and says so."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None

# A transaction sees the rows of the tenant that it has set, or with * those of all; without the setting none. The
# setting is read once for a statement, not for each row, because it is in a query of its own.
_SCOPE = "(SELECT current_setting('portal.tenant', true))"
_OF_TENANT = f"tenant_id = {_SCOPE} OR {_SCOPE} = '*'"
_TABLES = (
    "acl_entries",
    "attestation_nonces",
    "attestation_policies",
    "attestations",
    "audit_entries",
    "audit_heads",
    "certificate_profiles",
    "certificates",
    "crls",
    "deliveries",
    "device_keys",
    "device_names",
    "devices",
    "enrolment_tokens",
    "enrolments",
    "expiry_announcements",
    "factory_keys",
    "idempotency_keys",
    "issuers",
    "kept_bundles",
    "manufacturers",
    "presences",
    "reenrolments",
    "tokens",
    "webhook_deliveries",
    "webhooks",
)
_STATE = "generation, applied_generation, applied_at, pending_since, issuers_version"


def upgrade() -> None:
    compromised = sa.text("compromised_at IS NOT NULL")  # in one tenant, and so in all
    op.create_index(
        "ix_device_keys_compromised",
        "device_keys",
        ["key_fingerprint"],
        sqlite_where=compromised,
        postgresql_where=compromised,
    )
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_state()
        return
    op.execute("ALTER TABLE broker_state DROP COLUMN tenant_id")  # with its keys
    op.execute("ALTER TABLE broker_state ADD COLUMN id SMALLINT DEFAULT 1 NOT NULL")
    op.execute("ALTER TABLE broker_state ALTER COLUMN id DROP DEFAULT")
    op.execute("ALTER TABLE broker_state ADD CONSTRAINT pk_broker_state PRIMARY KEY (id)")
    op.execute("ALTER TABLE broker_state ADD CONSTRAINT ck_broker_state_single CHECK (id = 1)")
    for table in _TABLES:
        op.execute(f"CREATE POLICY {table}_of_tenant ON {table} USING ({_OF_TENANT})")
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(
        "CREATE POLICY device_keys_compromised ON device_keys FOR SELECT USING (compromised_at IS NOT NULL)",
    )


def _rebuild_state() -> None:
    op.create_table(
        "broker_state_new",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("applied_generation", sa.BigInteger(), nullable=False),
        sa.Column("applied_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("pending_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("issuers_version", sa.String(32), nullable=False, server_default=""),
        sa.CheckConstraint("applied_generation <= generation", name=op.f("ck_broker_state_applied_generation")),
        sa.CheckConstraint("generation >= 0", name=op.f("ck_broker_state_generation")),
        sa.CheckConstraint("id = 1", name=op.f("ck_broker_state_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_broker_state")),
    )
    op.execute(f"INSERT INTO broker_state_new (id, {_STATE}) SELECT 1, {_STATE} FROM broker_state")  # noqa: S608
    op.drop_table("broker_state")
    op.rename_table("broker_state_new", "broker_state")


def downgrade() -> None:
    raise RuntimeError("an older portal would certify keys that were compromised in another tenant: restore a backup")
