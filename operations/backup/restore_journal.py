"""Undoes an interrupted restore."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from config import Settings
from core.errors import StartupError
from core.failpoints import failpoint
from core.files import fsync_directory, replace_file
from store import audit, schema
from store.database import Database
from store.tables import DEFAULT_TENANT

NAME = ".restore.json"
SQLITE_FILES = ("", "-wal", "-shm")

log = logging.getLogger("portal.restore")


@dataclass(slots=True)
class RestoreJournal:
    """The changes that a restore is about to make, written to the disk before the first of them.

    A restore is committed in one step: with SQLite ``staged`` is renamed to the database, with PostgreSQL (``staged``
    is ``None``) the transaction that records ``id`` in the audit record is committed. Before that step everything is
    undone, after it everything is kept.
    """

    folder: Path
    staged: Path | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    linked: Path | None = None  # a second name for the database being replaced
    moved: Sequence[tuple[Path, Path]] = ()  # files, and the names under which they are kept
    made: Sequence[Path] = ()  # files that did not exist before
    placing: bool = False  # whether anything but ``staged`` may have been changed

    def place(self, puts: Mapping[Path, bytes], moves: Sequence[tuple[Path, Path]], linked: Path | None) -> None:
        """Move files aside, then write files, each atomically."""
        self.placing, self.linked, self.moved = True, linked, moves
        away = {path for path, _kept in moves}
        self.made = [path for path in puts if path not in away]
        self.write()
        for path, kept in moves:
            path.rename(kept)
            fsync_directory(path.parent)
            failpoint("restore.moved")
        for path, content in puts.items():
            replace_file(path, content)
            failpoint("restore.put")
        failpoint("restore.placed")

    def write(self) -> None:
        """Write the journal to the disk."""
        replace_file(self.folder / NAME, json.dumps(asdict(self), default=str).encode())
        failpoint("restore.journaled")

    def close(self) -> None:
        """Delete the journal: the restore is complete or undone."""
        (self.folder / NAME).unlink()
        fsync_directory(self.folder)

    def undo(self) -> None:
        """Undo what was done; may be interrupted and repeated."""
        folders = {self.folder}
        for path, kept in self.moved:
            if kept.exists():
                kept.rename(path)
                folders.add(path.parent)
        for path in self.made:
            path.unlink(missing_ok=True)
            folders.add(path.parent)
        if self.linked is not None:
            self.linked.unlink(missing_ok=True)
        for folder in folders:
            if folder.is_dir():
                fsync_directory(folder)
        if self.staged is not None:
            remove_database(self.staged)  # last: while it exists, nothing is committed


@contextlib.contextmanager
def journaled(settings: Settings, staged: Path | None) -> Iterator[RestoreJournal]:
    """Keep a journal for the body of a ``with``: its changes are kept if it succeeds, else undone."""
    journal = RestoreJournal(settings.data_dir, staged)
    journal.write()
    try:
        yield journal
    except BaseException:
        settle(settings, failed=True)
        raise
    failpoint("restore.ended")
    journal.close()


def is_unsettled(settings: Settings) -> bool:
    """Return whether a restore was interrupted in this data folder, or is running."""
    return (settings.data_dir / NAME).exists()


def settle(settings: Settings, *, failed: bool = False) -> bool:
    """Undo an interrupted restore, or keep it if it was committed; return whether it was.

    One that ``failed`` in this process was not interrupted: its error says all, so nothing is logged of its undoing.
    The caller holds the data folder exclusively. Raise ``StartupError`` if the journal cannot be read or the disk not
    written, ``DatabaseUnavailable`` if PostgreSQL does not answer.
    """
    path = settings.data_dir / NAME
    try:
        journal = _read(path)
        committed = _is_committed(settings, journal)
        if not committed:
            journal.undo()
        journal.close()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StartupError(
            f"A restore was interrupted here and cannot be undone ({error.strerror}); check the disk of"
            f" {settings.data_dir}, then start again."
        ) from error
    if committed:
        log.warning("a restore was interrupted after its last step: the backup is restored")
    elif not failed:
        log.warning("an interrupted restore was undone: everything is as before it")
    return committed


def _read(path: Path) -> RestoreJournal:
    try:
        values = json.loads(path.read_bytes())
        return RestoreJournal(
            folder=path.parent,
            staged=Path(values["staged"]) if values["staged"] else None,
            id=values["id"],
            linked=Path(values["linked"]) if values["linked"] else None,
            moved=[(Path(old), Path(kept)) for old, kept in values["moved"]],
            made=[Path(name) for name in values["made"]],
            placing=values["placing"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StartupError(
            f"{path} is damaged, so an interrupted restore cannot be undone; run the restore again on an empty data"
            " folder."
        ) from error


def _is_committed(settings: Settings, journal: RestoreJournal) -> bool:
    if journal.staged is not None:
        return journal.placing and not journal.staged.exists()
    database = Database(settings.database_url, folder=settings.data_dir, threads=1)
    with contextlib.closing(database), database.snapshot() as tx:
        if schema.revision(tx) != schema.newest_revision():
            return False
        last = audit.list_audit_entries(tx, DEFAULT_TENANT, limit=1, filters={"action": "backup:restore"})
        return [entry.detail.get("restore") for entry in last] == [journal.id]


def remove_database(path: Path) -> None:
    """Remove a SQLite file and its -wal and -shm files, the file itself last."""
    for suffix in reversed(SQLITE_FILES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
