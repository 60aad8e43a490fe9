"""The database: devices with their certificates, in transactions that are durable once they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command as alembic
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import Connection

from db_engine import BUSY_TIMEOUT_SECONDS, LOCKED_SECONDS, create_engine, is_damage
from db_postgresql import unhurried
from db_tables import AclEntry, BrokerState, Certificate, Delivery, Device, IssuerRow, Tenant, UtcDateTime
from db_turns import Result, SharedTransactions
from errors import DatabaseTooNew, DatabaseUnavailable, DeviceNotFound, LockUnavailable
from files import FileLock
from lifecycle import DeviceStatus

MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A row of ``devices``."""

    id: str
    tenant_id: str
    external_id: str | None
    name: str
    type: str
    location: str
    firmware: str
    metadata: dict[str, Any]
    own_topics: bool
    status: DeviceStatus
    created_at: datetime
    updated_at: datetime
    revoked_at: datetime | None
    revocation_reason: str | None
    generation: int


@dataclass(frozen=True, slots=True)
class CertificateRecord:
    """A row of ``certificates``: serial number in lower-case hex, fingerprint SHA-256 in lower-case hex."""

    id: int
    issuer_id: int
    device_id: str | None
    purpose: str
    serial_number: str
    fingerprint: str
    der: bytes
    not_before: datetime
    not_after: datetime
    issued_at: datetime
    status: str
    revoked_at: datetime | None
    revocation_reason: str | None


class Database:
    """One engine with its rules: WAL and synchronous=FULL on SQLite, writers one at a time, foreign keys on."""

    def __init__(self, url: str, *, lock_path: Path, threads: int) -> None:
        """``url`` is a SQLAlchemy URL of SQLite or PostgreSQL; ``lock_path`` queues SQLite's writers fairly."""
        self.engine = create_engine(url, threads)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # SQLite lets one write at a time and lets the others poll for their turn, which costs tens of
        # milliseconds; a lock of the kernel wakes the next one at once. PostgreSQL queues by itself.
        self._write_gate = FileLock(lock_path) if self.is_sqlite else None
        self._shared = SharedTransactions(self.transaction)
        self._locked = False  # whether the last writer waited in vain for the database to be free
        self._failed = False  # whether the last transaction that writes failed for the database's sake

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that writes: durable when the block ends, undone if it raises.

        Raises ``DatabaseUnavailable`` where the database does not answer, is locked by others, or has no room,
        ``LockUnavailable`` where other writers of the portal do not end. Never nest one in another.
        """
        # Somebody else who keeps the database locked holds up a thread for each writer, and so the readers in the end:
        # once one has waited in vain, the next ones only look whether that is over.
        patience = LOCKED_SECONDS if self._locked else BUSY_TIMEOUT_SECONDS
        until = time.monotonic() + patience
        with _translated(), ExitStack() as stack:
            try:
                if self._write_gate is not None:
                    stack.enter_context(self._write_gate.hold(patience))
                connection = stack.enter_context(self.engine.connect())
                connection.execution_options(portal_writes=max(0.0, until - time.monotonic()))  # read at its begin
                connection.begin()
            except (LockUnavailable, sa.exc.OperationalError):
                self._locked = self._failed = True
                raise
            self._locked = False
            try:
                yield connection
            except BaseException as error:
                self._failed |= isinstance(error, sa.exc.OperationalError)
                connection.rollback()
                raise
            try:
                connection.commit()
            except sa.exc.OperationalError:
                self._failed = True
                raise
            self._failed = False

    def write(self, work: Callable[[Connection], Result]) -> Result:
        """Run ``work`` in a transaction as above, which on SQLite requests that wait at the same time share.

        Returns what ``work`` returns once that is durable. Where it raises, its own part is undone and no other.
        """
        if self.is_sqlite:
            return self._shared.run(work)
        with self.transaction() as tx:
            return work(tx)

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A transaction that only reads and sees one state of the database throughout."""
        with _translated(), self.engine.connect() as connection:
            if not self.is_sqlite:
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    def migrate(self) -> None:
        """Bring the schema up to this version's; raises ``DatabaseTooNew`` where a newer portal has written it."""
        config = AlembicConfig()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        head = ScriptDirectory.from_config(config).get_current_head()
        with _translated():
            with self.engine.connect() as connection:
                if MigrationContext.configure(connection).get_current_revision() == head:
                    return
            with self.engine.connect() as connection:
                config.attributes["connection"] = connection
                try:
                    with ExitStack() as stack:
                        stack.enter_context(connection.execution_options(portal_writes=BUSY_TIMEOUT_SECONDS).begin())
                        if not self.is_sqlite:
                            stack.enter_context(unhurried(connection))
                            # Of several portals that start at once, one migrates.
                            connection.execute(sa.text("SELECT pg_advisory_xact_lock(8443)"))
                        alembic.upgrade(config, "head")
                except CommandError as error:
                    raise DatabaseTooNew(
                        "The database was written by a newer version of the portal; start that version or restore"
                        " a backup made with this one."
                    ) from error

    def ping(self) -> None:
        """Raise ``DatabaseUnavailable`` unless the database answers a query, and writes where it has just failed to."""
        if self._failed:
            with self.transaction() as tx:
                tx.execute(_REWRITE)
        with self.snapshot() as tx:
            tx.execute(sa.select(sa.func.count()).select_from(Tenant)).scalar_one()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError) as error:
        raise DatabaseUnavailable("The database does not answer or has no room left; try again shortly.") from error
    except sa.exc.DatabaseError as error:
        if not is_damage(error):
            raise
        raise DatabaseUnavailable("The database file is damaged; restore a backup, with --replace.") from error


