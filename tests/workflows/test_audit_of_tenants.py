"""Each tenant's audit record is signed and verified by itself, and nothing public of it names the tenant."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from click.testing import CliRunner
from flask import Flask

from app import create_app, portal_of
from cli import cli
from core.broker_control import ControlKind
from core.roles import Role
from operations import jobs
from operations.doctor.base import Installation, State
from operations.doctor.data import audit_record
from operations.wiring import Portal, prepare
from store import audit, tenants
from tests.store.test_audit import tamper
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, problem_of
from workflows import audit as audit_log
from workflows.audit import CHECKPOINT_FOLDER, KEY_FOLDER, log_of
from workflows.operators import new_token

NAME = "second-customer"


def with_a_second(portal: Portal) -> str:
    """Add a tenant with an entry in its record, and an admin, whose token is returned."""
    secret, record = new_token(NAME, "an admin", Role.ADMIN, None, now=portal.clock())
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, NAME, created_at=portal.clock())
        tenants.add_token(tx, record, secret=secret)
        audit.record(tx, audit.system_actor(NAME), "device:update", "device:x", at=portal.clock())
    return secret


def size(note: str) -> int:
    return int(note.splitlines()[1])


def alter(portal: Portal) -> None:
    tamper(portal, f"UPDATE audit_entries SET actor = 'nobody' WHERE number = 1 AND tenant_id = '{NAME}'")  # noqa: S608


@ON_SQLITE
def test_a_record_that_has_not_changed_is_not_looked_at_again_until_its_files_have(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_a_second(portal)
    looked, is_due = list[str](), audit_log.AuditLog.is_due

    def noting(log: audit_log.AuditLog, number: int) -> bool:
        looked.append(log.tenant_id)
        return is_due(log, number)

    jobs.sign_audit_record(portal)  # and the key of the second, which is an entry of its record
    jobs.sign_audit_record(portal)
    monkeypatch.setattr(audit_log.AuditLog, "is_due", noting)
    jobs.sign_audit_record(portal)
    assert looked == []
    with portal.database.transaction() as tx:
        audit.record(tx, audit.system_actor(NAME), "device:update", "device:x", at=portal.clock())
    jobs.sign_audit_record(portal)
    assert looked == [NAME]
    portal.audit_log.files.checkpoint_path().write_bytes(b"{}")
    jobs.sign_audit_record(portal)
    assert {*looked[1:]} == {portal.first_tenant}
    assert portal.memory.audit_problems.keys() == {portal.first_tenant}


@ON_SQLITE
def test_a_single_tenant_has_no_more_files_than_before(portal: Portal) -> None:
    jobs.sign_audit_record(portal)
    assert not (portal.settings.secrets_dir / KEY_FOLDER).exists()
    assert not (portal.settings.data_dir / CHECKPOINT_FOLDER).exists()


def test_the_job_signs_each_record_with_a_key_of_its_own_when_it_is_due(
    portal: Portal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_a_second(portal)
    jobs.sign_audit_record(portal)
    own, first = portal.audit_logs.of(NAME), portal.audit_log
    assert size(own.newest()) == 2  # with the entry of the key
    assert str(own.verifier) != str(first.verifier)
    before = size(first.newest())
    with portal.database.transaction() as tx:
        audit.record(tx, audit.system_actor(NAME), "device:update", "device:x", at=clock())
    jobs.sign_audit_record(portal)
    assert size(own.newest()) == 2
    monkeypatch.setattr(audit_log, "CHECKPOINT_ENTRIES", 1)
    jobs.sign_audit_record(portal)
    assert (size(own.newest()), size(first.newest())) == (3, before)
    assert own.verifier.open(own.newest()).size == 3
    for path in (portal.settings.secrets_dir / KEY_FOLDER / NAME, own.files.checkpoint_path()):
        assert path.stat().st_mode & 0o777 == 0o600


@ON_SQLITE
def test_a_changed_record_is_told_with_its_tenant_and_the_others_are_signed_still(
    portal: Portal, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with_a_second(portal)
    alter(portal)
    with caplog.at_level(logging.ERROR):
        jobs.sign_audit_record(portal)
        jobs.sign_audit_record(portal)
    assert [(vars(record)["tenant"], vars(record)["problem"][:20]) for record in caplog.records] == [
        (NAME, "Entry 1 was altered:")
    ]
    assert size(portal.audit_log.newest()) > 0
    installation = Installation(portal.settings, clock)
    found = audit_record(installation)
    installation.close()
    assert (found.state, NAME in found.detail) == (State.PROBLEM, True)


@ON_SQLITE
def test_the_start_compares_each_record_with_its_checkpoint(portal: Portal, caplog: pytest.LogCaptureFixture) -> None:
    with_a_second(portal)
    jobs.sign_audit_record(portal)
    tamper(portal, f"UPDATE audit_entries SET hash = 'x' WHERE number = 2 AND tenant_id = '{NAME}'")  # noqa: S608
    with caplog.at_level(logging.ERROR):
        prepare(portal)
    assert [(record.message, vars(record)["tenant"]) for record in caplog.records] == [
        ("the audit record was changed", NAME)
    ]


@ON_SQLITE
def test_a_damaged_key_of_one_tenant_keeps_no_other_record_from_being_signed(portal: Portal) -> None:
    with_a_second(portal)
    jobs.sign_audit_record(portal)
    (portal.settings.secrets_dir / KEY_FOLDER / NAME).write_text("nonsense")
    before = size(portal.audit_log.newest())
    with portal.database.transaction() as tx:
        for _ in range(audit_log.CHECKPOINT_ENTRIES):
            audit.record(tx, audit.system_actor("default"), "device:update", "device:x", at=portal.clock())
    jobs.sign_audit_record(portal)
    assert size(portal.audit_log.newest()) > before
    assert "is damaged" in portal.memory.audit_problems[NAME]


@ON_SQLITE
def test_the_command_verifies_every_record_and_names_the_damaged_one(portal: Portal) -> None:
    with_a_second(portal)
    jobs.sign_audit_record(portal)
    key = str(portal.audit_logs.of(NAME).verifier)
    guarded = portal.settings.model_copy(update={"broker_control": ControlKind.GUARD})  # as further tenants need
    app = create_app(guarded, background=False)
    with app.app_context():
        runner = app.test_cli_runner()
        output = runner.invoke(args=["audit", "verify"]).output
        assert "Tenant default: All " in output
        assert f"Tenant {NAME}: All 2 entries are sound." in output
        assert runner.invoke(args=["audit", "key", "--tenant", NAME]).output == f"{key}\n"
        alter(portal)
        result = runner.invoke(args=["audit", "verify"])
        assert (result.exit_code, f"Tenant {NAME}: Entry 1 was altered" in result.output) == (1, True)
        assert "Tenant default: All " in result.output


@ON_SQLITE
def test_an_operator_gets_the_checkpoint_of_its_tenant_and_anyone_by_the_log_that_names_nobody(
    app: Flask, tmp_path: Path
) -> None:
    portal, anyone = portal_of(app), api_as(app, None)
    own = Api(app.test_client(), with_a_second(portal))
    problem_of(own.get("/audit/checkpoint"), 404, "not_found")
    problem_of(own.get("/audit/key"), 404, "not_found")
    jobs.sign_audit_record(portal)
    answer, key = own.get("/audit/checkpoint"), own.get("/audit/key").text
    assert key == f"{portal.audit_logs.of(NAME).verifier}\n"
    assert answer.headers["Vary"] == "Authorization"
    assert NAME not in answer.text + key
    log = log_of(portal.audit_logs.of(NAME).verifier)
    assert anyone.get(f"/audit/{log}/checkpoint").text == answer.text
    assert anyone.get(f"/audit/{log_of(portal.audit_log.verifier)}/checkpoint").text == portal.audit_log.newest()
    assert anyone.get("/audit/checkpoint").text == portal.audit_log.newest()
    for unknown in ("0" * 16, "audit-keys", "..%2f..%2fsecrets", "A" * 16):
        problem_of(anyone.get(f"/audit/{unknown}/checkpoint"), 404, "not_found")
    (tmp_path / "export").write_bytes(own.get("/audit/export").data)
    (tmp_path / "note").write_text(answer.text)
    words = ["audit", "verify", str(tmp_path / "export"), "--key", key.strip(), "--checkpoint", str(tmp_path / "note")]
    assert CliRunner().invoke(cli, words).exit_code == 0
