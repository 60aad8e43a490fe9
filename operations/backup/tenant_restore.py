"""Restores one tenant from a backup, completely or not at all, and leaves all others as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography import x509
from sqlalchemy.engine import Connection

import db
from broker.folder import CRL_FILE
from broker.guard.folder import GuardFiles
from config import Settings
from core.broker_control import RECORD_FILE
from core.errors import BackupRefused, GuardNeeded, StateConflict
from core.failpoints import failpoint
from core.tenants import TenantStatus
from operations import data_folder
from operations.backup import backup as backups
from operations.backup import ca_keys
from operations.backup.archive import Backup
from operations.backup.common import (
    NOT_KNOWN,
    Restored,
    check_audit_record,
    expire_links,
    free_name,
    refused_by_the_guard,
)
from operations.backup.crls import SavedCrls, continue_crls, unknown_revocations
from operations.backup.older_terms import older_terms
from operations.backup.restore_journal import RestoreJournal, journaled
from operations.backup.revocations import GuardRefusals, RevocationReplay, Tables
from pki.algorithms import PrivateKey
from store import agents, audit, brokers, nodes, schema, tenant_copy, tenants
from store import copy as store_copy
from store import issuers as store_issuers
from store.database import Database
from store.quotas import recount_clients
from store.tables import DEFAULT_TENANT, BrokerState, Tenant
from workflows.audit import LogFiles
from workflows.authority.keys import open_keys
from workflows.authority.names import FIRST_ISSUING
from workflows.tenant_life import GUARD_NEEDED, check_topics_free, record_of_both

_RESUME = "It is suspended, as it was not here and what was revoked since is not known: resume it when you have looked."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Which tenant is to be restored, and how."""

    settings: Settings
    tenant_id: str
    backup: Backup
    crls: SavedCrls
    refused: GuardRefusals
    keep_links: bool
    now: datetime
    done: Restored

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of the backup that are the tenant's: it may be one of the whole installation."""
        return (row for row in self.backup.rows(name) if store_copy.owner_of(name, row) == self.tenant_id)


def restore_tenant(
    settings: Settings,
    path: Path,
    tenant_id: str,
    *,
    replace: bool,
    keep_links: bool,
    now: datetime,
    crl_files: Sequence[Path] = (),
) -> Restored:
    """Restore one tenant from its backup, or from one of the whole installation; nothing changes if it fails.

    What was revoked since stays revoked as ``operations.backup.restore.restore`` says. ``replace`` allows replacing a
    tenant that is there; one that is not comes back suspended. Raise ``BackupRefused``, ``GuardNeeded``,
    ``StateConflict``, ``DatabaseTooNew``, ``PortalRunning``, ``CaKeyUnavailable``, ``DatabaseUnavailable``.
    """
    if not settings.broker_control.by_journal:
        raise GuardNeeded(GUARD_NEEDED)
    with Backup(path) as backup, data_folder.exclusive(settings), contextlib.ExitStack() as stack:
        key = stack.enter_context(contextlib.closing(open_keys(settings, make=False))).load(FIRST_ISSUING)
        _check(backup, tenant_id, key)
        done = Restored(backup.manifest.made_at, {})
        plan = _Plan(
            settings=settings,
            tenant_id=tenant_id,
            backup=backup,
            crls=SavedCrls.read(settings.broker_file(CRL_FILE), crl_files),
            refused=refused_by_the_guard(settings, done),
            keep_links=keep_links,
            now=now,
            done=done,
        )
        database = stack.enter_context(contextlib.closing(backups.open_database(settings, as_owner=True)))
        nodes.check_alone(database)
        try:
            _restore(plan, database, key, replace=replace)
        except sa.exc.IntegrityError as error:
            raise BackupRefused("The rows of the backup do not fit beside those of other tenants here.") from error
        except OSError as error:
            raise BackupRefused(f"The data folder cannot be written: {error.strerror}.") from error
        return done


