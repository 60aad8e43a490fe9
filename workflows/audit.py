"""The audit record for third parties: an export of its entries, and signed checkpoints that it must keep to.

Each tenant has a record of its own. A checkpoint signs the number of entries and the root of the Merkle tree over them,
with a key that the database does not hold. The newest one is kept in the data folder; none is signed that does not
continue it. See docs/security.md.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy.engine import Connection

from config import Settings
from core.errors import NotFound, PortalError, StartupError
from core.files import FileLock, private_folder, replace_file, secret_file
from core.merkle import Edge
from pki.checkpoints import SigningKey, VerifierKey
from store import audit
from store.audit import AuditVerdict, Head
from store.database import Database
from store.tables import DEFAULT_TENANT
from store.tenants import tenant_ids
from workflows.shared_files import SharedFiles

log = logging.getLogger("portal.audit")

# Of the first tenant. Those of each other one are in folders: its key by its name, its checkpoint by its log's.
KEY_FILE, CHECKPOINT_FILE = "audit-key", "audit-checkpoint.json"
KEY_FOLDER, CHECKPOINT_FOLDER = "audit-keys", "audit-checkpoints"
CHECKPOINT_ENTRIES = 256
CHECKPOINT_AGE = timedelta(days=1)
_NONE_YET = "There is no checkpoint yet; the portal makes the first within a minute of its start."


@dataclass(frozen=True, slots=True)
class KeptCheckpoint:
    """A checkpoint as it is kept: the signed note, and the head of the record that it is of."""

    note: str
    made_at: datetime
    head: Head

    def to_json(self) -> bytes:
        """Return the content of the file."""
        values = {"number": self.head.number, "hash": self.head.hash, "edge": self.head.edge.hex()}
        return json.dumps({"checkpoint": self.note, "made_at": self.made_at.isoformat(), **values}, indent=1).encode()

    @classmethod
    def parse(cls, content: bytes) -> KeptCheckpoint:
        """Read the content of the file; raise ``ValueError``."""
        try:
            values = json.loads(content)
            head = Head(int(values["number"]), str(values["hash"]), bytes.fromhex(values["edge"]))
            return cls(str(values["checkpoint"]), datetime.fromisoformat(values["made_at"]).astimezone(UTC), head)
        except (TypeError, KeyError) as error:
            raise ValueError("a field is missing") from error

    def check(self, key: VerifierKey) -> None:
        """Raise ``ValueError`` unless the note is signed with the key, and of this head."""
        signed = key.open(self.note)
        if (signed.size, signed.root) != (self.head.number, Edge(self.head.number, self.head.edge).root()):
            raise ValueError("the checkpoint is not that of the record's head beside it")


@dataclass(frozen=True, slots=True)
class LogFiles:
    """The files of a tenant's record outside the database: the key that signs it, and its newest checkpoint."""

    tenant_id: str
    _settings: Settings

    @property
    def key_path(self) -> Path:
        """The file of the key."""
        folder = self._settings.secrets_dir
        return folder / KEY_FILE if self.tenant_id == DEFAULT_TENANT else folder / KEY_FOLDER / self.tenant_id

    def checkpoint_path(self) -> Path:
        """Return the file of the newest checkpoint; raise ``StartupError`` if that takes a key that is not there."""
        folder = self._settings.data_dir
        if self.tenant_id == DEFAULT_TENANT:
            return folder / CHECKPOINT_FILE
        return folder / CHECKPOINT_FOLDER / f"{log_of(self.key().verifier)}.json"

    def key(self) -> SigningKey:
        """Return the key that signs checkpoints; raise ``StartupError`` if its file is missing or damaged."""
        path = self.key_path
        if not path.exists():
            raise StartupError(f"{path} is missing; start the portal, which begins a new series of checkpoints.")
        try:
            return SigningKey.parse(secret_file(path, str))
        except ValueError as error:
            raise StartupError(
                f"{path} is damaged; move it and the newest checkpoint away, and start the portal, which makes a new"
                " key."
            ) from error

    def kept(self) -> KeptCheckpoint | None:
        """Return the newest checkpoint, ``None`` before the first one.

        Raise ``ValueError`` if its file is damaged, ``StartupError`` if that of the key is.
        """
        if self.tenant_id != DEFAULT_TENANT and not self.key_path.exists():
            return None
        return read_checkpoint(self.checkpoint_path())


