"""Takes back a restore that was cut off before its end."""

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
from store import audit
from store import copy as store_copy
from store.database import Database
from store.tables import DEFAULT_TENANT

NAME = ".restore.json"
SQLITE_FILES = ("", "-wal", "-shm")

log = logging.getLogger("portal.restore")


@dataclass(slots=True)
class Journal:
    """What a restore is about to change, on the disk before anything is changed.

    A restore ends in one step: with SQLite ``staged`` takes the database's name, with PostgreSQL (``staged`` is
    ``None``) the transaction is committed that records ``id`` in the audit record. Before that step all is taken
    back, from it on all stands.
    """

    folder: Path
    staged: Path | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    linked: Path | None = None  # a second name for the database being replaced
    moved: Sequence[tuple[Path, Path]] = ()  # files with the names under which they are kept
    made: Sequence[Path] = ()  # files that were not there before
    placing: bool = False  # whether anything but ``staged`` may have been changed yet

    def place(self, puts: Mapping[Path, bytes], moves: Sequence[tuple[Path, Path]], linked: Path | None) -> None:
        """Move files to the names beside them, then write files, the one or the other whole."""
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
        """Make the journal durable as it stands."""
        replace_file(self.folder / NAME, json.dumps(asdict(self), default=str).encode())
        failpoint("restore.journaled")

    def close(self) -> None:
        """Forget it: all stands, or all is taken back."""
        (self.folder / NAME).unlink()
        fsync_directory(self.folder)

    def take_back(self) -> None:
        """Undo whatever was done of it; may be cut off and done again."""
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
            remove_database(self.staged)  # last: while it is there, nothing stands


@contextlib.contextmanager
def journaled(settings: Settings, staged: Path | None) -> Iterator[Journal]:
    """A journal for the body of the ``with``, which makes its changes stand by ending well."""
    journal = Journal(settings.data_dir, staged)
    journal.write()
    try:
        yield journal
    except BaseException:
        settle(settings)
        raise
    failpoint("restore.ended")
    journal.close()


def is_unsettled(settings: Settings) -> bool:
    """Whether a restore was cut off in this data folder, or is going on."""
    return (settings.data_dir / NAME).exists()


def settle(settings: Settings) -> bool:
    """Take back a restore that was cut off, or let it stand where it had come to its end; returns whether it stands.

    The caller has the data folder alone. Raises ``StartupError`` where the journal cannot be read or the disk
    written, ``DatabaseUnavailable`` where PostgreSQL cannot be asked which of the two it is.
    """
    path = settings.data_dir / NAME
    try:
        journal = _read(path)
        stands = _has_ended(settings, journal)
        if not stands:
            journal.take_back()
        journal.close()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StartupError(
            f"A restore was cut off here and cannot be taken back ({error.strerror}); see to the disk of"
            f" {settings.data_dir}, then start again."
        ) from error
    if stands:
        log.warning("a restore was cut off after its last step: the copy is in place")
    else:
        log.warning("a restore was cut off and has been taken back: all is as before it")
    return stands


def _read(path: Path) -> Journal:
    try:
        values = json.loads(path.read_bytes())
        return Journal(
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
            f"{path} is damaged, so a restore that was cut off cannot be taken back; run the restore again on an empty"
            " data folder."
        ) from error


def _has_ended(settings: Settings, journal: Journal) -> bool:
    if journal.staged is not None:
        return journal.placing and not journal.staged.exists()
    database = Database(settings.database_url, lock_path=settings.data_dir / ".write.lock", threads=1)
    with contextlib.closing(database), database.snapshot() as tx:
        if store_copy.revision(tx) != store_copy.head():
            return False
        last = audit.list_audit_entries(tx, DEFAULT_TENANT, limit=1, filters={"action": "backup:restore"})
        return [entry.detail.get("restore") for entry in last] == [journal.id]


def remove_database(path: Path) -> None:
    """Remove a SQLite file with what belongs to it, the file itself last."""
    for suffix in reversed(SQLITE_FILES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
