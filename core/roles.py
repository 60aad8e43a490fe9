"""The roles of operators with their permissions."""

from __future__ import annotations

from enum import StrEnum

TOKEN_PREFIX = "op_"  # noqa: S105 - lets secret scanners find a token that leaked; no secret itself


class Role(StrEnum):
    """What an operator may do within its tenant; see ``MAY``. ``SYSTEM`` also rules over tenants and brokers."""

    SYSTEM = "system"
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
    APPLICATIONS = "applications"
    PROFILES = "profiles"
    TENANTS = "tenants"
    BROKERS = "brokers"


# By role. A client without a token has a role that is not in ``Role``, and no permission.
MAY: dict[str, frozenset[Permission]] = {
    Role.SYSTEM: frozenset(Permission),
    Role.ADMIN: frozenset(Permission) - {Permission.TENANTS, Permission.BROKERS},
    Role.OPERATOR: frozenset({Permission.READ, Permission.CHANGE}),
    Role.AUDITOR: frozenset({Permission.READ, Permission.AUDIT}),
}
