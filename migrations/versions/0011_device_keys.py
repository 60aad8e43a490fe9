"""The keys of devices: each is one device's, and one that was compromised is certified for nobody any more."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from pki.algorithms import certificate_key_fingerprint

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_CERTIFICATES = sa.text(
    "SELECT c.id, c.tenant_id, c.device_id, c.der, d.revocation_reason, d.revoked_at FROM certificates c"
    " JOIN devices d ON d.tenant_id = c.tenant_id AND d.id = c.device_id"
    " WHERE c.id > :after AND c.purpose = 'device' AND (d.status = 'revoked') = :revoked ORDER BY c.id LIMIT 1000"
)
_INSERT = sa.text(
    "INSERT INTO device_keys (tenant_id, key_fingerprint, device_id, compromised_at)"
    " VALUES (:tenant_id, :key_fingerprint, :device_id, :compromised_at)"
    " ON CONFLICT (tenant_id, key_fingerprint) DO UPDATE SET device_id = excluded.device_id,"
    " compromised_at = coalesce(device_keys.compromised_at, excluded.compromised_at)"
)


def upgrade() -> None:
    op.create_table(
        "device_keys",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("device_id", sa.String(length=36), nullable=True),
        sa.Column("compromised_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("device_id IS NOT NULL OR compromised_at IS NOT NULL", name=op.f("ck_device_keys_owner")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_device_keys_tenant_id")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "device_id"],
            ["devices.tenant_id", "devices.id"],
            name=op.f("fk_device_keys_tenant_id_device_id"),
        ),
        sa.PrimaryKeyConstraint("tenant_id", "key_fingerprint", name=op.f("pk_device_keys")),
    )
    _fill()
    _make_compromise_final()


def downgrade() -> None:
    raise RuntimeError("an older portal would certify compromised keys again: restore a backup instead")


def _fill() -> None:
    """Record the keys of the certificates that were issued before.

    The last device has a key that several have: devices that are not revoked come after the others.
    """
    connection = op.get_bind()
    for revoked in (True, False):
        after = 0
        while rows := connection.execute(_CERTIFICATES, {"after": after, "revoked": revoked}).all():
            after = rows[-1].id
            if keys := [key for row in rows if (key := _key(row)) is not None]:
                connection.execute(_INSERT, keys)


def _key(row: sa.Row[Any]) -> dict[str, Any] | None:
    try:
        fingerprint = certificate_key_fingerprint(row.der)
    except ValueError:
        return None  # damaged: nobody can show it
    return {
        "tenant_id": row.tenant_id,
        "key_fingerprint": fingerprint,
        "device_id": row.device_id,
        "compromised_at": row.revoked_at if row.revocation_reason == "key_compromise" else None,
    }


def _make_compromise_final() -> None:
    """Let the database itself refuse to change or forget a compromised key, whoever asks."""
    if op.get_bind().dialect.name != "sqlite":
        op.execute(
            "CREATE TRIGGER device_keys_compromised_is_final BEFORE UPDATE OR DELETE ON device_keys FOR EACH ROW"
            " WHEN (OLD.compromised_at IS NOT NULL) EXECUTE FUNCTION portal_refuse('a compromised key stays so')"
        )
        return
    refuse = "BEGIN SELECT RAISE(ABORT, 'a compromised key stays so'); END"
    for event in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER device_keys_compromised_no_{event.lower()} BEFORE {event} ON device_keys"
            f" WHEN OLD.compromised_at IS NOT NULL {refuse}"
        )
    # INSERT OR REPLACE deletes without the trigger above.
    op.execute(
        "CREATE TRIGGER device_keys_compromised_no_replace BEFORE INSERT ON device_keys"
        " WHEN EXISTS (SELECT 1 FROM device_keys AS known WHERE known.tenant_id = NEW.tenant_id"
        " AND known.key_fingerprint = NEW.key_fingerprint AND known.compromised_at IS NOT NULL)"
        " BEGIN SELECT RAISE(ABORT, 'a compromised key stays so'); END"
    )
