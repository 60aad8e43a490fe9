"""Restores a backup, completely or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

import db
from broker.folder import CRL_FILE
from broker.guard.folder import GuardFiles
from config import Settings
from core.broker_control import RECORD_FILE
from core.errors import BackupRefused, CaKeyUnavailable, PortalError, TokenUnavailable
from core.failpoints import failpoint
from core.files import fsync_directory
from core.states import BrokerKind
from operations import data_folder
from operations.backup import backup as backups
from operations.backup import ca_keys
from operations.backup.archive import Backup
from operations.backup.ca_keys import CheckedKeys
from operations.backup.common import (
    NOT_KNOWN,
    Restored,
    check_audit_record,
    expire_links,
    free_name,
    is_of_one_of,
    refused_by_the_guard,
)
from operations.backup.crls import SavedCrls, continue_crls, unknown_revocations
from operations.backup.older_terms import older_terms
from operations.backup.restore_journal import SQLITE_FILES, RestoreJournal, journaled, remove_database
from operations.backup.revocations import GuardRefusals, RevocationReplay, Tables
from pki.algorithms import PrivateKey
from pki.keys.contract import check_that_it_signs
from store import agents, audit, brokers, grants, nodes, schema
from store import copy as store_copy
from store import issuers as store_issuers
from store.database import Database
from store.quotas import recount_clients
from store.tables import DEFAULT_TENANT, BrokerState, Device
from store.tenants import removed_tenants, tenant_ids
from workflows.audit import CHECKPOINT_FILE, CHECKPOINT_FOLDER, KEY_FILE, KEY_FOLDER
from workflows.authority.keys import open_keys
from workflows.authority.names import FIRST_ISSUING

ROOT_KEY = "root.key.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be restored, and how."""

    settings: Settings
    backup: Backup
    key: PrivateKey
    keys: CheckedKeys
    same: bool  # whether it is also the key of the data folder
    puts: dict[Path, bytes]
    moves: list[tuple[Path, Path]]
    crls: SavedCrls
    refused: GuardRefusals
    replace: bool
    keep_links: bool
    now: datetime
    done: Restored


def restore(
    settings: Settings, path: Path, *, replace: bool, keep_links: bool, now: datetime, crl_files: Sequence[Path] = ()
) -> Restored:
    """Restore a backup to the data folder and the database of ``settings``; nothing changes if it fails.

    Everything revoked according to the broker's CRL, those of ``crl_files`` or the database being replaced stays
    revoked. ``replace`` allows replacing a database that has devices; ``keep_links`` keeps download links of the
    backup. Raise ``BackupRefused``, ``DatabaseTooNew``, ``PortalRunning``, ``CaKeyUnavailable``,
    ``DatabaseUnavailable``.
    """
    with Backup(path) as backup:
        if backup.manifest.tenant is not None:
            raise BackupRefused(f"{path} has one tenant alone; restore it with --tenant {backup.manifest.tenant}.")
        store_copy.check_revision(backup.manifest.revision)
        with data_folder.exclusive(settings), contextlib.ExitStack() as stack:
            key, same = ca_keys.sealing_key(backup, settings, stack)
            backup.check()
            crls = SavedCrls.read(settings.broker_file(CRL_FILE), crl_files)
            done = Restored(backup.manifest.made_at, dict(backup.manifest.counts))
            puts, moves = _files_to_place(backup, settings, same=same)
            keys = ca_keys.check_keys(backup, settings, _keys_afterwards(settings, puts, moves))
            done.notes += keys.notes
            plan = _Plan(
                settings=settings,
                backup=backup,
                key=key,
                keys=keys,
                same=same,
                puts=puts,
                moves=moves,
                crls=crls,
                refused=refused_by_the_guard(settings, done),
                replace=replace,
                keep_links=keep_links,
                now=now,
                done=done,
            )
            _note_root_key_left_out(plan)
            _restore_database(plan)
            # The generations are of another history now: the guard's journal cannot be continued by what has changed.
            settings.broker_file(RECORD_FILE).unlink(missing_ok=True)
            return done


def _note_root_key_left_out(plan: _Plan) -> None:
    if plan.same and ROOT_KEY in plan.backup.small_files("ca") and not (plan.settings.ca_dir / ROOT_KEY).exists():
        plan.done.notes.append(
            "The root key was not restored: it is in the backup, but was moved out of this data folder."
        )


def _restore_database(plan: _Plan) -> None:
    try:
        if plan.settings.database_url.startswith("sqlite"):
            _restore_sqlite(plan)
        else:
            _restore_postgresql(plan)
    except OSError as error:
        raise BackupRefused(f"The data folder cannot be written: {error.strerror}.") from error


# --- The key and the files --------------------------------------------------------------------------------------------


