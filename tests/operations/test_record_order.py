"""Transactions that append to the audit records of several tenants lock them in one order: none waits for another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask

from app import portal_of
from core.roles import Role
from operations import jobs
from store import audit
from tests.support.harness import Api, Clock, api_as, csr_pem
from tests.support.statements import noting
from workflows.tenant_life import record_of_both

TENANTS = ("zeta", "acme", "mill")


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The tenants whose records were locked, each once, in the order in which they first were."""
    order: list[str] = []
    lock = audit.lock_audit_head

    def noting(tx: Any, tenant_id: str) -> Any:
        if tenant_id not in order:
            order.append(tenant_id)
        return lock(tx, tenant_id)

    with monkeypatch.context() as patch:
        patch.setattr(audit, "lock_audit_head", noting)
        yield order


def fleets(app: Flask) -> list[Api]:
    admins = [api_as(app, Role.ADMIN, tenant_id) for tenant_id in TENANTS]
    for admin in admins:
        admin.register()
    return admins


def test_bundles_of_several_tenants_expire_in_the_order_of_the_tenants(
    app: Flask, clock: Clock, locked: list[str]
) -> None:
    fleets(app)
    clock.advance(days=40)
    locked.clear()
    jobs.expire(portal_of(app))
    assert locked == sorted(TENANTS)


def test_overlaps_of_several_tenants_end_in_the_order_of_the_tenants(
    app: Flask, clock: Clock, locked: list[str]
) -> None:
    for admin in [api_as(app, Role.ADMIN, tenant_id) for tenant_id in TENANTS]:
        device_id = admin.register(csr=csr_pem())["device_id"]
        assert admin.post(f"/devices/{device_id}/renew", {"csr": csr_pem()}).status_code == 201
    clock.advance(days=2)
    locked.clear()
    portal_of(app).renewals.end_overlaps()
    assert locked[: len(TENANTS)] == sorted(TENANTS)  # what follows is the reconciliation's


def test_what_is_done_to_a_tenant_is_recorded_in_the_order_of_the_tenants(app: Flask, locked: list[str]) -> None:
    fleets(app)
    portal = portal_of(app)
    for tenant_id, order in (("acme", ["acme", "default"]), ("zeta", ["default", "zeta"])):
        locked.clear()
        with portal.database.transaction() as tx:
            record_of_both(tx, audit.system_actor("default"), "tenant:update", tenant_id, portal.clock())
        assert locked == order


def test_a_key_of_a_device_is_looked_up_once_when_it_is_certified(app: Flask) -> None:
    admin, looked = api_as(app, Role.ADMIN), list[str]()

    def note(statement: str, _rows: object) -> None:
        if statement.startswith("SELECT") and "FROM device_keys" in statement:
            looked.append(statement)

    with noting(portal_of(app).database.engine, note):
        admin.register(csr=csr_pem())
    assert len(looked) == 1
