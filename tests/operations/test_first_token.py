"""The first admin token: made once, for a day; it does not come back, and another takes the machine's owner."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable

import pytest
from click.testing import CliRunner
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.errors import NotFound
from core.roles import Role
from operations.commands import _operator_environment, admin_token
from operations.doctor.base import Installation, State
from operations.doctor.data import tokens as examine_tokens
from operations.owner_tokens import first_token, make_admin_token
from operations.token_commands import token_group
from operations.wiring import Portal
from store import audit, tenants
from store.tenants import TokenRecord
from tests.support.harness import ON_SQLITE, Clock
from tests.workflows.test_registration import OPERATOR

pytestmark = ON_SQLITE
SYSTEM = dataclasses.replace(OPERATOR, role=Role.SYSTEM)


def record_of(portal: Portal, secret: str | None) -> TokenRecord:
    assert secret is not None
    with portal.database.snapshot() as tx:
        record = tenants.find_token(tx, secret)
    if record is None:
        raise NotFound("no token")
    return record


def count(portal: Portal) -> int:
    return len(portal.operators.tokens("default"))


def test_the_first_start_makes_an_admin_token_for_a_day_and_the_next_ones_find_it(portal: Portal) -> None:
    secret = first_token(portal)
    record = record_of(portal, secret)
    assert record.role == Role.SYSTEM
    assert record.expires_at is not None
    assert (record.expires_at - record.created_at).total_seconds() == 24 * 3600
    assert first_token(portal) == secret
    assert first_token(portal, renew=True) == secret
    assert count(portal) == 1


@pytest.mark.parametrize("renew", [False, True])
def test_it_does_not_come_back_after_it_was_revoked(portal: Portal, clock: Clock, renew: bool) -> None:
    portal.operators.revoke(SYSTEM, record_of(portal, first_token(portal)).id, force=True)
    assert first_token(portal, renew=renew) is None
    clock.advance(days=2)
    assert first_token(portal, renew=renew) is None
    assert count(portal) == 1


def test_it_ends_after_a_day_and_a_start_makes_no_other(portal: Portal, clock: Clock) -> None:
    secret = first_token(portal)
    clock.advance(hours=25)
    assert secret is not None
    assert portal.operators.authenticate(secret) is None
    assert first_token(portal) is None
    assert count(portal) == 1


def test_a_lost_file_brings_no_other_token_but_with_scripts_run(portal: Portal) -> None:
    (portal.settings.secrets_dir / "operator-token").unlink()
    assert first_token(portal) is None
    assert record_of(portal, first_token(portal, renew=True)).role == Role.SYSTEM


@pytest.mark.parametrize("hours", [13, 30])
def test_scripts_run_renews_it_the_next_day(portal: Portal, clock: Clock, hours: int) -> None:
    old = first_token(portal)
    clock.advance(hours=hours)
    new = first_token(portal, renew=True)
    assert new != old
    assert record_of(portal, new).is_valid(clock())
    assert record_of(portal, old).revoked_at is not None
    with portal.database.snapshot() as tx:
        [made, *_] = audit.list_audit_entries(tx, "default", limit=1)
    assert (made.action, made.detail["replaces"]) == ("token:create", record_of(portal, old).id)


def test_a_first_start_that_was_killed_before_the_commit_is_the_first_again(portal: Portal, clock: Clock) -> None:
    with portal.database.transaction() as tx:
        tx.exec_driver_sql("DELETE FROM tokens")
    assert record_of(portal, first_token(portal)).is_valid(clock())


def test_the_owner_of_the_machine_makes_another_one(app: Flask) -> None:
    portal = portal_of(app)
    old = first_token(portal)
    portal.operators.revoke(SYSTEM, record_of(portal, old).id, force=True)
    with app.app_context():
        result = CliRunner().invoke(admin_token)
    assert result.exit_code == 0, result.output
    path = portal.settings.data_dir / "operator.env"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = first_token(portal)
    assert secret is not None
    assert f"export PORTAL_TOKEN={secret}\n" in path.read_text()
    assert secret not in result.output
    record = record_of(portal, secret)
    assert (record.role, record.is_valid(portal.clock())) == (Role.SYSTEM, True)
    with portal.database.snapshot() as tx:
        [made, *_] = audit.list_audit_entries(tx, "default", limit=1, filters={"action": "token:create"})
    assert (made.actor, made.object) == ("portal", f"token:{record.id}")


def test_a_token_that_is_not_there_is_looked_for_by_a_command_of_the_server(app: Flask) -> None:
    with app.app_context():
        result = CliRunner().invoke(token_group, ["revoke", "0" * 16])
    assert (result.exit_code, "token list" in result.output, "GET" in result.output) == (1, True, False)


def test_the_owner_of_the_machine_makes_an_admin_of_another_tenant(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    app = create_app(make_settings(PORTAL_BROKER_CONTROL="guard"), background=False, clock=clock)
    portal = portal_of(app)
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "acme", created_at=portal.clock())
    first = first_token(portal)
    with app.app_context():
        result = CliRunner().invoke(admin_token, ["--tenant", "acme"])
        unknown = CliRunner().invoke(admin_token, ["--tenant", "nobody"])
    assert result.exit_code == 0, result.output
    record = record_of(portal, result.output.rpartition("PORTAL_TOKEN=")[2].strip())
    assert (record.tenant_id, record.role, record.is_valid(portal.clock())) == ("acme", Role.ADMIN, True)
    assert first_token(portal) == first
    with portal.database.snapshot() as tx:
        [made, *_] = audit.list_audit_entries(tx, "acme", limit=1)
    assert (made.action, made.object) == ("token:create", f"token:{record.id}")
    assert (unknown.exit_code, unknown.output.startswith("Error: There is no tenant")) == (1, True)
    portal.close()


def test_a_token_from_before_the_role_above_the_tenants_is_renewed_as_an_admins(portal: Portal, clock: Clock) -> None:
    with portal.database.transaction() as tx:
        tx.exec_driver_sql("UPDATE tokens SET is_system = FALSE")
    clock.advance(hours=13)
    assert record_of(portal, first_token(portal, renew=True)).role == Role.ADMIN
    assert make_admin_token(portal)[1].role == Role.SYSTEM


def test_another_one_replaces_that_which_is_valid(portal: Portal) -> None:
    old = first_token(portal)
    secret, _ = make_admin_token(portal)
    assert secret == first_token(portal)
    assert record_of(portal, old).revoked_at is not None


def test_operator_env_has_no_token_once_it_has_ended(portal: Portal) -> None:
    assert "PORTAL_TOKEN" not in _operator_environment(portal.settings, None)
    assert "export PORTAL_URL=" in _operator_environment(portal.settings, None)


def test_the_doctor_warns_where_no_admin_token_is_valid(portal: Portal, clock: Clock) -> None:
    installation = Installation(portal.settings, clock)
    assert examine_tokens(installation).state is State.OK
    clock.advance(days=2)
    finding = examine_tokens(installation)
    assert (finding.state, "admin-token" in finding.advice) == (State.WARNING, True)
    installation.close()