def _check(backup: Backup, tenant_id: str, key: PrivateKey) -> None:
    """Raise ``BackupRefused`` unless the tenant is in a backup that this installation has made with this schema."""
    if not backup.is_sealed_with(key):
        raise BackupRefused(
            f"{backup.path} was changed after it was written, or is of another installation: the key of the first CA"
            " here has not sealed it."
        )
    backup.check()
    store_copy.check_revision(backup.manifest.revision)
    if backup.manifest.revision != schema.newest_revision():
        raise BackupRefused(
            "The backup is of an older version of the portal: one tenant of it cannot be restored alone; restore the"
            " whole of it."
        )
    if tenant_id == DEFAULT_TENANT or tenant_id not in {row["id"] for row in backup.rows("tenants")}:
        raise BackupRefused(f"{backup.path} has no tenant {tenant_id} that could be restored alone.")


def _restore(plan: _Plan, database: Database, key: PrivateKey, *, replace: bool) -> None:
    puts, moves = _files_to_place(plan)
    in_folder = {path.name: path.read_bytes() for path in ca_keys.key_files(plan.settings.ca_dir)}
    afterwards = in_folder | {path.name: content for path, content in puts.items()}
    own = {name: content for name, content in afterwards.items() if _is_own(plan, name)}
    plan.done.notes += ca_keys.check_keys(plan.backup, plan.settings, own).of_removed(())
    with journaled(plan.settings, None) as journal, contextlib.ExitStack() as stack:
        with database.snapshot() as tx:
            there = _there(plan, tx, replace=replace)
        replaced: Tables | None = None
        if there:
            before = free_name(plan.settings.data_dir / f"before-restore-{plan.tenant_id}.backup")
            backups.write(plan.settings, database, before, key, now=plan.now, tenant_id=plan.tenant_id)
            plan.done.before, replaced = before, stack.enter_context(Backup(before)).rows
        with database.transaction() as tx:
            _fill(tx, plan, replaced, journal)
            journal.place(puts, moves, None)
            # What changed is of older generations, too: the guard's journal is written anew.
            plan.settings.broker_file(RECORD_FILE).unlink(missing_ok=True)


def _is_own(plan: _Plan, file: str) -> bool:
    return backups.is_key_of(plan.tenant_id, file.partition(".")[0])


def _files_to_place(plan: _Plan) -> tuple[dict[Path, bytes], list[tuple[Path, Path]]]:
    """Return the keys to write that are missing here, and to move aside what signs the record that is replaced."""
    settings, puts = plan.settings, {}
    for name, content in plan.backup.small_files("ca").items():
        path, record = settings.ca_dir / name, settings.ca_dir / name.replace(".key.pem", ".token.json")
        if _is_own(plan, name) and not path.exists() and not record.exists():
            puts[path] = content
    log = LogFiles(plan.tenant_id, settings)
    signing = [log.checkpoint_path(), log.key_path] if log.key_path.exists() else []
    moves = [path for path in signing if path.exists()]
    return puts, [(path, free_name(path.with_name(f"{path.name}.before-restore"))) for path in moves]


def _there(plan: _Plan, tx: Connection, *, replace: bool) -> bool:
    """Return whether the tenant is here; raise ``BackupRefused`` if it must not be replaced."""
    if schema.revision(tx) != schema.newest_revision():
        raise BackupRefused("The database has the schema of another version; start this version of the portal once.")
    name, (row,) = plan.tenant_id, list(plan.rows("tenants"))
    here = [record for record in tenants.list_tenants(tx) if record.id == name]
    if not here:
        return False
    if here[0].created_at != row["created_at"]:
        raise BackupRefused(
            f"Another tenant has the name {name} here, added {here[0].created_at:%Y-%m-%d %H:%M} UTC; nothing was"
            " changed."
        )
    if here[0].status is TenantStatus.REMOVED:
        raise BackupRefused(f"The tenant {name} was removed here, which is final while its rows are kept.")
    if not replace:
        raise BackupRefused(
            f"The tenant {name} is here; use --replace to replace it by the backup of {plan.done.made_at}."
        )
    return True


