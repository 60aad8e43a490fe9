"""Puts a backup back, all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography import x509
from sqlalchemy.engine import Connection

import db
from broker.crl import read_crls
from broker.files import CRL_FILE, BrokerFiles
from config import Settings
from core.errors import BackupRefused, CaKeyUnavailable, PortalError, ProjectionInvalid
from core.failpoints import failpoint
from core.states import PENDING_DELIVERY, CertificateStatus, DeliveryStatus
from operations import data_folder
from operations.backup import backup as backups
from operations.backup.file import Backup
from operations.backup.journal import SQLITE_FILES, Journal, journaled, remove_database
from operations.backup.placing import (
    files_to_place,
    free_name,
    key_of,
    replace_database,
)
from operations.backup.revocations import Kept, Revocations, Tables, crl_record, match_crls, newest_crl
from pki.algorithms import PrivateKey
from pki.keystore import KeyFiles
from store import copy as store_copy
from store import issuers as store_issuers
from store.database import Database
from store.tables import DEFAULT_TENANT, BrokerState, Certificate, Delivery, Device, IssuerRow
from workflows import audit
from workflows.authority.issuers import FIRST_ISSUING


@dataclass(slots=True)
class Restored:
    """What a restore has done: what it kept revoked, what else is to be known, where the old database is."""

    made_at: str
    counts: dict[str, int]
    generation: int = 0
    links_expired: int = 0
    kept: list[Kept] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    before: Path | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be put back, and how."""

    settings: Settings
    backup: Backup
    key: PrivateKey
    same: bool  # whether that is the key of the data folder, too
    puts: dict[Path, bytes]
    moves: list[tuple[Path, Path]]
    crls: Sequence[x509.CertificateRevocationList]
    replace: bool
    keep_links: bool
    now: datetime
    done: Restored


class _OpenTables:
    """A database as it stands, within a snapshot."""

    def __init__(self, tx: Connection) -> None:
        self._tx = tx

    def rows(self, table: str) -> Iterator[dict[str, Any]]:
        """The rows of a table."""
        return store_copy.rows(self._tx, table)


def restore(settings: Settings, path: Path, *, replace: bool, keep_links: bool, now: datetime) -> Restored:
    """Put a backup back into the data folder and the database of ``settings``; nothing is touched where it fails.

    Whatever the broker's CRL or the database being replaced knows as revoked stays revoked. ``replace`` allows to
    replace a database that has devices; ``keep_links`` leaves download links of the copy open. Raises
    ``BackupRefused``, ``DatabaseTooNew``, ``PortalRunning``, ``CaKeyUnavailable``, ``DatabaseUnavailable``.
    """
    with Backup(path) as copy:
        store_copy.check_revision(copy.manifest.revision)
        with data_folder.exclusive(settings):
            key, same = key_of(copy, settings)
            copy.check()
            crls, notes = _broker_crls(settings)
            done = Restored(copy.manifest.made_at, dict(copy.manifest.counts), notes=notes)
            puts, moves = files_to_place(copy, settings, same=same)
            plan = _Plan(settings, copy, key, same, puts, moves, crls, replace, keep_links, now, done)
            if same and "root.key.pem" in copy.small_files("ca") and not (settings.ca_dir / "root.key.pem").exists():
                notes.append("The root key stays away: it is in the copy, but was moved out of this data folder.")
            try:
                if settings.database_url.startswith("sqlite"):
                    _restore_sqlite(plan)
                else:
                    _restore_postgresql(plan)
            except OSError as error:
                raise BackupRefused(f"The data folder cannot be written: {error.strerror}.") from error
            return done


def _broker_crls(settings: Settings) -> tuple[Sequence[x509.CertificateRevocationList], list[str]]:
    path = settings.broker_file(CRL_FILE)
    try:
        return read_crls(path.read_bytes()), []
    except FileNotFoundError:
        return [], [f"There is no {path}, so it could not be asked for revocations that the copy does not have."]
    except (OSError, ProjectionInvalid) as error:
        raise BackupRefused(
            f"{path} cannot be read, so what was revoked since the copy is not known; put it right, or move it away"
            " to go on without it."
        ) from error


# --- SQLite: a new file takes the place of the old one ---------------------------------------------------------------