# --- Devices ------------------------------------------------------------------------------------------------------

DEVICE_COLUMNS = tuple(Device.__table__.c[name] for name in (
    "id", "tenant_id", "external_id", "name", "type", "location", "firmware", "metadata", "own_topics", "status",
    "created_at", "updated_at", "revoked_at", "revocation_reason", "generation",
))  # fmt: skip


# Statements of every registration and every request stand ready: building one takes longer than running it.
_INSERT_DEVICE = sa.insert(Device)


def device_record(row: Sequence[Any]) -> DeviceRecord:
    """Read a row of ``DEVICE_COLUMNS``."""
    values = list(row)
    values[9] = DeviceStatus(values[9])
    return DeviceRecord(*values)


def add_device(
    tx: Connection,
    *,
    tenant_id: str,
    device_id: str,
    name: str,
    type: str,  # noqa: A002 - the field's name in the interface
    location: str,
    firmware: str,
    metadata: dict[str, Any],
    status: DeviceStatus,
    topics: Sequence[tuple[str, str]] | None,
    created_at: datetime,
    generation: int,
    external_id: str | None = None,
) -> None:
    """Insert a device; ``topics`` are pairs of filter and access, or ``None`` for the default ones."""
    tx.execute(
        _INSERT_DEVICE,
        {
            "id": device_id,
            "tenant_id": tenant_id,
            "external_id": external_id,
            "name": name,
            "type": type,
            "location": location,
            "firmware": firmware,
            "metadata": metadata,
            "own_topics": topics is not None,
            "status": status,
            "created_at": created_at,
            "updated_at": created_at,
            "generation": generation,
        },
    )
    if topics is not None:
        _insert_topics(tx, tenant_id, device_id, topics)


def get_device(tx: Connection, tenant_id: str, device_id: str, *, for_update: bool = False) -> DeviceRecord:
    """Read a device; ``for_update`` keeps others from changing it until the transaction ends.

    Raises ``DeviceNotFound``.
    """
    query = sa.select(*DEVICE_COLUMNS).where(Device.tenant_id == tenant_id, Device.id == device_id)
    if for_update:
        query = query.with_for_update()  # nothing on SQLite, where a writer is alone anyway
    row = tx.execute(query).one_or_none()
    if row is None:
        raise DeviceNotFound(f"There is no device {device_id}; check the id with GET /devices.")
    return device_record(row)


def update_device(tx: Connection, tenant_id: str, device_id: str, values: dict[str, Any]) -> None:
    """Set columns of a device, by the columns' names."""
    tx.execute(sa.update(Device).where(Device.tenant_id == tenant_id, Device.id == device_id).values(values))


def replace_topics(
    tx: Connection, tenant_id: str, device_id: str, topics: Sequence[tuple[str, str]] | None, *, generation: int
) -> None:
    """Give a device other topics of its own, or with ``None`` the default ones again."""
    tx.execute(sa.delete(AclEntry).where(AclEntry.tenant_id == tenant_id, AclEntry.device_id == device_id))
    if topics is not None:
        _insert_topics(tx, tenant_id, device_id, topics)
    update_device(tx, tenant_id, device_id, {"own_topics": topics is not None, "generation": generation})


