"""Roles of groups: a setting that is refused unless it is clear, and the highest role in each tenant."""

from __future__ import annotations

import json
import re

import pytest

from core.operator_groups import Grant, highest_by_tenant, parse_group_grants
from core.roles import Role


def test_a_group_has_a_role_in_the_first_tenant_or_in_those_that_are_named() -> None:
    grants = parse_group_grants('{"a": "admin", "b": ["operator@acme", "auditor"], "c": "system"}')
    assert grants["a"] == (Grant(Role.ADMIN, "default"),)
    assert grants["b"] == (Grant(Role.OPERATOR, "acme"), Grant(Role.AUDITOR, "default"))
    assert grants["c"] == (Grant(Role.SYSTEM, "default"),)
    assert str(grants["b"][0]) == "operator@acme"


def test_the_highest_role_counts_in_each_tenant() -> None:
    grants = parse_group_grants('{"a": ["auditor", "auditor@acme"], "b": "admin", "c": ["operator", "operator@acme"]}')
    assert highest_by_tenant(frozenset({"a", "b", "c", "x"}), grants) == {"default": Role.ADMIN, "acme": Role.OPERATOR}
    assert highest_by_tenant(frozenset({"x"}), grants) == {}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("admins", "must be a JSON object of groups"),
        ("[]", "must be a JSON object of groups"),
        ("{}", "must be a JSON object of groups"),
        ("[" * 100000, "must be a JSON object of groups"),
        ('{"a": "admin", "a": "auditor"}', "name no group twice"),
        ('{"a": "owner"}', "none of system, admin, operator, auditor"),
        ('{"a": "operator@"}', "a tenant whose name must be"),
        ('{"a": "operator@Acme"}', "lower-case letters"),
        ('{"a": "system@acme"}', "leave @ out"),
        ('{"a": 7}', "must give the group 'a' a role"),
        ('{"a": []}', "must give the group 'a' a role"),
        ('{"a": ["admin", 7]}', "must give the group 'a' a role"),
        ('{"": "admin"}', "empty or longer"),
        (json.dumps({"x" * 257: "admin"}), "empty or longer"),
        (json.dumps({f"g{number}": "admin" for number in range(1001)}), "must be a JSON object of groups"),
    ],
)
def test_what_is_not_clear_is_refused(value: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_group_grants(value)