def _files_to_place(
    backup: Backup, settings: Settings, *, same: bool
) -> tuple[dict[Path, bytes], list[tuple[Path, Path]]]:
    """Return the files to write, and those to move aside, with the names under which they are kept.

    A data folder of the same CA (``same``) keeps its files, which are as new as those of the backup or newer, and a
    root key that was moved out of it is not restored. In any other folder all files are the backup's.
    """
    puts: dict[Path, bytes] = {}
    for name, content in backup.small_files("secrets").items():
        path = settings.secrets_dir / name
        if not name.startswith(backups.LEFT_OUT) and not (same and path.exists()):
            puts[path] = content
    # The keys come last: once they exist, the folder counts as that of the backup's CA.
    for name, content in backup.small_files("ca").items():
        path, record = settings.ca_dir / name, settings.ca_dir / name.replace(".key.pem", ".token.json")
        if not (same and (path.exists() or record.exists() or name == ROOT_KEY)):  # a key may be in a token by now
            puts[path] = content
    moves = [] if same else [path for path in ca_keys.key_files(settings.ca_dir) if path not in puts]
    moves += [path for path in puts if path.exists()]
    # The record that is replaced may be longer: what is signed of it is kept, and the restored one gets a new key.
    signing = [settings.secrets_dir / name for name in (KEY_FILE, KEY_FOLDER)]
    signing += [settings.data_dir / name for name in (CHECKPOINT_FILE, CHECKPOINT_FOLDER)]
    moves += [path for path in signing if path.exists()]
    return puts, [(path, free_name(path.with_name(f"{path.name}.before-restore"))) for path in moves]


def _keys_afterwards(
    settings: Settings, puts: Mapping[Path, bytes], moves: Sequence[tuple[Path, Path]]
) -> dict[str, bytes]:
    """Return what the CA folder will have of keys and of records of keys."""
    moved = {path for path, _kept in moves}
    stay = {path.name: path.read_bytes() for path in ca_keys.key_files(settings.ca_dir) if path not in moved}
    return stay | {path.name: content for path, content in puts.items() if path.parent == settings.ca_dir}


# --- SQLite: a new file replaces the old one ---------------------------------------------------------------


def _restore_sqlite(plan: _Plan) -> None:
    current = Path(sa.make_url(plan.settings.database_url).database or "")
    staged = current.with_name(f"{current.name}.restoring")
    remove_database(staged)
    with journaled(plan.settings, staged) as journal:
        with _replaced_sqlite(plan, current) as replaced:
            database = Database(f"sqlite:///{staged}", folder=plan.settings.data_dir, threads=1)
            with contextlib.closing(database), database.transaction() as tx:
                schema.upgrade(tx, plan.backup.manifest.revision)
                _fill(tx, plan, replaced, journal)
        kept = free_name(current.with_name(f"{current.name}.before-restore")) if current.exists() else None
        moves = list(plan.moves)
        for suffix in SQLITE_FILES[1:]:  # they exist only if the old file could not be read and closed
            path = current.with_name(current.name + suffix)
            if kept is not None and path.exists():
                moves.append((path, kept.with_name(kept.name + suffix)))
        journal.place(plan.puts, moves, kept)
        _replace_database(staged, current, kept)
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
            plan.done.notes.append(
                f"The database {current} could not be read: only CRLs say what was revoked after the backup."
            )
        yield replaced


