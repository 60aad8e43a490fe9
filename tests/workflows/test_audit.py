"""Checkpoints of the audit record: whoever can rewrite the database cannot do so unnoticed."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from sqlalchemy.engine import Connection

from cli import cli
from core.merkle import Edge
from operations import jobs
from operations.doctor.base import Finding, Installation, State
from operations.doctor.data import audit_record
from operations.wiring import Portal, open_portal, prepare
from pki.checkpoints import SigningKey
from store import audit
from store.tables import AuditEntry, AuditHead
from tests.store.test_audit import tamper
from tests.support.harness import ON_SQLITE, Clock
from tests.workflows.test_registration import OPERATOR, PUMP
from workflows import audit as audit_log
from workflows.audit import CHECKPOINT_FILE, KEY_FILE

Entries = list[dict[str, Any]]


@dataclasses.dataclass
class Kept:
    """A portal with history, and what somebody outside keeps of it: a checkpoint and the public key."""

    portal: Portal
    folder: Path

    def checkpoint(self, name: str) -> str:
        """Let the portal make a checkpoint now, and keep it; returns the path."""
        assert self.portal.audit_log.make_checkpoint(at_once=True) is None
        (self.folder / name).write_text(self.portal.audit_log.newest())
        return str(self.folder / name)

    def verify(self, *names: str) -> Result:
        """Run ``portal audit verify`` on an export of now."""
        (self.folder / "audit.ndjson").write_bytes(b"".join(self.portal.audit_log.export()))
        options = [word for name in names for word in ("--checkpoint", str(self.folder / name))]
        key = str(self.portal.audit_log.verifier)
        return CliRunner().invoke(cli, ["audit", "verify", str(self.folder / "audit.ndjson"), "--key", key, *options])

    def doctor(self) -> Finding:
        installation = Installation(self.portal.settings, self.portal.clock)
        try:
            return audit_record(installation)
        finally:
            installation.close()


def act(portal: Portal) -> None:
    """Write four entries: the last is of the certificate that shows the broker the CRL of the revocation."""
    device = portal.registrations.register(OPERATOR, PUMP)
    portal.registrations.update(OPERATOR, device.device_id, {"name": "pümp-2", "metadata": {"weight": 1.5}})
    portal.revocations.revoke(OPERATOR, device.device_id, "superseded")


@pytest.fixture
def kept(portal: Portal, tmp_path: Path) -> Kept:
    """Two checkpoints, of 12 and of 16 entries, and an entry that none signs."""
    kept = Kept(portal, tmp_path)
    act(portal)
    kept.checkpoint("old")
    act(portal)
    kept.checkpoint("new")
    with portal.database.transaction() as tx:
        audit.record(tx, OPERATOR, "device:update", "device:x", at=portal.clock())
    return kept


def test_an_untouched_record_verifies_by_every_checkpoint(kept: Kept) -> None:
    for names in (["old"], ["new"], ["new", "old"]):
        result = kept.verify(*names)
        assert result.exit_code == 0, result.output
        assert "All 17 entries are sound" in result.output
    assert kept.doctor().state is State.OK
    assert kept.portal.audit_log.problem() is None


# --- The attacks ------------------------------------------------------------------------------------------------------


def rewrite(portal: Portal, change: Callable[[Entries], Entries], *, recompute: bool = True) -> None:
    """Replace the record by a changed one, as somebody could who may write the database and knows this program."""
    with portal.database.snapshot() as tx:
        entries = change(list(audit.read_entries(tx, "default", after=0)))
    if recompute:
        chain(entries)
    head = entries[-1] if entries else {"number": 0, "hash": "0" * 64}
    edge = Edge(0, b"")
    for entry in entries:
        edge.append(audit.canonical(entry))
    tamper(portal, "DELETE FROM audit_entries")
    with portal.database.transaction() as tx:
        if entries:
            tx.execute(sa.insert(AuditEntry), [{**entry, "id": entry["number"]} for entry in entries])
        tx.execute(sa.update(AuditHead).values(number=head["number"], hash=head["hash"], edge=edge.packed()))


def chain(entries: Entries) -> None:
    """Number the entries and compute all hashes again."""
    previous = "0" * 64
    for number, entry in enumerate(entries, 1):
        entry |= {"number": number, "previous_hash": previous}
        entry["hash"] = previous = hashlib.sha256(audit.canonical(entry)).hexdigest()


def altered(entries: Entries, index: int = 8) -> Entries:
    entries[index]["actor"] = "somebody else"
    return entries


def swapped(entries: Entries) -> Entries:
    entries[8], entries[9] = entries[9], entries[8]
    return entries


def swapped_with_their_numbers(entries: Entries) -> Entries:
    entries = swapped(entries)
    entries[8]["number"], entries[9]["number"] = 9, 10
    return entries


def inserted(entries: Entries) -> Entries:
    return [*entries[:9], {**entries[8], "object": "device:never"}, *entries[9:]]


ATTACKS: dict[str, tuple[Callable[[Entries], Entries], bool]] = {
    "the tail is cut, and the head set back": (lambda entries: entries[:9], True),
    "the tail is cut, and others written in its place": (
        lambda entries: entries[:9] + [dict(entries[2]) for _ in range(9)], True,
    ),
    "the last signed entry is altered, and the rest computed again": (lambda entries: altered(entries, 15), True),
    "an entry is altered, and the whole chain computed again": (altered, True),
    "entries are swapped, and the chain computed again": (swapped, True),
    "an entry is inserted, and the chain computed again": (inserted, True),
    "an entry is removed, and the chain computed again": (lambda entries: entries[:8] + entries[9:], True),
    "the record is emptied": (lambda _: [], True),
    "an entry is altered": (altered, False),
    "entries are swapped": (swapped_with_their_numbers, False),
    "an entry is removed": (lambda entries: entries[:8] + entries[9:], False),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_noticed_by_who_kept_a_checkpoint_by_the_doctor_and_at_the_start(
    kept: Kept, attack: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, recompute = ATTACKS[attack]
    rewrite(kept.portal, change, recompute=recompute)
    for names in (["old"], ["new"], ["new", "old"]):
        result = kept.verify(*names)
        changes_what_old_signs = attack != "the last signed entry is altered, and the rest computed again"
        assert (result.exit_code == 1) == (changes_what_old_signs or names != ["old"]), result.output
    assert kept.doctor().state is State.PROBLEM
    if recompute:  # what was changed alone is not looked at in each start
        newest = kept.portal.audit_log.newest()
        assert kept.portal.audit_log.problem() is not None
        assert kept.portal.audit_log.make_checkpoint(at_once=True) is not None
        assert kept.portal.audit_log.newest() == newest
        with caplog.at_level(logging.ERROR):
            prepare(kept.portal)
        assert [record.message for record in caplog.records] == ["the audit record was changed"]


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        ("the tail is cut, and the head set back", "The export ends with entry 9, but "),
        ("an entry is altered, and the whole chain computed again", "one between 1 and 12 was changed, inserted or"),
        ("the last signed entry is altered, and the rest computed again", "one between 13 and 16 was changed"),
        ("an entry is altered", "Entry 9 was altered: its hash is not that of its content."),
        ("entries are swapped", "Entry 9 does not follow entry 8: one was replaced, inserted or moved."),
        ("an entry is removed", "Entry 9 is missing: after 8 comes 10."),
    ],
)
@ON_SQLITE
def test_the_verifier_says_where_the_record_was_changed(kept: Kept, attack: str, sentence: str) -> None:
    change, recompute = ATTACKS[attack]
    rewrite(kept.portal, change, recompute=recompute)
    assert sentence in " ".join(kept.verify("old", "new").output.split())


def replace_an_entry(tx: Connection) -> None:
    """Write an altered entry 9, with a hash that fits it, in place of the one that is there."""
    [entry] = audit.read_entries(tx, "default", after=8, limit=1)
    entry["actor"] = "somebody else"
    entry["hash"] = hashlib.sha256(audit.canonical(entry)).hexdigest()
    tx.execute(sa.insert(AuditEntry).prefix_with("OR REPLACE"), entry)


@ON_SQLITE
def test_insert_or_replace_does_not_go_past_the_triggers(kept: Kept) -> None:
    with pytest.raises(sa.exc.IntegrityError, match="append-only"), kept.portal.database.transaction() as tx:
        replace_an_entry(tx)
    assert kept.verify("old").exit_code == 0


@ON_SQLITE
def test_insert_or_replace_without_the_trigger_is_noticed(kept: Kept) -> None:
    with kept.portal.database.transaction() as tx:
        tx.exec_driver_sql("DROP TRIGGER audit_entries_unreplaced")
        replace_an_entry(tx)
    assert "Entry 10 does not follow entry 9" in kept.verify("old").output
    assert kept.doctor().state is State.PROBLEM


@ON_SQLITE
def test_a_head_that_is_gone_is_noticed(kept: Kept) -> None:
    with kept.portal.database.transaction() as tx:
        tx.exec_driver_sql("DELETE FROM audit_heads")
    assert kept.doctor().state is State.PROBLEM
    assert "ends with entry 0" in str(kept.portal.audit_log.problem())


@ON_SQLITE
def test_a_changed_edge_of_the_tree_is_never_signed(kept: Kept) -> None:
    with kept.portal.database.transaction() as tx:
        edge = tx.execute(sa.select(AuditHead.edge)).scalar_one()
        tx.execute(sa.update(AuditHead).values(edge=bytes(32) + edge[32:]))
    assert "Merkle tree" in str(kept.portal.audit_log.make_checkpoint(at_once=True))
    assert kept.doctor().state is State.PROBLEM


@ON_SQLITE
def test_a_checkpoint_signed_with_another_key_is_refused(kept: Kept) -> None:
    """Whoever rewrites the record can sign it, too, but not with the key that verifiers know."""
    rewrite(kept.portal, altered)
    with kept.portal.database.snapshot() as tx:
        head = audit.audit_head(tx, "default")
    forger = SigningKey.create(kept.portal.audit_log.verifier.name)
    (kept.folder / "forged").write_text(forger.note_of(head.number, Edge(head.number, head.edge).root()))
    assert "is not a checkpoint that one of the given keys has signed" in " ".join(kept.verify("forged").output.split())
    assert kept.verify("forged").exit_code == 1


@ON_SQLITE
@pytest.mark.parametrize("change", ["null", "[]", '{"actor":1}', '{"actor": "space"}', "x" * 100, '{"a":1,"a":2}', ""])
def test_a_line_that_the_portal_does_not_write_is_refused(kept: Kept, change: str) -> None:
    lines = b"".join(kept.portal.audit_log.export()).splitlines()
    file = kept.folder / "changed.ndjson"
    file.write_bytes(b"\n".join([*lines[:3], change.encode(), *lines[3:]]) + b"\n")
    key = str(kept.portal.audit_log.verifier)
    words = ["audit", "verify", str(file), "--key", key, "--checkpoint", str(kept.folder / "new")]
    result = CliRunner().invoke(cli, words)
    assert (result.exit_code, "Line 4 of the export is not an entry" in result.output) == (1, True)


# --- When checkpoints are made ----------------------------------------------------------------------------------------


def size(portal: Portal) -> int:
    return int(portal.audit_log.newest().splitlines()[1])


def entries(portal: Portal) -> int:
    with portal.database.snapshot() as tx:
        return audit.audit_head(tx, "default").number


@ON_SQLITE
def test_the_job_signs_at_first_then_daily_and_after_a_number_of_entries(
    portal: Portal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jobs.sign_audit_record in [job.run for job in jobs.JOBS]
    jobs.sign_audit_record(portal)
    first = size(portal)
    assert first == entries(portal)
    act(portal)
    clock.advance(hours=23)
    jobs.sign_audit_record(portal)
    assert size(portal) == first
    clock.advance(hours=2)
    jobs.sign_audit_record(portal)
    assert size(portal) == first + 4
    act(portal)
    monkeypatch.setattr(audit_log, "CHECKPOINT_ENTRIES", 5)
    jobs.sign_audit_record(portal)
    assert size(portal) == first + 4
    act(portal)
    jobs.sign_audit_record(portal)
    assert size(portal) == first + 12


@ON_SQLITE
def test_the_job_reports_a_changed_record_once(kept: Kept, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(kept.portal, altered)
    clock.advance(days=2)
    with caplog.at_level(logging.ERROR):
        jobs.sign_audit_record(kept.portal)
        jobs.sign_audit_record(kept.portal)
    assert [record.message for record in caplog.records] == ["the audit record was changed, and is not signed any more"]


@ON_SQLITE
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"checkpoint": "x", "number": 1, "hash": "", "edge": "00"}'])
def test_a_damaged_file_of_the_checkpoint_is_told_and_never_written_over(kept: Kept, content: bytes) -> None:
    path = kept.portal.settings.data_dir / CHECKPOINT_FILE
    path.write_bytes(content)
    assert str(path) in str(kept.portal.audit_log.make_checkpoint())
    assert path.read_bytes() == content
    assert kept.doctor().state is State.PROBLEM


@ON_SQLITE
@pytest.mark.parametrize("note", ["signed with another key", "the portal's own, of another head"])
def test_a_checkpoint_that_an_attacker_puts_into_the_data_folder_covers_no_rewriting(kept: Kept, note: str) -> None:
    rewrite(kept.portal, altered)
    with kept.portal.database.snapshot() as tx:
        head = audit.audit_head(tx, "default")
    forged = kept.portal.audit_log.newest()
    if note == "signed with another key":
        forger = SigningKey.create(kept.portal.audit_log.verifier.name)
        forged = forger.note_of(head.number, Edge(head.number, head.edge).root())
    path = kept.portal.settings.data_dir / CHECKPOINT_FILE
    path.write_bytes(audit_log.KeptCheckpoint(forged, kept.portal.clock(), head).to_json())
    assert kept.doctor().state is State.PROBLEM
    assert kept.portal.audit_log.problem() is not None
    assert kept.portal.audit_log.make_checkpoint(at_once=True) is not None


@ON_SQLITE
def test_the_key_is_private_is_in_the_record_and_not_in_the_database(portal: Portal) -> None:
    path = portal.settings.secrets_dir / KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    verifier = str(portal.audit_log.verifier)
    with portal.database.snapshot() as tx:
        [made] = audit.list_audit_entries(tx, "default", limit=5, filters={"action": "audit:key"})
    assert made.detail == {"verifier_key": verifier}
    seed = path.read_text().strip().split("+", 4)[-1]
    files = [file for file in portal.settings.data_dir.rglob("*") if file.is_file() and file != path]
    assert not [file for file in files if seed.encode() in file.read_bytes()]


@ON_SQLITE
def test_another_start_keeps_the_key(portal: Portal, clock: Clock) -> None:
    again = open_portal(portal.settings, clock)
    assert str(again.audit_log.verifier) == str(portal.audit_log.verifier)
    assert entries(again) == entries(portal)
    again.close()


def test_the_export_has_every_entry_once_in_order_also_in_small_parts(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = b"".join(kept.portal.audit_log.export())
    monkeypatch.setattr(audit, "READ_AT_ONCE", 4)
    parts = list(kept.portal.audit_log.export())
    assert (len(parts), b"".join(parts)) == (5, whole)
    assert datetime.now(UTC).strftime("%Y-").encode() in whole.splitlines()[0]
