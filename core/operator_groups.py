"""Which groups of an identity provider have which roles in which tenants: the value of a setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.roles import Role
from core.tenants import check_tenant_name

FIRST_TENANT = "default"
MAX_GROUPS, MAX_GROUP = 1000, 256
_SYNTAX = 'must be a JSON object of groups, such as {"fleet-admins": "admin", "acme-ops": "operator@acme"}'
_HIGHEST_FIRST = tuple(Role)


@dataclass(frozen=True, slots=True)
class Grant:
    """A role in a tenant."""

    role: Role
    tenant: str

    def __str__(self) -> str:
        return f"{self.role}@{self.tenant}"


GroupGrants = Mapping[str, tuple[Grant, ...]]


def parse_group_grants(value: str) -> GroupGrants:
    """Return what each group grants, from a JSON object: ``ROLE`` or ``ROLE@TENANT``, or a list of these.

    Raises ``ValueError`` with the end of a sentence that begins with the name of the setting.
    """
    if not value:
        return {}
    try:
        read = json.loads(value, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        raise ValueError(f"{_SYNTAX}, and name no group twice") from None
    if not isinstance(read, dict) or not 0 < len(read) <= MAX_GROUPS:
        raise ValueError(_SYNTAX)
    return {_group(name): _grants(name, granted) for name, granted in read.items()}


def highest_by_tenant(groups: frozenset[str], grants: GroupGrants) -> dict[str, Role]:
    """Return the tenants in which somebody of these groups has a role, with the highest one in each."""
    found: dict[str, Role] = {}
    for name in sorted(groups & grants.keys()):
        for grant in grants[name]:
            found[grant.tenant] = min(grant.role, found.get(grant.tenant, grant.role), key=_HIGHEST_FIRST.index)
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _group(name: str) -> str:
    if not 0 < len(name) <= MAX_GROUP:
        raise ValueError(f"has a group whose name is empty or longer than {MAX_GROUP} characters")
    return name


def _grants(group: str, granted: object) -> tuple[Grant, ...]:
    listed = granted if isinstance(granted, list) else [granted]
    texts = [text for text in listed if isinstance(text, str)]
    if not texts or len(texts) < len(listed):
        raise ValueError(f"must give the group {group!a} a role, such as operator or operator@acme, or a list of these")
    return tuple(_grant(group, text) for text in texts)


def _grant(group: str, text: str) -> Grant:
    role, at, tenant = text.partition("@")
    if role not in set(Role):
        raise ValueError(f"gives the group {group!a} a role that is none of {', '.join(Role)}")
    try:
        check_tenant_name(tenant if at else FIRST_TENANT)
    except ValueError as error:
        raise ValueError(f"names for the group {group!a} a tenant whose name {error}") from None
    if role == Role.SYSTEM and at and tenant != FIRST_TENANT:
        raise ValueError(f"gives the group {group!a} the role system in a tenant; it is above them: leave @ out")
    return Grant(Role(role), tenant if at else FIRST_TENANT)
