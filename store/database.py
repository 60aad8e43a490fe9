"""The database as a whole: how rows hold times and states, transactions that are durable once they end, the schema.

On SQLite writers take turns, and callers that wait for their turn share a commit, so that one disk sync serves all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.orm import DeclarativeBase

from core.errors import DatabaseInUse, DatabaseTooNew, DatabaseUnavailable, LockUnavailable, StartupError
from core.fair_share import give_way
from core.files import FileLock, folder_number
from store import prepared, schema, scope
from store.advances import ADVANCED, SUBSCRIBED, Advances
from store.locks import Locks
from store.prepared import Question, Values
from store.shared_transactions import Item, Result, SharedTransactions

# The server does not answer, is locked or full, or can only be read (InternalError).
_UNAVAILABLE = (
    sa.exc.OperationalError,
    sa.exc.InterfaceError,
    sa.exc.InternalError,
    sa.exc.TimeoutError,
    sqlite3.OperationalError,  # of a connection that was to be opened for the driver alone
)
WRITE_LOCK = ".write.lock"  # in the data folder
BUSY_TIMEOUT_SECONDS = 5.0
INSUFFICIENT_PRIVILEGE = "42501"  # of PostgreSQL's errors
LOCKED_SECONDS = 0.2  # how long a writer waits if the previous one waited in vain
PING_SECONDS = 2.0  # how long a test write waits for other writers
SECONDS_BETWEEN_TEST_WRITES = 10.0  # by those who only ask whether the database is well, which anybody may
# Connections of a process beside those of its request threads: for reconciliation, jobs and probes.
SPARE_CONNECTIONS = 8
LOCKS_AT_ONCE = 16  # that a process holds between nodes, beside as many as there are spare connections
_SYNCHRONOUS = "portal_synchronous"  # in the info of a connection to SQLite: what the PRAGMA was set to last
_REWRITE = sa.text("UPDATE broker_state SET generation = generation")  # changes nothing, and is written to disk


# --- Columns ---------------------------------------------------------------------------------------------------------


class NaiveTimeError(ValueError, sa.exc.DontWrapMixin):
    """A time without a zone; SQLAlchemy passes this error on unwrapped."""


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware time in UTC, to the microsecond; SQLite, which has no zones, stores it without one."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a time to UTC; raises ``NaiveTimeError`` for one without a zone, which is always a mistake."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise NaiveTimeError("a time without a zone must not reach the database")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return the time with its zone, UTC."""
        if value is None:
            return None
        time: datetime = value
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


class Base(DeclarativeBase):
    """The base of all tables; names every constraint, so that migrations and errors can refer to it."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        # A column annotated with an enum holds its values as text, and a row that is read its members.
        StrEnum: sa.Enum(
            StrEnum, native_enum=False, length=16, values_callable=lambda kind: [state.value for state in kind]
        ),
    }
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def hash_of(secret: str) -> str:
    """Return the SHA-256, in hex, by which rows hold a secret of 256 random bits.

    So many need no slow hash, and a look-up by it leaks no useful timing.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


def columns_of(record: type, table: type[Base], **derived: sa.ColumnElement[Any]) -> tuple[Any, ...]:
    """Return the columns that have the names of the fields of a record, a dataclass, in their order.

    ``derived`` are expressions for fields without a column.
    """
    names = [field.name for field in dataclasses.fields(record)]
    return tuple(derived[name] if name in derived else table.__table__.c[name] for name in names)


# --- Transactions ----------------------------------------------------------------------------------------------------