def _insert_topics(tx: Connection, tenant_id: str, device_id: str, topics: Sequence[tuple[str, str]]) -> None:
    tx.execute(
        sa.insert(AclEntry),
        [
            {"tenant_id": tenant_id, "device_id": device_id, "position": position, "filter": pattern, "access": access}
            for position, (pattern, access) in enumerate(topics)
        ],
    )


def revoke_device(
    tx: Connection, tenant_id: str, device_id: str, *, revoked_at: datetime, reason: str, generation: int
) -> None:
    """Revoke a device with all certificates of it that are not yet, and destroy the bundles that wait for it."""
    update_device(
        tx,
        tenant_id,
        device_id,
        {
            "status": DeviceStatus.REVOKED,
            "revoked_at": revoked_at,
            "revocation_reason": reason,
            "updated_at": revoked_at,
            "generation": generation,
        },
    )
    own = (Certificate.tenant_id == tenant_id, Certificate.device_id == device_id, Certificate.status != "revoked")
    issuers = sa.select(Certificate.issuer_id).where(*own)
    tx.execute(sa.update(IssuerRow).where(IssuerRow.id.in_(issuers)).values(revoked_generation=generation))
    tx.execute(
        sa.update(Certificate)
        .where(*own)
        .values(status="revoked", revoked_at=revoked_at, revocation_reason=reason, generation=generation)
    )
    tx.execute(
        sa.update(Delivery)
        .where(
            Delivery.tenant_id == tenant_id,
            Delivery.device_id == device_id,
            Delivery.status.in_(("ready", "fetching")),
        )
        .values(status="revoked", bundle=None, lease_until=None)
    )


# --- Certificates -------------------------------------------------------------------------------------------------

CERTIFICATE_COLUMNS = tuple(Certificate.__table__.c[name] for name in (
    "id", "issuer_id", "device_id", "purpose", "serial_number", "fingerprint", "der", "not_before", "not_after",
    "issued_at", "status", "revoked_at", "revocation_reason",
))  # fmt: skip


_INSERT_CERTIFICATE = sa.insert(Certificate).returning(Certificate.id)


def certificate_record(row: Sequence[Any]) -> CertificateRecord:
    """Read a row of ``CERTIFICATE_COLUMNS``."""
    return CertificateRecord(*row)


def add_certificate(
    tx: Connection,
    *,
    tenant_id: str,
    issuer_id: int,
    purpose: str,
    serial_number: str,
    fingerprint: str,
    der: bytes,
    not_before: datetime,
    not_after: datetime,
    issued_at: datetime,
    device_id: str | None = None,
    revoked_at: datetime | None = None,
    reason: str | None = None,
) -> int:
    """Record a certificate, active or already revoked, and return its row's id.

    The database refuses a second active one of the same device, and a serial number that its issuer has used.
    """
    added = tx.execute(
        _INSERT_CERTIFICATE,
        {
            "tenant_id": tenant_id,
            "issuer_id": issuer_id,
            "device_id": device_id,
            "purpose": purpose,
            "serial_number": serial_number,
            "fingerprint": fingerprint,
            "der": der,
            "not_before": not_before,
            "not_after": not_after,
            "issued_at": issued_at,
            "status": "active" if revoked_at is None else "revoked",
            "revoked_at": revoked_at,
            "revocation_reason": reason,
        },
    )
    return added.scalar_one()


# --- The generation that the broker must reach ---------------------------------------------------------------------

_ADVANCE = (
    sa.update(BrokerState)
    .where(BrokerState.tenant_id == sa.bindparam("of_tenant"))
    .values(
        generation=BrokerState.generation + 1,
        pending_since=sa.func.coalesce(BrokerState.pending_since, sa.bindparam("at", type_=UtcDateTime)),
    )
    .returning(BrokerState.generation)
)


# Changes nothing, and is written to the disk.
_REWRITE = sa.update(BrokerState).values(generation=BrokerState.generation)


def next_generation(tx: Connection, tenant_id: str, *, at: datetime) -> int:
    """Advance the generation, in the transaction that makes the change, and return the new one."""
    return int(tx.execute(_ADVANCE, {"of_tenant": tenant_id, "at": at}).scalar_one())
