"""The roles of operators with their permissions, and the hash by which their tokens are stored."""

from __future__ import annotations

import hashlib
from enum import StrEnum

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
    """Tell whether a role has the permission; a client without a token has a role that is not in ``Role``, and none."""
    return any(role == known and permission in permissions for known, permissions in MAY.items())


def hash_token(secret: str) -> str:
    """Return the SHA-256 in hex; 256 random bits need no slow hash, and a lookup by it leaks no useful timing."""
    return hashlib.sha256(secret.encode()).hexdigest()