def read_checkpoint(path: Path) -> KeptCheckpoint | None:
    """Return the checkpoint in a file, ``None`` if there is no such file; raise ``ValueError`` if it is damaged."""
    try:
        return KeptCheckpoint.parse(path.read_bytes())
    except FileNotFoundError:
        return None


def log_of(key: VerifierKey) -> str:
    """Return the name of a key's log: 16 hexadecimal digits, which say nothing of the tenant."""
    return key.name.rpartition("/")[2]


def problem_of(tx: Connection, tenant_id: str, settings: Settings, *, whole: bool) -> tuple[str | None, AuditVerdict]:
    """Return what is wrong with a tenant's record by its newest checkpoint and by itself, ``None`` if nothing is.

    Unless the ``whole`` record is to be read, entries that the checkpoint signs are represented by the hash of its
    last one, in which those of all others are chained: an entry that was changed alone is not noticed.
    """
    files, place = LogFiles(tenant_id, settings), LogFiles(tenant_id, settings).key_path
    try:
        kept = files.kept()
        if kept is not None:
            place = files.checkpoint_path()
            kept.check(files.key().verifier)
    except ValueError as error:
        return f"{files.checkpoint_path()} cannot be used: {error}.", audit.verify(tx, tenant_id)
    if kept is None:
        verdict = audit.verify(tx, tenant_id)
        return verdict.problem, verdict
    signed, edge = kept.head, Edge(kept.head.number, kept.head.edge)
    count, last = audit.audit_head(tx, tenant_id).number, audit.hash_at(tx, tenant_id, signed.number)
    verdict = audit.verify(tx, tenant_id, after=audit.EMPTY_RECORD if whole else signed, sizes={signed.number})
    if count < signed.number:
        return f"The record ends with entry {count}, but {place} has a checkpoint of {signed.number} entries.", verdict
    root = verdict.roots.get(signed.number)
    if (signed.number and last != signed.hash) or (root is not None and root != edge.root()):
        return (
            f"The entries up to {signed.number} are not those that the checkpoint in {place} signs: one of them was"
            " changed, and the chain computed again."
        ), verdict
    return verdict.problem, verdict


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether a record continues its newest checkpoint, of ``signed`` entries; both are ``None`` before the first.

    ``problem`` says how it does not, in a sentence for whoever runs the installation.
    """

    signed: int | None
    made_at: datetime | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Exports the record of a tenant, and makes its checkpoints."""

    tenant_id: str
    _database: Database
    _settings: Settings
    _clock: Callable[[], datetime]

    @property
    def files(self) -> LogFiles:
        """Its files outside the database."""
        return LogFiles(self.tenant_id, self._settings)

    @property
    def verifier(self) -> VerifierKey:
        """The public key of the checkpoints; raises ``NotFound`` before there is one."""
        if not self.files.key_path.exists():
            raise NotFound(_NONE_YET)
        return self.files.key().verifier

    def problem(self) -> str | None:
        """Return in a sentence how the record contradicts its newest checkpoint; reads the entries since."""
        if not self.files.key_path.exists() or not os.path.lexists(self.files.checkpoint_path()):
            return None  # the job reads all before it signs the first one
        with self._database.snapshot() as tx:
            return problem_of(tx, self.tenant_id, self._settings, whole=False)[0]

    def verification(self) -> Verification:
        """Return whether the record continues its newest checkpoint; reads the entries since."""
        try:
            kept = self.files.kept()
        except ValueError:
            kept = None  # which the problem says
        signed, made_at = (None, None) if kept is None else (kept.head.number, kept.made_at)
        return Verification(signed, made_at, self.problem())

    def newest(self) -> str:
        """Return the newest checkpoint, a signed note; raise ``NotFound`` before the first one."""
        return _note_of(self.files.kept)

    def make_checkpoint(self, *, at_once: bool = False) -> str | None:
        """Sign a checkpoint if one is due, or ``at_once``; return what prevents that, ``None`` if nothing does.

        It is due after ``CHECKPOINT_ENTRIES`` entries, and ``CHECKPOINT_AGE`` after the last one if there is any entry.
        """
        lock = FileLock(self._settings.data_dir / ".audit-checkpoint.lock")
        with lock.hold(), self._database.snapshot() as tx:
            head, now = audit.audit_head(tx, self.tenant_id), self._clock()
            if not at_once and not self.is_due(head.number):
                return None
            problem, _ = problem_of(tx, self.tenant_id, self._settings, whole=False)
            if problem is None:
                note = self.files.key().note_of(head.number, Edge(head.number, head.edge).root())
                replace_file(self.files.checkpoint_path(), KeptCheckpoint(note, now, head).to_json())
            return problem

    def sign_if_due(self, number: int) -> str | None:
        """Sign a checkpoint if one of so many entries is due; return what prevents that."""
        if not self.is_due(number):
            return None
        if self.tenant_id != DEFAULT_TENANT:  # whose key the start makes
            self.make_key()
        return self.make_checkpoint()

    def is_due(self, number: int) -> bool:
        """Tell whether a checkpoint of so many entries is due."""
        try:
            kept = self.files.kept()
        except ValueError:
            return True  # which fails, and is told
        if kept is None or number < kept.head.number:
            return True
        age = abs(self._clock() - kept.made_at)  # a clock that was set back must not stop checkpoints
        return number >= kept.head.number + CHECKPOINT_ENTRIES or (number > kept.head.number and age >= CHECKPOINT_AGE)

    def make_key(self) -> None:
        """Make the key if it is missing, as at the first start and after a restore; raise ``StartupError``.

        A key never signs two records, of which one lacks what the other has: each has a name of its own, the origin.
        """
        path, shared = self.files.key_path, SharedFiles(self._settings, self._database)
        if os.path.lexists(path):
            self.files.key()
            return
        if self.tenant_id != DEFAULT_TENANT:
            for folder in (path.parent, self._settings.data_dir / CHECKPOINT_FOLDER):
                private_folder(folder, mode=0o700)
        with self._database.locks.of(".audit-key.lock").hold():
            shared.fetch(path)  # which another node may have made
            if not os.path.lexists(path):
                self._make_key(path)
                shared.publish(path)

    def _make_key(self, path: Path) -> None:
        host = urlsplit(self._settings.public_url).netloc.rpartition("@")[2]
        key = SigningKey.create(f"{host}/audit/{secrets.token_hex(8)}")
        with self._database.transaction() as tx:
            actor = audit.system_actor(self.tenant_id)
            audit.record(tx, actor, "audit:key", "audit", at=self._clock(), verifier_key=str(key.verifier))
        secret_file(path, lambda: str(key))

    def forget(self) -> None:
        """Delete the key and the checkpoint of a record that there is no more; a young one has had none."""
        if self.files.key_path.exists():
            self.files.checkpoint_path().unlink(missing_ok=True)
            self.files.key_path.unlink()
            SharedFiles(self._settings, self._database).destroy(self.files.key_path)

    def export(self) -> Iterator[bytes]:
        """Yield the whole record, oldest entry first, as lines of JSON.

        Each part is read in a transaction of its own: a client that reads slowly keeps none open, and what has been
        read does not change.
        """
        with self._database.snapshot() as tx:
            last = audit.audit_head(tx, self.tenant_id).number
        number = 0
        while number < last:
            with self._database.snapshot() as tx:
                limit = min(audit.READ_AT_ONCE, last - number)
                entries = list(audit.read_entries(tx, self.tenant_id, after=number, limit=limit))
            if not entries:
                return
            yield b"".join(map(line_of, entries))
            number = entries[-1]["number"]


