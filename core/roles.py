"""Operator tokens with the roles that say what each may do."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime
from enum import StrEnum

from store.access import TokenRecord

TOKEN_PREFIX = "op_"  # noqa: S105 - lets secret scanners find a token that leaked; no secret itself


class Role(StrEnum):
    """What an operator may do; see ``MAY``."""

    ADMIN = "admin"
    OPERATOR = "operator"
    AUDITOR = "auditor"


class Permission(StrEnum):
    """A kind of request."""

    READ = "read"
    CHANGE = "change"
    AUDIT = "audit"
    TOKENS = "tokens"
    WEBHOOKS = "webhooks"


MAY: dict[Role, frozenset[Permission]] = {
    Role.ADMIN: frozenset(Permission),
    Role.OPERATOR: frozenset({Permission.READ, Permission.CHANGE}),
    Role.AUDITOR: frozenset({Permission.READ, Permission.AUDIT}),
}


def may(role: str, permission: Permission) -> bool:
    """Whether a role, which for who has shown no token is none of ``Role``, has the permission."""
    return any(role == known and permission in permissions for known, permissions in MAY.items())


def new_token(
    tenant_id: str, name: str, role: Role, expires_at: datetime | None, *, now: datetime
) -> tuple[str, TokenRecord]:
    """Make a token of 256 random bits: the secret, shown once, with the record that does not hold it."""
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    record = TokenRecord(
        id=secrets.token_hex(8),
        tenant_id=tenant_id,
        name=name,
        role=role,
        created_at=now,
        expires_at=expires_at,
        revoked_at=None,
    )
    return secret, record


def hash_token(secret: str) -> str:
    """SHA-256 in hex: enough, because what it hides has 256 random bits; the look-up by it leaks no timing of use."""
    return hashlib.sha256(secret.encode()).hexdigest()


def is_valid(record: TokenRecord, now: datetime) -> bool:
    """Whether the token may be used at ``now``."""
    return record.revoked_at is None and (record.expires_at is None or now < record.expires_at)