def _restore_sqlite(plan: _Plan) -> None:
    current = Path(sa.make_url(plan.settings.database_url).database or "")
    staged = current.with_name(f"{current.name}.restoring")
    remove_database(staged)
    with journaled(plan.settings, staged) as journal:
        with _replaced_sqlite(plan, current) as replaced:
            database = Database(f"sqlite:///{staged}", lock_path=plan.settings.data_dir / ".write.lock", threads=1)
            with contextlib.closing(database), database.transaction() as tx:
                store_copy.upgrade(tx, plan.backup.manifest.revision)
                _fill(tx, plan, replaced, journal)
        kept = free_name(current.with_name(f"{current.name}.before-restore")) if current.exists() else None
        moves = list(plan.moves)
        for suffix in SQLITE_FILES[1:]:  # there only where the old file could not be read and closed
            path = current.with_name(current.name + suffix)
            if kept is not None and path.exists():
                moves.append((path, kept.with_name(kept.name + suffix)))
        journal.place(plan.puts, moves, kept)
        replace_database(staged, current, kept)
    plan.done.before = kept


@contextlib.contextmanager
def _replaced_sqlite(plan: _Plan, current: Path) -> Iterator[Tables | None]:
    if not current.exists() or current.stat().st_size == 0:
        yield None
        return
    with contextlib.ExitStack() as stack:
        replaced: Tables | None = None
        try:
            database = stack.enter_context(contextlib.closing(backups.open_database(plan.settings)))
            with database.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            tx = stack.enter_context(database.snapshot())
            if tx.exec_driver_sql("PRAGMA quick_check(1)").scalar_one() == "ok":
                replaced = _readable(plan, tx)
        except (PortalError, sa.exc.SQLAlchemyError) as error:
            if isinstance(error, BackupRefused):
                raise
            replaced = None
        if replaced is None:
            _allow(plan, f"The database {current} cannot be read")
            plan.done.notes.append(f"The database {current} could not be read: only the broker's CRL was asked.")
        yield replaced


# --- PostgreSQL: its tables are filled anew in one transaction -------------------------------------------------------


def _restore_postgresql(plan: _Plan) -> None:
    with journaled(plan.settings, None) as journal, contextlib.ExitStack() as stack:
        database = stack.enter_context(contextlib.closing(backups.open_database(plan.settings)))
        replaced: Tables | None = None
        with database.snapshot() as tx:
            current = store_copy.revision(tx)
            if current is not None:
                readable = _readable(plan, tx)
                if readable is None:
                    _allow(plan, f"The database has another schema ({current})")
                    plan.done.notes.append("The database that was there could not be read: its schema is another.")
                elif _devices(tx):
                    before = free_name(plan.settings.data_dir / "before-restore.backup")
                    plan.done.before = before
        if plan.done.before is not None:
            backups.write(plan.settings, database, plan.done.before, _sealing_key(plan), now=plan.now)
            replaced = stack.enter_context(Backup(plan.done.before))
        with database.transaction() as tx:
            store_copy.clear(tx, plan.backup.manifest.revision)
            _fill(tx, plan, replaced, journal)
            journal.place(plan.puts, plan.moves, None)


def _sealing_key(plan: _Plan) -> PrivateKey:
    """The key of the portal that is replaced, under which its own backup can be put back."""
    if plan.same:
        return plan.key
    try:
        return KeyFiles(plan.settings.ca_dir, backups.passphrase_here(plan.settings)).load(FIRST_ISSUING)
    except CaKeyUnavailable:
        plan.done.notes.append(
            "The passphrase here does not open the CA key that was there, so the backup of what was there is sealed"
            " with the key of the copy; to put it back, put its own CA keys and passphrase back by hand."
        )
        return plan.key


def _readable(plan: _Plan, tx: Connection) -> Tables | None:
    """The database being replaced, ``None`` where its schema is not this version's; raises ``BackupRefused``."""
    if store_copy.revision(tx) != store_copy.head():
        return None
    if count := _devices(tx):
        _allow(plan, f"The database has {count} devices")
    return _OpenTables(tx)


def _devices(tx: Connection) -> int:
    count: int = tx.execute(sa.select(sa.func.count()).select_from(Device)).scalar_one()
    return count


def _allow(plan: _Plan, what: str) -> None:
    if not plan.replace:
        raise BackupRefused(f"{what}; to replace it by the copy of {plan.done.made_at}, say --replace.")


# --- What both do -----------------------------------------------------------------------------------------------------


