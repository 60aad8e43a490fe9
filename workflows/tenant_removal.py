"""The end of a tenant: everything of it is revoked, exported, and after a time of grace deleted."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import db
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import (
    BrokerUnavailable,
    CaKeyUnavailable,
    FieldProblem,
    InputInvalid,
    NotFound,
    StateConflict,
    TokenUnavailable,
)
from core.failpoints import failpoint
from core.tenants import TenantStatus
from pki.issuers import Reason
from pki.keys.stores import KeyStores
from store import agents, audit, issuers, tenant_rows, tenants
from store.audit import Actor
from store.database import Database
from store.scope import ALL_TENANTS
from store.tables import DEFAULT_TENANT
from store.tenants import TenantRecord
from workflows.audit import AuditLogs
from workflows.authority.names import key_names
from workflows.authority.rollover import retire_all
from workflows.reconciliation import Reconciler
from workflows.tenant_life import Tenants, TenantState, check_not_first, record_of_both

log = logging.getLogger("portal.tenants")

REASON = Reason.CESSATION_OF_OPERATION
AT_ONCE = 200  # devices in one transaction, for which all others that write wait
ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class RemovedTenant:
    """A tenant that was removed: how many devices are still to be revoked, and when its rows are deleted."""

    state: TenantState
    devices_left: int
    deleted_after: datetime


@dataclass(eq=False, repr=False)
class TenantRemovals:
    """Removes tenants for good; what takes long is done by a job, a part at a time."""

    _settings: Settings
    _database: Database
    _tenants: Tenants
    _reconciler: Reconciler
    _keys: KeyStores
    _audit_logs: AuditLogs
    _broker: BrokerProvisioning
    _clock: Callable[[], datetime]

    def remove(self, actor: Actor, name: str, typed: str, *, waits: bool = True) -> RemovedTenant:
        """Serve nobody of a tenant any more, and revoke all that it has; ``typed`` is its name again.

        The broker refuses the tenant as a whole at once. Its devices are revoked as many as there is time for, the
        others by the job; with ``waits=False`` all by the job. A repeat goes on with it. Raises ``NotFound``,
        ``StateConflict`` for the first tenant, ``InputInvalid`` for another name.
        """
        if typed != name:
            problem = FieldProblem("confirm", "must be the name of the tenant")
            raise InputInvalid("To remove a tenant for good, repeat its name in confirm.", [problem])
        deadline = time.monotonic() + (self._settings.enforce_timeout if waits else 0)
        record = self._close(actor, name)
        state = self._tenants.applied(record, record.generation, waits=waits)
        while time.monotonic() < deadline and self._revoke_some(record):
            pass
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            left = tenant_rows.count_not_revoked(tx, name)
        return RemovedTenant(state, left, self._deleted_after(record))

    def _close(self, actor: Actor, name: str) -> TenantRecord:
        now = self._clock()
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            generation = db.next_generation(tx, at=now)
            record = tenants.get_tenant(tx, name, for_update=True)
            check_not_first(record, TenantStatus.REMOVED)
            if record.status is not TenantStatus.REMOVED:
                record = dataclasses.replace(record, status=TenantStatus.REMOVED, generation=generation, changed_at=now)
                tenants.update_tenant(tx, record)
                tenant_rows.end_access(tx, name, at=now)
                record_of_both(tx, actor, "tenant:remove", name, now)
            failpoint("tenant_remove.before_commit")
        failpoint("tenant_remove.after_commit")
        return self._tenants.whole(record)

    def _deleted_after(self, record: TenantRecord) -> datetime:
        return (record.changed_at or record.created_at) + timedelta(days=self._settings.tenant_grace_days)

    # --- What the job does

    def run(self) -> None:
        """Go on with what is left of removed tenants: revoke, retire their CAs, and after the time of grace delete."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            removed = tenants.removed_tenants(tx)
        for record in removed:
            while self._revoke_some(record):
                pass
            self._retire_issuers(record)
            if self._clock() >= self._deleted_after(record):
                self._delete(record)

    def _revoke_some(self, record: TenantRecord) -> bool:
        """Revoke some of the devices that are left; return whether there were any."""
        now, actor = self._clock(), audit.system_actor(record.id)
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            if not tenant_rows.count_not_revoked(tx, record.id):
                return False
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            generation = db.next_generation(tx, at=now)
            revoked = tenant_rows.revoke_some(
                tx, record.id, reason=REASON, at=now, generation=generation, limit=AT_ONCE
            )
            detail = {"reason": REASON}
            acts = [(actor, f"{kind}:revoke", f"{kind}:{one}", detail) for one, kind in revoked]
            audit.record_all(tx, acts, at=now)
        failpoint("tenant_remove.some_revoked")
        self._reconciler.wake()
        return bool(revoked)

    def _retire_issuers(self, record: TenantRecord) -> None:
        """Have nobody trust the CAs of a tenant any more, of which no certificate is valid."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            if not tenant_rows.has_trusted_issuer(tx, record.id):
                return
        retire_all(self._database, audit.system_actor(record.id), now=self._clock())
        failpoint("tenant_remove.issuers_retired")
        self._reconciler.wake()

    def _delete(self, record: TenantRecord) -> None:
        deleted = 0
        while True:
            with self._database.transaction(sees=ALL_TENANTS) as tx:
                count = tenant_rows.delete_some(tx, record.id, limit=ROWS_AT_ONCE)
            if not count:
                break
            deleted += count
            failpoint("tenant_remove.some_deleted")
        try:
            self._destroy_keys(record.id)
        except (CaKeyUnavailable, TokenUnavailable, OSError) as error:
            log.error("a key of a removed tenant cannot be destroyed", extra={"tenant": record.id, "problem": error})
            return  # the job tries again
        if not self._is_forgotten_by_broker():
            return
        try:
            self._broker.forget_tenant(record.id, time.monotonic() + self._settings.enforce_timeout)
        except BrokerUnavailable as error:
            log.error("the broker keeps a removed tenant", extra={"tenant": record.id, "problem": error.detail})
            return  # as above
        now = self._clock()
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            db.next_generation(tx, at=now)
            tenant_rows.delete_tenant(tx, record.id)
            issuers.changed(tx)
            actor = audit.system_actor(DEFAULT_TENANT)
            audit.record(tx, actor, "tenant:delete", f"tenant:{record.id}", at=now, rows=deleted)
            failpoint("tenant_remove.before_gone")
        failpoint("tenant_remove.gone")
        self._audit_logs.of(record.id).forget()
        self._reconciler.wake()
        log.warning("the rows of a removed tenant were deleted", extra={"tenant": record.id, "rows": deleted})

    def _is_forgotten_by_broker(self) -> bool:
        """Have the broker told all anew, without what was deleted; return whether it was.

        That is before the tenant itself is deleted: cut off afterwards, nobody would know of it.
        """
        self._broker.begin_again()
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            generation = db.next_generation(tx, at=self._clock())
            agents.begin_again(tx)
        return self._reconciler.apply_everywhere(generation).covers(generation) and not self._broker.begins_again

    def _destroy_keys(self, tenant_id: str) -> None:
        """Destroy the keys of a tenant's CAs and of their OCSP responders."""
        for name in key_names(tenant_id):
            for path in (self._settings.ocsp_dir / f"{name}.pem", self._settings.ca_dir / f"{name}.csr.pem"):
                path.unlink(missing_ok=True)
            if self._keys.exists(name):
                self._keys.destroy(name)
                failpoint("tenant_remove.key_destroyed")

    # --- Export

    def export(self, actor: Actor, name: str) -> Iterator[bytes]:
        """Yield what is known of a removed tenant in JSON: itself, devices, certificates, audit record, checkpoint.

        There are no keys and no bundles among them. Each part is read in a transaction of its own. That somebody has
        asked is in the record itself. Raises before the first line ``NotFound``, and ``StateConflict`` for a tenant
        that was not removed: what it has is nobody else's to see.
        """
        record = self._tenants.show(name)
        if record.status is not TenantStatus.REMOVED:
            raise StateConflict("What a tenant has is for its own operators; it can be exported once it is removed.")
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            record_of_both(tx, actor, "tenant:export", name, self._clock())
        return self._lines(record)

    def _lines(self, record: TenantRecord) -> Iterator[bytes]:
        yield _line("tenant", {"name": record.id, "topic_prefix": record.topic_prefix, "status": record.status})
        after = ""
        while devices := self._read(tenant_rows.rows_of_devices, record.id, after):
            yield b"".join(_line("device", row) for row in devices)
            after = devices[-1]["id"]
        last = 0
        while certificates := self._read(tenant_rows.rows_of_certificates, record.id, last):
            yield b"".join(_line("certificate", row) for row in certificates)
            last = certificates[-1]["id"]
        record_log = self._audit_logs.of(record.id)
        for part in record_log.export():
            yield b"".join(b'{"kind":"audit",' + line[1:] + b"\n" for line in part.splitlines())
        try:
            yield _line("checkpoint", {"note": record_log.newest(), "key": str(record_log.verifier)})
        except NotFound:
            return  # a young record has none yet

    def _read(self, rows: Callable[..., Any], tenant_id: str, after: Any) -> Any:
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return rows(tx, tenant_id, after=after, limit=ROWS_AT_ONCE)


def _line(kind: str, values: Mapping[str, Any]) -> bytes:
    return json.dumps({"kind": kind, **values}, default=_text_of, separators=(",", ":")).encode() + b"\n"


def _text_of(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, datetime) else str(value)