class Database:
    """One engine with its rules: WAL and synchronous=FULL on SQLite, one writer at a time, foreign keys on."""

    def __init__(self, url: str, *, folder: Path, threads: int, claims: bool = True) -> None:
        """Take a SQLAlchemy URL of SQLite or PostgreSQL, and the data folder that its portal works on.

        SQLite's writers queue at a lock file in the folder. PostgreSQL serves the data folders that are nodes of the
        installation (``store/nodes.py``), a connection for another one raises ``DatabaseInUse`` while one works.
        One that does not ``claims`` to be a node is for joining.
        """
        claimed = folder if claims else None
        self.engine = create_engine(url, threads, claimed)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # SQLite's own lock is polled by those who wait for it, which costs tens of milliseconds; a lock of the kernel
        # wakes the next writer at once. PostgreSQL queues writers itself.
        self._write_gate = FileLock(folder / WRITE_LOCK) if self.is_sqlite else None
        self.folder = folder
        self.locks = Locks(folder, None if self.is_sqlite else create_engine(url, LOCKS_AT_ONCE, claimed))
        self.advances = Advances(folder, is_alone=self.is_sqlite)
        self._shared = SharedTransactions(self.transaction)
        self._locked = False  # whether the last writer waited in vain for the database to be free
        self._failed = False  # whether the last transaction that writes failed because of the database
        self._tested_at = -math.inf  # when it was seen last that the database can be written, by the monotonic clock

    @contextmanager
    def transaction(
        self, *, patience: float = BUSY_TIMEOUT_SECONDS, durable: bool = True, sees: str | None = None
    ) -> Iterator[Connection]:
        """Open a transaction that writes: durable when the block ends, undone if it raises. Never nest it in another.

        It has the scope ``sees``, or that of its thread: see ``store/scope.py``.
        Waits ``patience`` seconds at most for others. One that is not ``durable`` is seen by all at once, but need not
        survive a power cut: it does once a later one is durable.
        Raises ``DatabaseUnavailable`` if the database does not answer, is locked by others or has no room, and
        ``LockUnavailable`` if other writers of the portal do not end.
        """
        # If another program keeps the database locked, each writer that waits holds up a thread, and so readers in the
        # end. Once one has waited in vain, the next ones only look whether the lock is gone.
        patience = LOCKED_SECONDS if self._locked else patience
        with _translated(), ExitStack() as stack:
            options = {"portal_durable": durable, **scope.option_for(sees)}
            connection = self._begin(stack, patience, options)
            notes = connection.info  # one that was lost would first have to be made again
            try:
                yield connection
            except BaseException as error:
                self._failed |= isinstance(error, _UNAVAILABLE)
                notes.pop(ADVANCED, None)
                notes.pop(SUBSCRIBED, None)
                connection.rollback()
                raise
            try:
                connection.commit()
            except BaseException as error:
                self._failed |= isinstance(error, _UNAVAILABLE)
                connection.invalidate()  # it may still be in the transaction, which the next user would find
                raise
            self._failed = False
            notes.pop(SUBSCRIBED, None)
            if notes.pop(ADVANCED, False):
                self.advances.tell()

    def _begin(self, stack: ExitStack, patience: float, options: Mapping[str, Any]) -> Connection:
        """Return a connection whose transaction has begun and may write; ``stack`` ends what it takes."""
        until = time.monotonic() + patience
        try:
            if self._write_gate is not None:
                stack.enter_context(self._write_gate.hold(patience))
            connection = stack.enter_context(self.engine.connect())
            seconds = max(0.0, until - time.monotonic())
            connection.execution_options(portal_writes=seconds, **options)  # see _on_sqlite_begin, postgresql._on_begin
            connection.begin()
        except (LockUnavailable, sa.exc.OperationalError):
            self._locked = self._failed = True
            raise
        self._locked = False
        return connection

    def write(self, work: Callable[[Connection], Result], *, sees: str | None = None) -> Result:
        """Run ``work`` in such a transaction, on SQLite shared with other callers that wait; return its result.

        If ``work`` raises, its own changes are undone and no others.
        """
        return self.write_together(lambda tx, _: [work(tx)], None, sees=sees)

    def write_together(
        self, work: Callable[[Connection, Sequence[Item]], Sequence[Result]], item: Item, *, sees: str | None = None
    ) -> Result:
        """Run ``work`` as ``write`` does, for the items of all callers that wait with an equal one.

        It returns a result for each. If it raises, it is run for each item by itself.
        """
        give_way()  # before it has the lock that a tenant with a single request would wait for
        if self.is_sqlite:
            with _translated():  # what has failed in a savepoint, while the transaction of all went on
                return self._shared.run(work, item)
        with self.transaction(sees=sees) as tx:
            return work(tx, [item])[0]

    def preparing(self) -> AbstractContextManager[None]:
        """Prepare in the body of the ``with`` what ends in ``write_together``, so that others write it with theirs."""
        return self._shared.preparing() if self.is_sqlite else contextlib.nullcontext()

    @contextmanager
    def snapshot(self, *, sees: str | None = None) -> Iterator[Connection]:
        """Open a transaction that only reads and sees one state of the database throughout, in the scope ``sees``."""
        with _translated(), self.engine.connect() as connection:
            connection.execution_options(portal_reads=True, **scope.option_for(sees))
            with connection.begin():
                yield connection

    def answer(self, question: Question, values: Values, *, sees: str | None = None) -> Sequence[Any] | None:
        """Return the row that a question asks for, as it is now, ``None`` if there is none, in the scope ``sees``.

        SQLite needs no transaction for a single statement, and one takes several times as long as the statement.
        """
        if self.is_sqlite:
            with _translated(), contextlib.closing(self.engine.raw_connection()) as driver:
                return question.by_sqlite(driver, self.engine.dialect, values)
        with self.snapshot(sees=sees) as tx:
            return question.within(tx, values)

    def migrate(self, owner_url: str = "") -> None:
        """Bring the schema up to this version's; raises ``DatabaseTooNew`` if a newer portal has written it.

        On PostgreSQL with ``owner_url`` as the role of that URL, which lets this one's role use the tables. Raises
        ``StartupError`` if a role may not do that, or while another node works with the schema that there is.
        """
        engine = create_engine(owner_url, 1) if owner_url else self.engine
        try:
            with _translated():
                with engine.connect() as connection:  # this one's role may not have the right to read it yet
                    found = schema.revision(connection)
                    if not owner_url and found == schema.newest_revision():
                        return
                    self._check_alone(connection, found)
                with self.engine.connect() as connection:
                    role = "" if self.is_sqlite else connection.exec_driver_sql("SELECT current_user").scalar_one()
                _migrate(engine, role)
        except sa.exc.ProgrammingError as error:
            if getattr(error.orig, "sqlstate", "") != INSUFFICIENT_PRIVILEGE:
                raise
            raise StartupError(
                "The database's role may not create or change its tables; set PORTAL_DATABASE_OWNER_URL to a URL of"
                " the role that owns them."
            ) from error
        finally:
            if owner_url:
                engine.dispose()

    def _check_alone(self, connection: Connection, found: str | None) -> None:
        if self.is_sqlite or found in (None, schema.newest_revision()):
            return
        from store import postgresql

        driver: Any = connection.connection.driver_connection
        if postgresql.other_folders(driver, folder_number(self.folder)):
            raise StartupError(
                "Other nodes work with an older version of the portal; stop them all, then start this one."
            )

    def ping(self) -> None:
        """Raise ``DatabaseUnavailable`` unless the database answers a query, and can be written.

        The latter is tried if it has just failed, and else every ten seconds.
        """
        if self._failed or time.monotonic() - self._tested_at > SECONDS_BETWEEN_TEST_WRITES:
            try:
                with self.transaction(patience=PING_SECONDS) as tx:
                    tx.execute(_REWRITE)
            except DatabaseInUse:
                raise
            except (DatabaseUnavailable, LockUnavailable) as error:
                self._failed = True
                raise DatabaseUnavailable(
                    "The database cannot be written: it does not answer, is read-only or locked by another program, or"
                    " has no room left."
                ) from error
            self._tested_at = time.monotonic()
        with self.snapshot() as tx:
            tx.execute(sa.text("SELECT count(*) FROM tenants")).scalar_one()

    def empty_log(self) -> bool:
        """Write all of SQLite's write-ahead log (WAL) into the database, and empty it; return whether it is empty.

        Until then the WAL has what was deleted or overwritten, such as the sealed key of a bundle that was fetched.
        Nothing is done while readers need it: the next call will. Raises ``DatabaseUnavailable``, ``LockUnavailable``.
        """
        if self._write_gate is None:
            return True
        with _translated(), self._write_gate.hold(), self.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 0")  # others that write wait meanwhile
            try:
                return not connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
            finally:
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_SECONDS * 1000)}")

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self.locks.close()


