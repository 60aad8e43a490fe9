"""A tenant's removal is final, and what nobody may delete goes with the tenant that was removed."""

from __future__ import annotations

from alembic import op

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None

_KEPT = {"audit_entries": "the audit record is append-only", "device_keys": "a compromised key stays so"}
_IS_KEPT = "(SELECT status FROM tenants WHERE id = OLD.tenant_id) IS NOT 'removed'"
_COMPROMISED = "OLD.compromised_at IS NOT NULL"
_CHANGES = {
    "UPDATE OF status": "OLD.status = 'removed' AND NEW.status <> 'removed'",
    "DELETE": "OLD.status <> 'removed'",
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _on_sqlite("audit_entries_undeleted", "audit_entries", f"WHEN {_IS_KEPT}")
        _on_sqlite("device_keys_compromised_no_delete", "device_keys", f"WHEN {_COMPROMISED} AND {_IS_KEPT}")
        for name, (event, condition) in zip(("final", "kept"), _CHANGES.items(), strict=True):
            op.execute(
                f"CREATE TRIGGER tenants_removed_is_{name} BEFORE {event} ON tenants WHEN {condition}"
                " BEGIN SELECT RAISE(ABORT, 'a tenant goes when it was removed, for good'); END"
            )
        return
    op.execute(
        "CREATE OR REPLACE FUNCTION portal_refuse_unless_removed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF TG_OP = 'DELETE' AND EXISTS (SELECT 1 FROM tenants WHERE id = OLD.tenant_id AND status = 'removed')"
        " THEN RETURN OLD; END IF;"
        " RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    _on_postgresql("portal_refuse_unless_removed")
    for name, (event, condition) in zip(("final", "kept"), _CHANGES.items(), strict=True):
        op.execute(
            f"CREATE TRIGGER tenants_removed_is_{name} BEFORE {event} ON tenants FOR EACH ROW WHEN ({condition})"
            " EXECUTE FUNCTION portal_refuse('a tenant goes when it was removed, for good')"
        )


def downgrade() -> None:
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    for name in ("final", "kept"):
        op.execute(f"DROP TRIGGER tenants_removed_is_{name}" + ("" if on_sqlite else " ON tenants"))
    if on_sqlite:
        _on_sqlite("audit_entries_undeleted", "audit_entries", "")
        _on_sqlite("device_keys_compromised_no_delete", "device_keys", f"WHEN {_COMPROMISED}")
        return
    _on_postgresql("portal_refuse")
    op.execute("DROP FUNCTION portal_refuse_unless_removed()")


def _on_sqlite(name: str, table: str, condition: str) -> None:
    op.execute(f"DROP TRIGGER {name}")
    op.execute(
        f"CREATE TRIGGER {name} BEFORE DELETE ON {table} {condition} BEGIN SELECT RAISE(ABORT, '{_KEPT[table]}'); END"
    )


def _on_postgresql(function: str) -> None:
    for name, table, condition in (
        ("audit_entries_append_only", "audit_entries", ""),
        ("device_keys_compromised_is_final", "device_keys", f"WHEN ({_COMPROMISED})"),
    ):
        op.execute(f"DROP TRIGGER {name} ON {table}")
        op.execute(
            f"CREATE TRIGGER {name} BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW {condition}"
            f" EXECUTE FUNCTION {function}('{_KEPT[table]}')"
        )
