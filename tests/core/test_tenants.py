"""Names and topic prefixes of tenants."""

from __future__ import annotations

import pytest

from core.tenants import check_tenant_name, overlapping


@pytest.mark.parametrize("name", ["a", "acme", "site-7", "0", "a" * 63])
def test_a_dns_label_in_lower_case_is_a_name(name: str) -> None:
    check_tenant_name(name)


@pytest.mark.parametrize(
    "name", ["", "Acme", "-acme", "acme-", "a.b", "a b", "a_b", "a" * 64, "acme\n", "größe", "a/b"]
)
def test_anything_else_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 63"):
        check_tenant_name(name)


@pytest.mark.parametrize(
    ("prefix", "other"),
    [("devices", "devices"), ("devices/berlin", "devices"), ("devices", "devices/berlin"), ("a/b/c", "a/b")],
)
def test_prefixes_overlap_if_one_is_the_beginning_of_the_other(prefix: str, other: str) -> None:
    assert overlapping(prefix, ["elsewhere", other]) == other


@pytest.mark.parametrize(("prefix", "other"), [("devices", "devices2"), ("a/b", "a/c"), ("a/b", "b/a"), ("A", "a")])
def test_prefixes_with_a_different_level_do_not_overlap(prefix: str, other: str) -> None:
    assert overlapping(prefix, [other]) is None