@dataclass(frozen=True, slots=True)
class _NotDue:
    """No checkpoint is due of a record with ``number`` entries, of which ``signed`` were at a time, by these files."""

    number: int
    signed: int
    made_at: datetime
    files: Mapping[Path, tuple[int, ...]]

    def holds(self, number: int, now: datetime) -> bool:
        """Tell whether none is due still, as ``AuditLog.is_due`` does, which reads the files."""
        return (
            number == self.number
            and self.signed <= number < self.signed + CHECKPOINT_ENTRIES
            and (number == self.signed or abs(now - self.made_at) < CHECKPOINT_AGE)
            and all(_signature(path) == seen for path, seen in self.files.items())
        )


def _signature(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True, slots=True)
class AuditLogs:
    """The records of all tenants."""

    _database: Database
    _settings: Settings
    _clock: Callable[[], datetime]
    _not_due: dict[str, _NotDue] = field(default_factory=dict)  # of tenants of which nothing need be read again

    def of(self, tenant_id: str) -> AuditLog:
        """Return the record of a tenant."""
        return AuditLog(tenant_id, self._database, self._settings, self._clock)

    def newest_of(self, name: str) -> str:
        """Return the newest checkpoint of the log of this name, whosever it is; raise ``NotFound``."""
        first = self.of(DEFAULT_TENANT)
        if name == log_of(first.verifier):
            return first.newest()
        return _note_of(lambda: read_checkpoint(self._settings.data_dir / CHECKPOINT_FOLDER / f"{name}.json"))

    def problems(self) -> Mapping[str, str]:
        """Return for each tenant whose record contradicts its newest checkpoint how it does, in a sentence."""
        with self._database.snapshot() as tx:
            return self._each(tenant_ids(tx), lambda log: log.problem())

    def sign_due(self) -> Mapping[str, str]:
        """Sign the checkpoints that are due; return for each tenant what prevents that, if anything does."""
        with self._database.snapshot() as tx:
            numbers = audit.audit_numbers(tx)
        for gone in self._not_due.keys() - numbers.keys():
            del self._not_due[gone]
        now = self._clock()
        looked_at = [
            tenant_id
            for tenant_id, number in numbers.items()
            if (known := self._not_due.get(tenant_id)) is None or not known.holds(number, now)
        ]
        return self._each(looked_at, lambda log: self._sign_if_due(log, numbers[log.tenant_id]))

    def _sign_if_due(self, log: AuditLog, number: int) -> str | None:
        self._not_due.pop(log.tenant_id, None)
        if problem := log.sign_if_due(number):
            return problem
        # Before the checkpoint is read, so that no change goes unnoticed.
        files = {path: _signature(path) for path in (log.files.key_path, log.files.checkpoint_path())}
        try:
            kept = log.files.kept()
        except ValueError:
            return None  # it was damaged just now, which the next run tells
        if kept is not None:
            self._not_due[log.tenant_id] = _NotDue(number, kept.head.number, kept.made_at, files)
        return None

    def _each(self, tenants: Iterable[str], question: Callable[[AuditLog], str | None]) -> Mapping[str, str]:
        found = {}
        for tenant_id in tenants:
            try:
                problem = question(self.of(tenant_id))
            except PortalError as error:
                problem = error.detail  # of one tenant, which must not keep those of others from being signed
            if problem is not None:
                found[tenant_id] = problem
        return found


def _note_of(read: Callable[[], KeptCheckpoint | None]) -> str:
    try:
        kept = read()
    except ValueError:
        kept = None
    if kept is None:
        raise NotFound(_NONE_YET)
    return kept.note


def line_of(entry: Mapping[str, Any]) -> bytes:
    """Return a line of the export: the fields that are hashed and the hash, keys sorted, ASCII, no spaces."""
    values = {name: value for name, value in entry.items() if name != "id"}
    values["at"] = entry["at"].astimezone(UTC).isoformat(timespec="microseconds")
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def open_audit_logs(database: Database, settings: Settings, clock: Callable[[], datetime]) -> AuditLogs:
    """Open the records; a first start makes the first tenant's key, the job the others'. Raise ``StartupError``."""
    logs = AuditLogs(database, settings, clock)
    logs.of(DEFAULT_TENANT).make_key()
    return logs
