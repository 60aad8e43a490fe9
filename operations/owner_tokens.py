"""Operator tokens for the owner of the machine, who asks no API: that of the first start, and those after it."""

from __future__ import annotations

from datetime import datetime

from core.errors import NotFound
from core.files import FileLock, replace_file, secret_file
from core.roles import Role
from core.tenants import TenantStatus
from operations.wiring import Portal
from store import audit, tenants
from store.tenants import TokenRecord
from workflows.operators import FIRST_TOKEN_LIFE, new_token

TOKEN_FILE = "operator-token"  # noqa: S105 - its name


def first_token(portal: Portal, *, renew: bool = False) -> str | None:
    """Return the token of the first operator, while it is valid; only the first start makes it, of the role ``system``.

    It is kept in a file of mode 0600 in the data folder, for a day. With ``renew`` it is replaced when half of that is
    over, or if the file is lost; never if it was revoked.
    """
    path, now = portal.settings.secrets_dir / TOKEN_FILE, portal.clock()
    with FileLock(portal.settings.data_dir / ".setup.lock").hold():
        secret = secret_file(path, str) if path.exists() else None
        with portal.database.snapshot() as tx:
            record = None if secret is None else tenants.find_token(tx, secret)
            is_first_start = not tenants.list_tokens(tx, portal.first_tenant)
        if is_first_start or (renew and (record is None or _may_renew(record, now))):
            return _make_token(portal, record, Role.SYSTEM if record is None else Role(record.role))[0]
    return secret if record is not None and record.is_valid(now) else None


def _may_renew(record: TokenRecord, now: datetime) -> bool:
    ends = record.expires_at
    return record.revoked_at is None and ends is not None and ends - now < FIRST_TOKEN_LIFE / 2


def make_admin_token(portal: Portal) -> tuple[str, TokenRecord]:
    """Replace the token of the first operator by one of the role ``system``, whatever became of it.

    For the owner of the machine.
    """
    path = portal.settings.secrets_dir / TOKEN_FILE
    with FileLock(portal.settings.data_dir / ".setup.lock").hold():
        with portal.database.snapshot() as tx:
            record = tenants.find_token(tx, secret_file(path, str)) if path.exists() else None
        return _make_token(portal, record, Role.SYSTEM)


def make_tenant_admin_token(portal: Portal, tenant_id: str) -> tuple[str, TokenRecord]:
    """Make a token of an admin of another tenant than the first, beside those it has; for the owner of the machine.

    Raises ``NotFound``.
    """
    now = portal.clock()
    secret, record = new_token(tenant_id, "owner of the machine", Role.ADMIN, now + FIRST_TOKEN_LIFE, now=now)
    with portal.database.transaction() as tx:
        if tenants.get_tenant(tx, tenant_id).status is TenantStatus.REMOVED:
            raise NotFound("The tenant was removed.")
        tenants.add_token(tx, record, secret=secret)
        actor, about = audit.system_actor(tenant_id), f"token:{record.id}"
        audit.record(tx, actor, "token:create", about, at=now, name=record.name, role=record.role)
    return secret, record


def _make_token(portal: Portal, replaced: TokenRecord | None, role: Role) -> tuple[str, TokenRecord]:
    now = portal.clock()
    ends = now + FIRST_TOKEN_LIFE
    secret, record = new_token(portal.first_tenant, "first operator", role, ends, now=now)
    # First the file: a start that is killed in between has made no token, and the next one is the first again.
    replace_file(portal.settings.secrets_dir / TOKEN_FILE, f"{secret}\n".encode())
    actor, about = audit.system_actor(portal.first_tenant), f"token:{record.id}"
    with portal.database.transaction() as tx:
        tenants.add_token(tx, record, secret=secret)
        if replaced is not None:
            tenants.revoke_token(tx, portal.first_tenant, replaced.id, revoked_at=now)
        of = None if replaced is None else replaced.id
        audit.record(tx, actor, "token:create", about, at=now, name=record.name, role=role, replaces=of)
    return secret, record
