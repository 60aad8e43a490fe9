"""A restore that is killed at any step leaves the portal as it was or as the copy has it, and nobody comes back."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from config import Settings
from core import failpoints
from core.errors import BackupRefused, DatabaseUnavailable, StartupError
from core.states import DeviceStatus
from operations.backup import restore_journal
from operations.wiring import open_portal, prepare
from store.tables import DEFAULT_TENANT
from tests.conftest import DATABASES
from tests.support.backups import (
    Story,
    all_bytes,
    bring_passphrase,
    contents,
    copied,
    listed,
    lose_the_database,
    opened,
    put_back,
    status_of,
)
from tests.support.harness import ON_SQLITE, Clock, copy_with_groups
from tests.workflows.test_registration import OPERATOR, PUMP

STEPS = ["restore.journaled", "restore.filled", "restore.journaled:2", "restore.placed", "restore.ended"]
STEPS_OF_ANOTHERS_FOLDER = ["restore.moved", "restore.put", "restore.put:3", "restore.placed", "restore.ended"]
STANDS = "restore.ended"
INTO_SQLITE = pytest.mark.parametrize("elsewhere", ["sqlite"], indirect=True)
INTO_POSTGRESQL = pytest.mark.parametrize("elsewhere", DATABASES[1:], indirect=True)


def killed(step: str, restoring: Callable[[], object]) -> None:
    """Restore in a process that is killed with SIGKILL at a step; fails where it is not."""
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(failpoints.Plan(step))
            restoring()
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"it was not killed, but ended with {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def is_whole(settings: Settings) -> None:
    assert not restore_journal.is_unsettled(settings)
    assert not list(settings.data_dir.glob("*.restoring*"))


@pytest.mark.parametrize("step", STEPS)
def test_the_next_start_finds_the_old_state_or_the_new_one(story: Story, clock: Clock, step: str) -> None:
    settings = story.settings
    (settings.secrets_dir / "link-keys").unlink()  # so that there is a file to be put back
    killed(step, story.put_back)
    with opened(settings, clock) as portal:
        is_whole(settings)
        prepare(portal)
        restored = [
            entry.action for entry in portal.operators.audit(DEFAULT_TENANT, limit=9, before=None, filters={})[0]
        ]
        assert ("backup:restore" in restored) == (step == STANDS)
        assert status_of(portal, story.goes) is DeviceStatus.REVOKED
        assert status_of(portal, story.held) is DeviceStatus.SUSPENDED
    assert set(story.on_crl) <= set(listed(settings))
    done = story.put_back()
    assert done.kept
    with opened(settings, clock) as portal:
        assert status_of(portal, story.goes) is DeviceStatus.REVOKED


@ON_SQLITE
@pytest.mark.parametrize("step", ["restore.filled", "restore.linked", "restore.ended"])
def test_over_a_lost_database_a_restore_can_simply_be_run_again(story: Story, clock: Clock, step: str) -> None:
    settings = story.settings
    lose_the_database(settings)
    before = all_bytes(settings)
    killed(step, story.put_back)
    if step != STANDS:
        with pytest.raises(DatabaseUnavailable, match="damaged; restore a backup"):
            open_portal(settings, clock)
        assert all_bytes(settings) == before
    story.put_back()
    is_whole(settings)
    with opened(settings, clock) as portal:
        prepare(portal)
        assert status_of(portal, story.goes) is DeviceStatus.REVOKED
    assert set(story.on_crl) <= set(listed(settings))


@pytest.fixture
def another(
    elsewhere: Settings, settings: Settings, file: Path, clock: Clock, other_folder: Path
) -> tuple[Settings, str]:
    """A data folder of another CA, in which a backup is to be put back, with that CA."""
    with opened(settings, clock) as portal:
        gone = portal.registrations.register(OPERATOR, PUMP)
        portal.revocations.revoke(OPERATOR, gone.device_id, "key_compromise")
    copied(settings, file, clock)
    if elsewhere.database_url.startswith("sqlite"):
        copy_with_groups(other_folder, elsewhere.data_dir)
        return elsewhere, (other_folder / "ca.pem").read_text()
    bring_passphrase(settings, elsewhere)
    with opened(elsewhere, clock) as portal:
        prepare(portal)
        ca_pem = portal.authority.first.ca_pem
    return elsewhere, ca_pem


@ON_SQLITE
@INTO_SQLITE
@pytest.mark.parametrize("step", STEPS_OF_ANOTHERS_FOLDER)
def test_keys_and_database_are_of_one_ca(another: tuple[Settings, str], file: Path, clock: Clock, step: str) -> None:
    settings, ca_pem = another
    before = all_bytes(settings)
    killed(step, lambda: put_back(settings, file, clock))
    with opened(settings, clock) as portal:
        is_whole(settings)
        assert (portal.authority.first.ca_pem == ca_pem) == (step != STANDS)
        if step != STANDS:
            kept = {path: content for path, content in all_bytes(settings).items() if "portal.db" not in path.name}
            assert kept == {path: content for path, content in before.items() if "portal.db" not in path.name}


@ON_SQLITE
@INTO_SQLITE
def test_an_empty_folder_does_not_become_a_portal_with_the_copys_keys_and_an_empty_crl(
    settings: Settings, elsewhere: Settings, file: Path, clock: Clock
) -> None:
    copied(settings, file, clock)
    bring_passphrase(settings, elsewhere)
    killed("restore.placed", lambda: put_back(elsewhere, file, clock))
    assert list(elsewhere.ca_dir.iterdir())
    with opened(elsewhere, clock) as portal, opened(settings, clock) as original:
        theirs = [item.issuer.certificate.public_key() for item in original.authority.issuers]
        assert all(item.issuer.certificate.public_key() not in theirs for item in portal.authority.issuers)


@ON_SQLITE
@INTO_SQLITE
def test_a_restore_whose_disk_fails_takes_itself_back(
    another: tuple[Settings, str], file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, ca_pem = another
    plan = failpoints.Plan("restore.put:2=error")
    monkeypatch.setattr(restore_journal, "failpoint", lambda step: plan(failpoints.EVENT, (step,)))
    with pytest.raises(BackupRefused, match="cannot be written"):
        put_back(settings, file, clock)
    is_whole(settings)
    with opened(settings, clock) as portal:
        assert portal.authority.first.ca_pem == ca_pem


@ON_SQLITE
def test_a_damaged_journal_stops_the_start(settings: Settings, clock: Clock) -> None:
    (settings.data_dir / restore_journal.NAME).write_text("{}")
    with pytest.raises(StartupError, match="is damaged"):
        open_portal(settings, clock)


@ON_SQLITE
@INTO_POSTGRESQL
def test_the_backup_of_what_was_there_can_be_put_back(another: tuple[Settings, str], file: Path, clock: Clock) -> None:
    settings, ca_pem = another
    with opened(settings, clock) as portal:
        device = portal.registrations.register(OPERATOR, PUMP)
    before = put_back(settings, file, clock).before
    assert before is not None
    put_back(settings, before, clock)
    with opened(settings, clock) as portal:
        assert portal.authority.first.ca_pem == ca_pem
        assert status_of(portal, device) is DeviceStatus.ACTIVE
        assert len(contents(portal)["devices"]) == 1
