"""What a registration asks of the database: each statement costs a fiftieth of the request, so they are listed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from core.roles import Role
from tests.support.harness import ON_SQLITE, Api, api_as, csr_pem
from tests.support.statements import noting

BEGUN = "BEGIN IMMEDIATE"
ADDED = ["INSERT devices", "INSERT presences"]
RECORDED = ["INSERT audit_entries", "UPDATE audit_heads"]
_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE) (\w+)")


@contextlib.contextmanager
def sent(app: Flask) -> Iterator[list[str]]:
    """The statements that are sent in the ``with`` block, each as its verb and its table."""
    seen: list[str] = []

    def note(statement: str, _rows: Any) -> None:
        table = _TABLE.search(statement)
        seen.append(f"{statement.split()[0]} {table[1]}" if table else statement.partition(" =")[0])

    with noting(portal_of(app).database.engine, note):
        yield seen
    assert seen.count("SELECT tokens") == 1  # in no transaction
    assert "PRAGMA synchronous" not in seen  # it is set already
    del seen[: seen.index(BEGUN)]  # tenants are read again each second, before


@pytest.fixture
def known(app: Flask) -> Api:
    """An operator whose tenant each part of the portal has read."""
    api = api_as(app, Role.OPERATOR)
    api.register()
    return api


@ON_SQLITE
def test_a_registration_locks_and_reads_the_head_of_the_audit_record_as_it_counts_the_device(
    app: Flask, known: Api
) -> None:
    with sent(app) as seen:
        known.register()
    issued = ["INSERT device_keys", "INSERT certificates", "INSERT deliveries", "UPDATE audit_heads"]
    assert seen == [BEGUN, *ADDED, *issued, *RECORDED]


@ON_SQLITE
def test_one_with_a_csr_does_so_before_it_looks_whose_the_key_is_and_no_second_time(app: Flask, known: Api) -> None:
    with sent(app) as seen:
        assert known.post("/register", _with_csr()).status_code in (201, 503)  # no broker runs
    issued = ["SELECT device_keys", "INSERT device_keys", "INSERT certificates"]
    expected = [BEGUN, "UPDATE audit_heads", *ADDED, *issued, *RECORDED]
    assert seen[: len(expected)] == expected


def _with_csr() -> dict[str, Any]:
    return {"name": "pump-2", "type": "pump", "location": "hall 1", "firmware": "1.0", "csr": csr_pem()}