def _replace_database(staged: Path, current: Path, kept: Path | None) -> None:
    """Replace a closed SQLite file by another one in one step; ``kept`` becomes a second name of the old file."""
    _sync(staged)
    if kept is not None:
        os.link(current, kept)
    fsync_directory(current.parent)
    failpoint("restore.linked")
    staged.rename(current)
    fsync_directory(current.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- PostgreSQL: its tables are replaced in one transaction -------------------------------------------------------


def _restore_postgresql(plan: _Plan) -> None:
    with journaled(plan.settings, None) as journal, contextlib.ExitStack() as stack:
        database = stack.enter_context(contextlib.closing(backups.open_database(plan.settings, as_owner=True)))
        nodes.check_alone(database)
        replaced: Tables | None = None
        with database.snapshot() as tx:
            if not grants.may_change_schema(tx):
                raise BackupRefused(
                    "The database's role may not replace its tables; set PORTAL_DATABASE_OWNER_URL to a URL of the role"
                    " that owns them."
                )
            current = schema.revision(tx)
            if current is not None:
                readable = _readable(plan, tx)
                if readable is None:
                    _allow(plan, f"The database has another schema ({current})")
                    plan.done.notes.append("The replaced database could not be read: it has another schema.")
                elif store_issuers.list_issuers(tx, retired=True):  # without devices, too: tokens were revoked
                    before = free_name(plan.settings.data_dir / "before-restore.backup")
                    plan.done.before = before
        if plan.done.before is not None:
            backups.write(plan.settings, database, plan.done.before, _sealing_key(plan, stack), now=plan.now)
            replaced = stack.enter_context(Backup(plan.done.before)).rows
        role = _running_role(plan.settings)  # another connection, which would wait for the tables that are cleared
        with database.transaction() as tx:
            store_copy.clear(tx, plan.backup.manifest.revision)
            _fill(tx, plan, replaced, journal)
            grants.grant(tx, role)
            journal.place(plan.puts, plan.moves, None)


def _running_role(settings: Settings) -> str:
    with contextlib.closing(backups.open_database(settings)) as database, database.snapshot() as tx:
        return grants.role_of(tx).name


def _sealing_key(plan: _Plan, stack: contextlib.ExitStack) -> PrivateKey:
    """Return the key of the portal being replaced, which seals the backup of its database."""
    if plan.same:
        return plan.key
    try:
        key = stack.enter_context(contextlib.closing(open_keys(plan.settings, make=False))).load(FIRST_ISSUING)
        check_that_it_signs(key)
        return key
    except (CaKeyUnavailable, TokenUnavailable):
        plan.done.notes.append(
            "The configured passphrase does not decrypt the previous CA key, or its token does not sign, so the backup"
            " of the replaced database is sealed with the key of the restored one; to restore it, first put its own CA"
            " keys and passphrase back."
        )
        return plan.key


def _readable(plan: _Plan, tx: Connection) -> Tables | None:
    """Return the database being replaced, ``None`` if it has another schema; raise ``BackupRefused``."""
    if schema.revision(tx) != schema.newest_revision():
        return None
    if count := _devices(tx):
        _allow(plan, f"The database has {count} devices and applications")
    return functools.partial(store_copy.rows, tx)


def _devices(tx: Connection) -> int:
    count: int = tx.execute(sa.select(sa.func.count()).select_from(Device)).scalar_one()
    return count


def _allow(plan: _Plan, what: str) -> None:
    if not plan.replace:
        raise BackupRefused(f"{what}; use --replace to replace it by the backup of {plan.done.made_at}.")


# --- Both kinds of database -------------------------------------------------------------------------------------------


def _fill(tx: Connection, plan: _Plan, replaced: Tables | None, journal: RestoreJournal) -> None:
    backup, done = plan.backup, plan.done
    order = {name: number for number, name in enumerate(store_copy.table_names())}
    for name in sorted(backup.manifest.counts, key=lambda name: order.get(name, len(order))):
        if store_copy.load(tx, name, backup.lines(name)) != backup.manifest.counts[name]:
            raise BackupRefused(f"The table {name} of the backup is incomplete; use another backup.")
    schema.upgrade(tx, "head")
    store_copy.renumber(tx)
    for tenant_id in tenant_ids(tx):
        done.notes += check_audit_record(tx, tenant_id, backup)
    issuers = store_issuers.list_issuers(tx, retired=True)
    crls, ignored = plan.crls.of(issuers)
    done.notes += ignored
    done.generation = _advance(tx, plan, replaced)
    revocations = RevocationReplay(tx, generation=done.generation, now=plan.now)
    revocations.keep(crls, replaced, plan.refused)
    done.notes += plan.keys.of_removed({record.id for record in removed_tenants(tx)})
    recount_clients(tx)
    done.kept = revocations.kept
    done.older = [] if replaced is None else list(older_terms(tx, replaced, now=plan.now))
    continue_crls(tx, crls, issuers, replaced, done.generation)
    done.links_expired = expire_links(tx, replaced, keep=plan.keep_links)
    if not is_of_one_of(replaced, issuers):
        made_at = datetime.fromisoformat(done.made_at)
        done.unknown = [*unknown_revocations(issuers, crls, made_at, plan.now), *NOT_KNOWN]
    _record(tx, plan, replaced, journal)
    failpoint("restore.filled")


def _advance(tx: Connection, plan: _Plan, replaced: Tables | None) -> int:
    """Advance the generation beyond any that a broker has had, and return it.

    What brokers elsewhere have had is not known. It is fewer than milliseconds have passed since 1970: one that is told
    of fewer than it had refuses them, as it would those of a database that was put back by mistake.
    """
    recorded = GuardFiles(plan.settings, lambda: plan.now).installed_generation() or 0
    before = max((row["generation"] for row in replaced("broker_state")), default=0) if replaced else 0
    known = brokers.list_brokers(tx)
    has_others = len(known) > 1 or any(broker.kind is BrokerKind.AGENT for broker in known)
    elsewhere = int(plan.now.timestamp() * 1000) if has_others else 0
    generation = max(recorded + 1, before + 1, elsewhere, db.next_generation(tx, at=plan.now))
    tx.execute(sa.update(BrokerState).values(generation=generation))
    agents.begin_again(tx)
    brokers.forget_proofs_of_agents(tx, at=plan.now)
    return generation


def _record(tx: Connection, plan: _Plan, replaced: Tables | None, journal: RestoreJournal) -> None:
    done = plan.done
    heads = [row for row in replaced("audit_heads") if row["tenant_id"] == DEFAULT_TENANT] if replaced else []
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