def _migrate(engine: Engine, role: str) -> None:
    """Upgrade the schema in one transaction, and let a role of PostgreSQL use it."""
    with engine.connect() as connection, ExitStack() as stack:
        stack.enter_context(connection.execution_options(portal_writes=BUSY_TIMEOUT_SECONDS).begin())
        if engine.dialect.name != "sqlite":
            from store import postgresql

            stack.enter_context(postgresql.without_time_limits(connection))
            connection.execute(schema.MIGRATION_LOCK)
        found = schema.revision(connection)
        if found is not None and found not in schema.revisions():
            raise DatabaseTooNew(
                "The database was written by a newer version of the portal; start that version or restore"
                " a backup made with this one."
            )
        if found != schema.newest_revision():
            schema.upgrade(connection, "head")
        if role:
            from store import grants

            grants.grant(connection, role)


@contextmanager
def _translated() -> Iterator[None]:
    """Raise the portal's errors in place of SQLAlchemy's."""
    try:
        yield
    except _UNAVAILABLE as error:
        raise DatabaseUnavailable("The database does not answer, is read-only or full; try again shortly.") from error
    except (sa.exc.DatabaseError, sqlite3.DatabaseError) as error:
        of_driver = getattr(error, "orig", error)
        code = getattr(of_driver, "sqlite_errorcode", 0) & 0xFF  # the primary code, without the extended part
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        raise DatabaseUnavailable("The database file is damaged; restore a backup, with --replace.") from error


