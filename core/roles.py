"""Roles of operators, what each may do, and how their tokens are kept."""

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
    """Whether a role, which for who has shown no token is none of ``Role``, has the permission."""
    return any(role == known and permission in permissions for known, permissions in MAY.items())


def hash_token(secret: str) -> str:
    """SHA-256 in hex: enough, because what it hides has 256 random bits; the look-up by it leaks no timing of use."""
    return hashlib.sha256(secret.encode()).hexdigest()
