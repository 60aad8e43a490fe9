"""Checkpoints of the audit record in a backup, and what a restore makes of them."""

from __future__ import annotations

import zipfile
from pathlib import Path

from click.testing import CliRunner

from cli import cli
from config import Settings
from core.broker_control import ControlKind
from operations import jobs
from operations.wiring import Portal
from pki.checkpoints import SigningKey, VerifierKey
from store import audit
from tests.store.test_audit import tamper
from tests.support.backups import bring_passphrase, copied, opened, put_back
from tests.support.harness import ON_SQLITE, Clock
from tests.workflows.test_audit import altered, rewrite
from tests.workflows.test_audit_of_tenants import NAME, alter, with_a_second
from tests.workflows.test_registration import OPERATOR, PUMP
from workflows.audit import CHECKPOINT_FILE, KEY_FILE, KEY_FOLDER

pytestmark = ON_SQLITE


def verified(portal: Portal, folder: Path, note: str, key: str) -> int:
    """The exit status of ``portal audit verify`` for the record as it is now."""
    (folder / "checkpoint").write_text(note)
    (folder / "audit.ndjson").write_bytes(b"".join(portal.audit_log.export()))
    words = ["--key", key, "--checkpoint", str(folder / "checkpoint")]
    return CliRunner().invoke(cli, ["audit", "verify", str(folder / "audit.ndjson"), *words]).exit_code


def test_a_backup_has_the_newest_checkpoint_and_the_public_key_alone(
    settings: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        assert portal.audit_log.make_checkpoint() is None
        note = portal.audit_log.newest()
    copied(settings, file, clock)
    seed = (settings.secrets_dir / KEY_FILE).read_bytes().strip().split(b"+", 4)[-1]
    with zipfile.ZipFile(file) as archive:
        assert archive.read("audit/checkpoint").decode() == note
        assert VerifierKey.parse(archive.read("audit/key").decode()).open(note).size > 0
        assert not [name for name in archive.namelist() if seed in archive.read(name)]


def test_a_restored_record_begins_a_series_of_checkpoints_under_another_key(
    settings: Settings, file: Path, clock: Clock, tmp_path: Path
) -> None:
    """Else one key would sign two records of which one lacks what the other has."""
    with opened(settings, clock) as portal:
        assert portal.audit_log.make_checkpoint() is None
        before, old_key = portal.audit_log.newest(), str(portal.audit_log.verifier)
        copied(settings, file, clock)
        portal.registrations.register(OPERATOR, PUMP)
        assert portal.audit_log.make_checkpoint(at_once=True) is None
        lost = portal.audit_log.newest()
    assert not put_back(settings, file, clock).notes
    with opened(settings, clock) as portal:
        assert portal.audit_log.problem() is None
        assert portal.audit_log.make_checkpoint() is None
        new_key = str(portal.audit_log.verifier)
        assert new_key.partition("+")[0] != old_key.partition("+")[0]
        with portal.database.snapshot() as tx:
            newest = audit.list_audit_entries(tx, "default", limit=9, filters={"action": "audit:key"})
        assert [entry.detail["verifier_key"] for entry in newest] == [new_key, old_key]
        assert verified(portal, tmp_path, portal.audit_log.newest(), new_key) == 0
        assert verified(portal, tmp_path, before, old_key) == 0
        assert verified(portal, tmp_path, lost, old_key) == 1  # the entries that the restore lost
    kept = settings.data_dir / f"{CHECKPOINT_FILE}.before-restore"
    assert lost.splitlines()[2] in kept.read_text()


def test_copies_of_the_signing_key_are_in_no_later_backup(settings: Settings, file: Path, clock: Clock) -> None:
    copied(settings, file, clock)
    put_back(settings, file, clock)
    with opened(settings, clock):
        pass
    again = file.with_name("again.backup")
    copied(settings, again, clock)
    with zipfile.ZipFile(again) as archive:
        assert not [name for name in archive.namelist() if KEY_FILE in name]


def test_a_record_that_was_changed_before_the_backup_is_told_at_the_restore(
    settings: Settings, elsewhere: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        assert portal.audit_log.make_checkpoint() is None
        rewrite(portal, lambda entries: altered(entries, 3))
    copied(settings, file, clock)
    bring_passphrase(settings, elsewhere)
    notes = put_back(elsewhere, file, clock).notes
    assert [note for note in notes if "is not the one that its checkpoint of" in note]


def test_a_backup_without_a_checkpoint_is_restored_and_checked_by_its_chain(
    settings: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        tamper(portal, "UPDATE audit_entries SET actor = 'nobody' WHERE number = 3")
    copied(settings, file, clock)
    assert [note for note in put_back(settings, file, clock).notes if "Entry 3 was altered" in note]


def test_a_checkpoint_of_another_key_in_the_data_folder_is_told(settings: Settings, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        assert portal.audit_log.make_checkpoint() is None
    path = settings.secrets_dir / KEY_FILE
    path.write_text(str(SigningKey.create("portal.example.com/audit/2")))
    with opened(settings, clock) as portal:
        assert CHECKPOINT_FILE in str(portal.audit_log.problem())


def test_a_backup_has_each_checkpoint_and_no_key_and_the_restored_records_begin_new_series(
    settings: Settings, file: Path, clock: Clock
) -> None:
    settings = settings.model_copy(update={"broker_control": ControlKind.GUARD})  # as further tenants need
    with opened(settings, clock) as portal:
        with_a_second(portal)
        jobs.sign_audit_record(portal)
        note, key = portal.audit_logs.of(NAME).newest(), str(portal.audit_logs.of(NAME).verifier)
        alter(portal)
    seed = (settings.secrets_dir / KEY_FOLDER / NAME).read_bytes().strip().split(b"+", 4)[-1]
    copied(settings, file, clock)
    with zipfile.ZipFile(file) as archive:
        assert archive.read(f"audit/{NAME}/checkpoint").decode() == note
        assert archive.read(f"audit/{NAME}/key").decode() == key
        assert not [name for name in archive.namelist() if seed in archive.read(name)]
    notes = put_back(settings, file, clock).notes
    assert [text[:60] for text in notes] == [f"The audit record of the tenant {NAME} in the backup is damaged"[:60]]
    with opened(settings, clock) as portal:
        assert not portal.audit_logs.problems()
        problem_of_new = portal.audit_logs.sign_due()
        assert "Entry 1 was altered" in problem_of_new[NAME]
        assert str(portal.audit_logs.of(NAME).verifier) != key
