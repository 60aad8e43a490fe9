"""The database as a whole: transactions that are durable once they end, the schema brought up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command as alembic
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import Connection

from core.errors import DatabaseTooNew, DatabaseUnavailable, LockUnavailable
from core.files import FileLock
from store.engine import BUSY_TIMEOUT_SECONDS, LOCKED_SECONDS, create_engine, is_damage, without_time_limits
from store.shared_commits import Result, SharedTransactions
from store.tables import BrokerState, Tenant

MIGRATIONS = Path(__file__).parents[1] / "migrations"
# Changes nothing, and is written to the disk.
_REWRITE = sa.update(BrokerState).values(generation=BrokerState.generation)


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
            except BaseException as error:
                self._failed |= isinstance(error, sa.exc.OperationalError)
                connection.invalidate()  # it may still be in the transaction, which the next user would find
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
                            stack.enter_context(without_time_limits(connection))
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