def _fill(tx: Connection, plan: _Plan, replaced: Tables | None, journal: Journal) -> None:
    copy, done = plan.backup, plan.done
    order = {name: number for number, name in enumerate(store_copy.table_names())}
    for name in sorted(copy.manifest.counts, key=lambda name: order.get(name, len(order))):
        if store_copy.load(tx, name, copy.lines(name)) != copy.manifest.counts[name]:
            raise BackupRefused(f"The table {name} of the backup is not whole; use another backup.")
    store_copy.upgrade(tx, "head")
    store_copy.renumber(tx)
    verdict = audit.verify(tx, DEFAULT_TENANT)
    if verdict.problem is not None:
        done.notes.append(f"The audit record in the copy does not hold: {verdict.problem}")
    issuers = store_issuers.list_issuers(tx, retired=True)
    crls = match_crls(plan.crls, issuers)
    if len(crls) < len(plan.crls):
        done.notes.append("The broker's folder holds a CRL of a CA that the copy does not know; it was not asked.")
    done.generation = _advance(tx, plan, replaced)
    revocations = Revocations(tx, generation=done.generation, now=plan.now)
    revocations.keep(crls, replaced)
    done.kept = revocations.kept
    _continue_crls(tx, crls, issuers, replaced, done.generation)
    done.links_expired = _expire_links(tx, plan, replaced)
    if replaced is None:
        done.notes.append(
            f"Not known here, and so as the copy has it: operator tokens revoked since {done.made_at}, and devices"
            " registered since, whose certificates work until they end."
        )
    _record(tx, plan, replaced, journal)
    failpoint("restore.filled")


def _advance(tx: Connection, plan: _Plan, replaced: Tables | None) -> int:
    """Make the generation higher than any that the broker was given, and return it."""
    recorded = BrokerFiles(plan.settings, lambda: plan.now).installed_generation() or 0
    before = max((row["generation"] for row in replaced.rows("broker_state")), default=0) if replaced else 0
    generation = max(recorded + 1, before + 1, db.next_generation(tx, DEFAULT_TENANT, at=plan.now))
    tx.execute(sa.update(BrokerState).where(BrokerState.tenant_id == DEFAULT_TENANT).values(generation=generation))
    return generation


def _continue_crls(
    tx: Connection,
    crls: dict[int, x509.CertificateRevocationList],
    issuers: Sequence[store_issuers.IssuerRecord],
    replaced: Tables | None,
    generation: int,
) -> None:
    """Let the next CRL of each issuer have a number and a time above those of any that is known."""
    before: dict[str, store_issuers.CrlRecord] = {}
    if replaced is not None:
        fingerprints = {row["id"]: row["fingerprint"] for row in replaced.rows("issuers")}
        for row in replaced.rows("crls"):
            values = (row[name] for name in ("issuer_id", "number", "this_update", "next_update", "generation", "der"))
            before[fingerprints[row["issuer_id"]]] = store_issuers.CrlRecord(*values)
    for issuer in issuers:
        tenant_id = tx.execute(sa.select(IssuerRow.tenant_id).where(IssuerRow.id == issuer.id)).scalar_one()
        given = crl_record(issuer.id, crls[issuer.id]) if issuer.id in crls else None
        newest = newest_crl(given, before.get(issuer.fingerprint))
        if newest is not None:
            ours = dataclasses.replace(newest, issuer_id=issuer.id, generation=generation - 1)
            store_issuers.put_crl(tx, tenant_id, ours)


def _expire_links(tx: Connection, plan: _Plan, replaced: Tables | None) -> int:
    """Destroy the bundles that wait in the copy: they may have been delivered since. Returns how many."""
    good: set[str] = set()
    if plan.keep_links:
        query = (
            sa.select(Delivery.id)
            .join(Certificate, Certificate.id == Delivery.certificate_id)
            .where(Delivery.status.in_(PENDING_DELIVERY), Certificate.status == CertificateStatus.ACTIVE)
        )
        good = set(tx.execute(query).scalars())
        if replaced is not None:
            good &= {row["id"] for row in replaced.rows("deliveries") if row["status"] == DeliveryStatus.READY}
    waiting = tx.execute(sa.select(Delivery.id).where(Delivery.status.in_(PENDING_DELIVERY))).scalars().all()
    over = [{"of_delivery": delivery_id} for delivery_id in waiting if delivery_id not in good]
    if over:
        tx.execute(
            sa.update(Delivery)
            .where(Delivery.id == sa.bindparam("of_delivery"))
            .values(status=DeliveryStatus.EXPIRED, bundle=None, lease_until=None),
            over,
        )
    return len(over)


def _record(tx: Connection, plan: _Plan, replaced: Tables | None, journal: Journal) -> None:
    done = plan.done
    heads = [row for row in replaced.rows("audit_heads") if row["tenant_id"] == DEFAULT_TENANT] if replaced else []
    audit.record(
        tx,
        audit.system_actor(DEFAULT_TENANT),
        "backup:restore",
        "database",
        at=plan.now,
        restore=journal.id,
        made_at=done.made_at,
        generation=done.generation,
        kept_revoked=len(done.kept),
        links_expired=done.links_expired,
        replaced_record={"number": heads[0]["number"], "hash": heads[0]["hash"]} if heads else None,
    )