def _check_conflicts(tx: Connection, plan: _Plan) -> None:
    """Raise ``BackupRefused`` if what is one in the whole installation is another tenant's by now."""
    (row,) = plan.rows("tenants")
    try:
        check_topics_free(tx, plan.tenant_id, str(row["topic_prefix"]), plan.settings)
    except StateConflict as error:
        raise BackupRefused(
            f"{error.detail.partition(';')[0]}, as are those of the backup; nothing was changed."
        ) from error
    if (problem := tenant_copy.taken(tx, plan.tenant_id, plan.rows)) is not None:
        raise BackupRefused(f"{problem}; nothing was changed.")
    roots = {one.der for one in store_issuers.list_issuers(tx, retired=True, tenant_id=DEFAULT_TENANT)}
    roots |= {row["der"] for row in plan.rows("issuers")}
    subjects = {x509.load_der_x509_certificate(der).subject for der in roots}
    for row in plan.rows("issuers"):
        if row["above"] is None and x509.load_der_x509_certificate(row["der"]).issuer not in subjects:
            raise BackupRefused(f"The CA {row['name']} is below a root that is not here; nothing was changed.")


def _fill(tx: Connection, plan: _Plan, replaced: Tables | None, journal: RestoreJournal) -> None:
    name, backup, done = plan.tenant_id, plan.backup, plan.done
    generation = done.generation = _advance(tx, plan)  # first: one at a time comes past it
    _check_conflicts(tx, plan)
    numbers = tenant_copy.Renumbering(tx)
    if replaced is not None:
        tenant_copy.delete(tx, name)
    done.counts = dict(tenant_copy.load(tx, name, numbers, backup.lines))
    if backup.manifest.tenant is not None and done.counts != dict(backup.manifest.counts):
        raise BackupRefused("A table of the backup is incomplete; use another backup.")
    done.notes += check_audit_record(tx, name, backup)
    tx.execute(sa.update(Tenant).where(Tenant.id == name).values(generation=generation))
    store_issuers.changed(tx)
    issuers = store_issuers.list_issuers(tx, retired=True, tenant_id=name)
    crls, ignored = plan.crls.without_others(issuers).of(issuers)
    done.notes += ignored
    replay = RevocationReplay(tx, generation=generation, now=plan.now, tenant_id=name)
    replay.keep(crls, replaced, plan.refused)
    replay.revoke_blocked(name)
    recount_clients(tx)
    done.kept = replay.kept
    done.older = [] if replaced is None else list(older_terms(tx, replaced, now=plan.now))
    continue_crls(tx, crls, issuers, replaced, generation)
    done.links_expired = expire_links(tx, replaced, keep=plan.keep_links, tenant_id=name)
    if replaced is None:
        made_at = datetime.fromisoformat(done.made_at)
        done.unknown = [*unknown_revocations(issuers, crls, made_at, plan.now), *NOT_KNOWN]
        _suspend(tx, plan)
    _record(tx, plan, replaced, journal)
    failpoint("restore.tenant_filled")


def _suspend(tx: Connection, plan: _Plan) -> None:
    record = tenants.get_tenant(tx, plan.tenant_id)
    if record.status is TenantStatus.ACTIVE:
        tx.execute(
            sa.update(Tenant).where(Tenant.id == record.id).values(status=TenantStatus.SUSPENDED, changed_at=plan.now)
        )
        record_of_both(tx, audit.system_actor(DEFAULT_TENANT), "tenant:suspend", record.id, plan.now)
        plan.done.notes.append(_RESUME)


def _advance(tx: Connection, plan: _Plan) -> int:
    """Advance the generation beyond any that the broker or a row of the backup has had, and return it."""
    recorded = GuardFiles(plan.settings, lambda: plan.now).installed_generation() or 0
    generation = max(recorded + 1, plan.backup.manifest.generation + 1, db.next_generation(tx, at=plan.now))
    tx.execute(sa.update(BrokerState).values(generation=generation))
    agents.begin_again(tx)
    brokers.forget_proofs_of_agents(tx, at=plan.now)
    return generation


def _record(tx: Connection, plan: _Plan, replaced: Tables | None, journal: RestoreJournal) -> None:
    done = plan.done
    heads = list(replaced("audit_heads")) if replaced else []
    record_of_both(
        tx,
        audit.system_actor(DEFAULT_TENANT),
        "backup:restore",
        plan.tenant_id,
        plan.now,
        restore=journal.id,
        made_at=done.made_at,
        generation=done.generation,
        kept_revoked=len(done.kept),
        links_expired=done.links_expired,
        replaced_record={"number": heads[0]["number"], "hash": heads[0]["hash"]} if heads else None,
    )