# --- Engines ---------------------------------------------------------------------------------------------------------


def create_engine(url: str, threads: int, folder: Path | None = None) -> Engine:
    """Return an engine for a SQLite or PostgreSQL URL, with room for ``threads`` connections and a few more.

    Those to PostgreSQL are for the portal of a data ``folder``, if one is given. It opens no connection yet.
    Raises ``StartupError`` if the URL cannot be read.
    """
    if url.startswith("postgresql://"):
        url = "postgresql+psycopg://" + url.removeprefix("postgresql://")
    options: dict[str, Any] = {
        "pool_size": threads + SPARE_CONNECTIONS,
        "max_overflow": 0,
        "pool_use_lifo": True,  # the connection used last has its pages and statements cached
        "hide_parameters": True,  # else they would appear in tracebacks
        "pool_timeout": BUSY_TIMEOUT_SECONDS,
    }
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False}
    else:
        from store import postgresql

        options["connect_args"] = dict(postgresql.CONNECT_ARGUMENTS)
        options["pool_pre_ping"] = True
    try:
        engine = sa.create_engine(url, **options)
    except sa.exc.ArgumentError as error:
        raise StartupError("PORTAL_DATABASE_URL cannot be read as a database URL.") from error
    if engine.dialect.name == "sqlite":
        # SQLite would create it with the process's umask. Its WAL takes over the file's mode.
        os.close(os.open(engine.url.database or "", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        sa.event.listen(engine, "connect", _on_sqlite_connect)
        sa.event.listen(engine, "begin", _on_sqlite_begin)
    else:
        postgresql.prepare(engine, folder)
    return engine


def _on_sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver would send BEGIN too late: see _on_sqlite_begin
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # NORMAL loses acknowledged commits at a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA secure_delete = ON")  # a deleted bundle is overwritten
    cursor.execute("PRAGMA trusted_schema = OFF")
    cursor.close()


def _on_sqlite_begin(connection: Connection) -> None:
    driver = connection.connection
    # A writer takes the write lock at once: a transaction that begins as a reader may fail at its first write.
    options = connection.get_execution_options()
    seconds = options.get("portal_writes")
    if seconds is None:
        prepared.execute(driver, "BEGIN")
        return
    # NORMAL writes the WAL without a sync. It cannot be set within a transaction.
    synchronous = "FULL" if options.get("portal_durable", True) else "NORMAL"
    if connection.info.get(_SYNCHRONOUS, "FULL") != synchronous:  # it is FULL at first: see _on_sqlite_connect
        connection.info[_SYNCHRONOUS] = ""  # not known, if this fails
        prepared.execute(driver, f"PRAGMA synchronous = {synchronous}")
        connection.info[_SYNCHRONOUS] = synchronous
    if seconds > BUSY_TIMEOUT_SECONDS - 0.5:
        prepared.execute(driver, "BEGIN IMMEDIATE")
    else:
        prepared.execute(driver, f"PRAGMA busy_timeout = {int(seconds * 1000)}")
        try:
            prepared.execute(driver, "BEGIN IMMEDIATE")
        finally:
            prepared.execute(driver, f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_SECONDS * 1000)}")
