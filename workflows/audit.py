"""The audit record for third parties: an export of its entries, and signed checkpoints that it must keep to.

A checkpoint signs the number of entries and the root of the Merkle tree over them, with a key that the database does
not hold. The newest one is kept in the data folder; none is signed that does not continue it. See docs/security.md.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy.engine import Connection

from config import Settings
from core.errors import NotFound, StartupError
from core.files import FileLock, replace_file, secret_file
from core.merkle import Edge
from pki.checkpoints import SigningKey, VerifierKey
from store import audit
from store.audit import AuditVerdict, Head
from store.database import Database

log = logging.getLogger("portal.audit")

KEY_FILE, CHECKPOINT_FILE = "audit-key", "audit-checkpoint.json"
CHECKPOINT_ENTRIES = 256
CHECKPOINT_AGE = timedelta(days=1)


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


def read_kept(settings: Settings) -> KeptCheckpoint | None:
    """Return the newest checkpoint, ``None`` before the first one; raise ``ValueError`` if its file is damaged."""
    try:
        return KeptCheckpoint.parse((settings.data_dir / CHECKPOINT_FILE).read_bytes())
    except FileNotFoundError:
        return None


def read_key(settings: Settings) -> SigningKey:
    """Return the key that signs checkpoints; raise ``StartupError`` if its file is missing or damaged."""
    path = settings.secrets_dir / KEY_FILE
    if not path.exists():
        raise StartupError(f"{path} is missing; start the portal, which begins a new series of checkpoints.")
    try:
        return SigningKey.parse(secret_file(path, str))
    except ValueError as error:
        raise StartupError(
            f"{path} is damaged; move it and {CHECKPOINT_FILE} away, and start the portal, which makes a new key."
        ) from error


def problem_of(tx: Connection, tenant_id: str, settings: Settings, *, whole: bool) -> tuple[str | None, AuditVerdict]:
    """Return what is wrong with the record by its newest checkpoint and by itself, ``None`` if nothing is.

    Unless the ``whole`` record is to be read, entries that the checkpoint signs are represented by the hash of its
    last one, in which those of all others are chained: an entry that was changed alone is not noticed.
    """
    place = settings.data_dir / CHECKPOINT_FILE
    try:
        kept = read_kept(settings)
        if kept is not None:
            kept.check(read_key(settings).verifier)
    except ValueError as error:
        return f"{place} cannot be used: {error}.", audit.verify(tx, tenant_id)
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
class AuditLog:
    """Exports the record, and makes its checkpoints."""

    _database: Database
    _settings: Settings
    _key: SigningKey
    _clock: Callable[[], datetime]
    _first_tenant: str

    @property
    def verifier(self) -> VerifierKey:
        """The public key of the checkpoints."""
        return self._key.verifier

    def problem(self) -> str | None:
        """Return in a sentence how the record contradicts its newest checkpoint; reads the entries since."""
        if not os.path.lexists(self._settings.data_dir / CHECKPOINT_FILE):
            return None  # the job reads all before it signs the first one
        with self._database.snapshot() as tx:
            return problem_of(tx, self._first_tenant, self._settings, whole=False)[0]

    def newest(self) -> str:
        """Return the newest checkpoint, a signed note; raise ``NotFound`` before the first one."""
        try:
            kept = read_kept(self._settings)
        except ValueError:
            kept = None
        if kept is None:
            raise NotFound("There is no checkpoint yet; the portal makes the first within a minute of its start.")
        return kept.note

    def make_checkpoint(self, *, at_once: bool = False) -> str | None:
        """Sign a checkpoint if one is due, or ``at_once``; return what prevents that, ``None`` if nothing does.

        It is due after ``CHECKPOINT_ENTRIES`` entries, and ``CHECKPOINT_AGE`` after the last one if there is any entry.
        """
        folder, now = self._settings.data_dir, self._clock()
        with FileLock(folder / ".audit-checkpoint.lock").hold(), self._database.snapshot() as tx:
            head = audit.audit_head(tx, self._first_tenant)
            if not at_once and not self._is_due(head.number, now):
                return None
            problem, _ = problem_of(tx, self._first_tenant, self._settings, whole=False)
            if problem is None:
                note = self._key.note_of(head.number, Edge(head.number, head.edge).root())
                replace_file(folder / CHECKPOINT_FILE, KeptCheckpoint(note, now, head).to_json())
            return problem

    def _is_due(self, number: int, now: datetime) -> bool:
        try:
            kept = read_kept(self._settings)
        except ValueError:
            return True  # which fails, and is told
        if kept is None or number < kept.head.number:
            return True
        age = abs(now - kept.made_at)  # a clock that was set back must not stop checkpoints
        return number >= kept.head.number + CHECKPOINT_ENTRIES or (number > kept.head.number and age >= CHECKPOINT_AGE)

    def export(self, tenant_id: str) -> Iterator[bytes]:
        """Yield the whole record of a tenant, oldest entry first, as lines of JSON.

        Each part is read in a transaction of its own: a client that reads slowly keeps none open, and what has been
        read does not change.
        """
        with self._database.snapshot() as tx:
            last = audit.audit_head(tx, tenant_id).number
        number = 0
        while number < last:
            with self._database.snapshot() as tx:
                limit = min(audit.READ_AT_ONCE, last - number)
                entries = list(audit.read_entries(tx, tenant_id, after=number, limit=limit))
            if not entries:
                return
            yield b"".join(map(line_of, entries))
            number = entries[-1]["number"]


def line_of(entry: Mapping[str, Any]) -> bytes:
    """Return a line of the export: the fields that are hashed and the hash, keys sorted, ASCII, no spaces."""
    values = {name: value for name, value in entry.items() if name != "id"}
    values["at"] = entry["at"].astimezone(UTC).isoformat(timespec="microseconds")
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def open_audit_log(database: Database, settings: Settings, clock: Callable[[], datetime], tenant_id: str) -> AuditLog:
    """Open the log; a first start makes its key, and so does the first one after a restore.

    A key never signs two records, of which one lacks what the other has: each has a name of its own, the log's origin.
    Raise ``StartupError``.
    """
    path = settings.secrets_dir / KEY_FILE
    if not os.path.lexists(path):
        host = urlsplit(settings.public_url).netloc.rpartition("@")[2]
        key = SigningKey.create(f"{host}/audit/{secrets.token_hex(8)}")
        with database.transaction() as tx:
            actor = audit.system_actor(tenant_id)
            audit.record(tx, actor, "audit:key", "audit", at=clock(), verifier_key=str(key.verifier))
        secret_file(path, lambda: str(key))
    return AuditLog(database, settings, read_key(settings), clock, tenant_id)
