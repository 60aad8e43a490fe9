"""PostgreSQL itself shows a request the rows of its tenant alone, even where a query forgets to ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection

from app import portal_of
from core.roles import Role
from operations.wiring import Portal
from store import tenants
from store.scope import NO_TENANT
from store.tables import METADATA, Device, DeviceKey, Tenant, Token
from store.tenants import TokenRecord
from tests.support.est import new_key
from tests.support.harness import ON_POSTGRESQL, api_as, as_owner, csr_pem, problem_of

pytestmark = ON_POSTGRESQL
OF_TENANTS = [table for table in METADATA.sorted_tables if "tenant_id" in table.c]
OF_NODES = {"enforcement_steps", "leaders", "node_invitations", "nodes", "pages", "setting_changes", "shared_files"}
OF_THE_INSTALLATION = {"tenants", "brokers", "broker_agents", "broker_state", *OF_NODES}
FILLED = {
    "audit_entries",
    "audit_heads",
    "certificates",
    "crls",
    "deliveries",
    "device_keys",
    "devices",
    "issuers",
    "tokens",
}


@pytest.fixture
def two(app: Flask) -> Portal:
    """Two tenants, ``default`` and ``another``, with a device each."""
    for tenant_id in ("default", "another"):
        api_as(app, Role.ADMIN, tenant_id).register()
    return portal_of(app)


def owners(tx: Connection, table: sa.Table) -> set[str]:
    return set(tx.execute(sa.select(table.c.tenant_id)).scalars())


def test_every_table_with_a_tenant_has_a_policy_and_the_others_are_known(portal: Portal) -> None:
    with portal.database.snapshot() as tx:
        held = set(tx.execute(sa.text("SELECT relname FROM pg_class WHERE relrowsecurity")).scalars())
        policies = set(tx.execute(sa.text("SELECT tablename FROM pg_policies WHERE cmd = 'ALL'")).scalars())
    assert held == policies == {table.name for table in OF_TENANTS}
    assert {table.name for table in METADATA.sorted_tables} - held == OF_THE_INSTALLATION


def test_a_query_without_a_condition_sees_the_rows_of_the_tenant_alone(two: Portal) -> None:
    database = two.database
    for sees, seen in (("another", {"another"}), ("default", {"default"}), (NO_TENANT, set()), ("nobody", set())):
        with database.transaction(sees=sees) as tx:
            assert all(owners(tx, table) <= seen for table in OF_TENANTS), sees
            assert owners(tx, METADATA.tables["devices"]) == seen
    with database.snapshot() as tx:
        assert {table.name for table in OF_TENANTS if owners(tx, table)} >= FILLED
        assert owners(tx, METADATA.tables["devices"]) == {"default", "another"}


def test_nothing_of_another_tenant_is_changed_or_deleted(two: Portal) -> None:
    with two.database.transaction(sees="another") as tx:
        for table in OF_TENANTS:
            of_default = table.c.tenant_id == "default"
            assert tx.execute(sa.update(table).where(of_default).values(tenant_id="another")).rowcount == 0, table.name
            assert tx.execute(sa.delete(table).where(of_default)).rowcount == 0, table.name


def test_no_row_is_written_for_another_tenant(two: Portal) -> None:
    forged = TokenRecord("0" * 16, "default", "forged", "admin", two.clock(), None, None)
    for attack in (
        lambda tx: tenants.add_token(tx, forged, secret="a secret"),
        lambda tx: tx.execute(sa.update(Token).values(tenant_id="default")),
    ):
        with pytest.raises(sa.exc.ProgrammingError, match="row-level security"):
            two.database.write(attack, sees="another")


def test_a_route_whose_query_forgets_the_tenant_still_tells_of_its_own_alone(
    app: Flask, two: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def every_token(tx: Connection, _tenant_id: str) -> Sequence[TokenRecord]:
        return [TokenRecord(*row) for row in tx.execute(sa.select(*tenants.TOKEN_COLUMNS))]

    monkeypatch.setattr(tenants, "list_tokens", every_token)
    answer = api_as(app, Role.ADMIN, "another").get("/tokens")
    with two.database.snapshot() as tx:
        of_both = list(tx.execute(sa.select(Token.tenant_id)).scalars())
    assert len(answer.json["tokens"]) == of_both.count("another") < len(of_both)


def test_an_answer_that_is_made_while_it_is_sent_stays_in_the_scope_of_its_request(
    app: Flask, two: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def every_entry(tx: Connection, _tenant_id: str, *, after: int, limit: int) -> Sequence[dict[str, object]]:
        assert set(tx.execute(sa.select(Device.tenant_id)).scalars()) == {"another"}
        return []

    monkeypatch.setattr("store.audit.read_entries", every_entry)
    assert api_as(app, Role.AUDITOR, "another").get("/audit/export").status_code == 200


def test_the_role_that_a_portal_should_have_may_not_get_round_it(portal: Portal) -> None:
    for attack in (
        "ALTER TABLE devices DISABLE ROW LEVEL SECURITY",
        "DROP POLICY devices_of_tenant ON devices",
        "TRUNCATE presences",
        "SET ROLE portal",
        "CREATE TABLE mine (id int)",
    ):
        with pytest.raises(sa.exc.ProgrammingError), portal.database.transaction(sees="another") as tx:
            tx.exec_driver_sql(attack)


def test_the_owner_is_not_held_which_the_doctor_warns_of(two: Portal) -> None:
    with as_owner(two) as tx:
        tx.exec_driver_sql("SELECT set_config('portal.tenant', 'another', true)")
        assert owners(tx, METADATA.tables["devices"]) == {"default", "another"}


# --- What is one in the installation --------------------------------------------------------------------------------


def test_a_key_that_was_compromised_in_one_tenant_is_certified_in_none_and_nobody_is_told_whose_it_was(
    app: Flask, two: Portal
) -> None:
    owner, neighbour = api_as(app, Role.ADMIN), api_as(app, Role.ADMIN, "another")
    key = new_key()
    device_id = owner.register(csr=csr_pem(key))["device_id"]
    other = neighbour.register(csr=csr_pem(key))["device_id"]  # the same key, while it is good
    owner.post(f"/revoke/{device_id}", {"reason": "key_compromise"})
    row = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0", "csr": csr_pem(key)}
    problem = problem_of(neighbour.post("/register", row), 422, "key_compromised")
    assert device_id not in problem["detail"]
    assert "default" not in problem["detail"]
    renewal = neighbour.post(f"/devices/{other}/renew", {"csr": csr_pem(key)})
    assert problem_of(renewal, 422, "key_compromised")["detail"] == problem["detail"]
    with two.database.transaction(sees="another") as tx:
        assert tx.execute(sa.delete(DeviceKey).where(DeviceKey.tenant_id == "default")).rowcount == 0


def test_a_tenant_that_is_added_needs_the_scope_of_all(two: Portal) -> None:
    with pytest.raises(sa.exc.ProgrammingError), two.database.transaction(sees="another") as tx:
        tenants.add_tenant(tx, "third", created_at=two.clock())
    with two.database.snapshot() as tx:
        assert set(tx.execute(sa.select(Tenant.id)).scalars()) == {"default", "another"}
