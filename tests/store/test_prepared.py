"""Statements whose text is made once: they write what SQLAlchemy's own execution of them writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import DatabaseUnavailable
from core.states import DeliveryStatus, DeviceStatus
from store.database import Base, Database, NaiveTimeError
from store.prepared import Prepared, Question, execute
from store.tables import Delivery, Device

AT = datetime(2026, 3, 1, 12, 30, 0, 250, tzinfo=timezone(timedelta(hours=2)))
DEVICE = {
    "id": "d1",
    "tenant_id": "default",
    "name": "pump",
    "type": "",
    "location": "",
    "firmware": "",
    "metadata": {"line": 4},
    "own_topics": True,
    "status": "active",
    "created_at": AT,
    "updated_at": AT,
    "generation": 3,
    "kind": "device",
}
DELIVERY = {
    "id": "l1",
    "tenant_id": "default",
    "device_id": "d1",
    "certificate_id": 1,
    "status": DeliveryStatus.READY,
    "bundle": b"\0secret",
    "sealed": True,
    "format": "zip",
    "created_at": AT,
    "expires_at": AT,
}


@pytest.fixture
def tx(tmp_path: Path) -> Any:
    database = Database(f"sqlite:///{tmp_path / 'portal.db'}", folder=tmp_path, threads=1)
    with database.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute("PRAGMA foreign_keys = OFF")  # not within a transaction
        driver.execute("PRAGMA ignore_check_constraints = ON")
        Base.metadata.create_all(connection)
        yield connection
    database.close()


def written(tx: Connection, table: type[Base]) -> list[tuple[Any, ...]]:
    """Return the rows as SQLite has them, and empty the table."""
    every = sa.text("*")
    rows = [tuple(row) for row in tx.execute(sa.select(every).select_from(table))]
    tx.execute(sa.delete(table))
    return rows


@pytest.mark.parametrize(("table", "row"), [(Device, DEVICE), (Delivery, DELIVERY)])
@pytest.mark.parametrize("count", [1, 3])
def test_it_writes_what_sqlalchemy_writes(tx: Connection, table: type[Base], row: dict[str, Any], count: int) -> None:
    rows = [{**row, "id": f"{row['id']}{number}"} for number in range(count)]
    tx.execute(sa.insert(table), rows)
    expected = written(tx, table)
    prepared = Prepared(sa.insert(table))
    for _ in range(2):  # as compiled for it, and as kept
        prepared.run(tx, rows)
        assert written(tx, table) == expected
    assert len(expected) == count


def test_values_of_the_statement_itself_are_written_too(tx: Connection) -> None:
    Prepared(sa.insert(Delivery)).run(tx, [DELIVERY])
    spend = Prepared(
        sa.update(Delivery)
        .where(Delivery.id == sa.bindparam("wanted"))
        .values(status=DeliveryStatus.DELIVERED, bundle=None, delivered_at=sa.bindparam("at"))
        .returning(Delivery.format, Delivery.sealed)
    )
    assert tuple(spend.row(tx, {"wanted": "l1", "at": AT})) == ("zip", 1)
    row = tx.execute(sa.select(Delivery.status, Delivery.bundle, Delivery.delivered_at)).one()
    assert tuple(row) == (DeliveryStatus.DELIVERED, None, AT.astimezone(UTC))


def test_a_value_can_be_at_more_than_one_place(tx: Connection) -> None:
    Prepared(sa.insert(Delivery)).run(tx, [DELIVERY])
    at: sa.BindParameter[datetime] = sa.bindparam("at")
    extend = Prepared(sa.update(Delivery).values(expires_at=at, delivered_at=at).where(Delivery.created_at < at))
    later = AT + timedelta(days=1)
    extend.run(tx, [{"at": later}])
    row = tx.execute(sa.select(Delivery.expires_at, Delivery.delivered_at)).one()
    assert tuple(row) == (later, later)


def test_a_missing_value_is_an_error_and_not_a_null(tx: Connection) -> None:
    spend = Prepared(sa.update(Delivery).where(Delivery.id == sa.bindparam("wanted")).values(format=sa.bindparam("as")))
    with pytest.raises(KeyError, match="as"):
        spend.run(tx, [{"wanted": "l1"}])


def test_rows_with_other_columns_have_a_text_of_their_own(tx: Connection) -> None:
    insert = Prepared(sa.insert(Device))
    insert.run(tx, [DEVICE])
    insert.run(tx, [{**DEVICE, "id": "d2", "external_id": "rack 7"}])
    assert list(tx.execute(sa.select(Device.id, Device.external_id).order_by(Device.id))) == [
        ("d1", None),
        ("d2", "rack 7"),
    ]


def test_an_error_of_the_driver_is_sqlalchemys(tx: Connection) -> None:
    insert = Prepared(sa.insert(Device))
    insert.run(tx, [DEVICE])
    with pytest.raises(sa.exc.IntegrityError):
        insert.run(tx, [DEVICE])


# --- Questions ----------------------------------------------------------------------------------------------------

_ASKED = Question(
    sa.select(Device.id, Device.status, Device.created_at, Device.device_metadata, Device.own_topics).where(
        Device.id == sa.bindparam("wanted")
    )
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'portal.db'}", folder=tmp_path, threads=1)
    made.migrate()
    with contextlib.closing(made.engine.raw_connection()) as driver:  # which the pool gives to the next one again
        driver.cursor().execute("PRAGMA foreign_keys = OFF")
        driver.cursor().execute("PRAGMA ignore_check_constraints = ON")
    with made.transaction() as tx:
        tx.execute(sa.insert(Device), DEVICE)
    yield made
    made.close()


def test_an_answer_has_the_values_that_sqlalchemy_returns(database: Database) -> None:
    for _ in range(2):
        answer = database.answer(_ASKED, {"wanted": "d1"})
        with database.snapshot() as tx:
            assert answer is not None
            assert tuple(answer) == tuple(_ASKED.within(tx, {"wanted": "d1"}) or ())
    assert answer is not None
    assert (type(answer[1]), answer[2:]) == (DeviceStatus, [AT.astimezone(UTC), {"line": 4}, True])
    assert database.answer(_ASKED, {"wanted": "d2"}) is None


def test_a_question_keeps_no_transaction_open(database: Database) -> None:
    database.answer(_ASKED, {"wanted": "d1"})
    with database.transaction() as tx:
        tx.execute(sa.update(Device).values(status="suspended"))
    answer = database.answer(_ASKED, {"wanted": "d1"})
    assert answer is not None
    assert answer[1] is DeviceStatus.SUSPENDED
    assert database.empty_log()  # which it is not while somebody reads


def test_a_question_that_fails_is_an_error_of_the_portal(database: Database, tmp_path: Path) -> None:
    with database.transaction() as tx:
        tx.exec_driver_sql("ALTER TABLE devices RENAME TO gone")
    with pytest.raises(DatabaseUnavailable):
        database.answer(_ASKED, {"wanted": "d1"})


@pytest.mark.parametrize("content", [None, b"no database, and longer than a page's header is" * 100])
def test_a_question_for_which_no_connection_can_be_opened_is_an_error_of_the_portal(
    database: Database, tmp_path: Path, content: bytes | None
) -> None:
    database.engine.dispose()
    for left in tmp_path.glob("portal.db*"):
        left.unlink()
    if content is None:
        (tmp_path / "portal.db").mkdir()
    else:
        (tmp_path / "portal.db").write_bytes(content)
    with pytest.raises(DatabaseUnavailable):
        database.answer(_ASKED, {"wanted": "d1"})


def test_nothing_is_written_once_the_transaction_has_ended(database: Database) -> None:
    insert = Prepared(sa.insert(Device))

    def work(tx: Connection) -> None:
        insert.run(tx, [{**DEVICE, "id": "d2"}])
        execute(tx.connection, "ROLLBACK")  # as SQLite does of its own accord where the disk is full
        insert.run(tx, [{**DEVICE, "id": "d3"}])

    with pytest.raises(DatabaseUnavailable):
        database.write(work)
    with database.snapshot() as tx:
        assert tx.scalars(sa.select(Device.id)).all() == ["d1"]


def test_all_rows_have_the_values_that_sqlalchemy_returns(database: Database) -> None:
    of_type = Question(sa.select(Device.id, Device.created_at).where(Device.type == sa.bindparam("wanted")))
    with database.transaction() as tx:
        tx.execute(sa.insert(Device), DEVICE | {"id": "d2"})
        rows = of_type.rows(tx, {"wanted": ""})
        assert {tuple(row) for row in rows} == {("d1", AT.astimezone(UTC)), ("d2", AT.astimezone(UTC))}
        assert of_type.rows(tx, {"wanted": "valve"}) == []
        with pytest.raises(sa.exc.MultipleResultsFound):
            of_type.within(tx, {"wanted": ""})


def test_equal_times_are_written_alike_whatever_their_zone_is(tx: Connection) -> None:
    insert = Prepared(sa.insert(Device))
    insert.run(tx, [DEVICE | {"updated_at": AT.astimezone(UTC)}])
    assert (
        len({*tx.execute(sa.select(sa.cast(Device.created_at, sa.Text), sa.cast(Device.updated_at, sa.Text))).one()})
        == 1
    )
    with pytest.raises(NaiveTimeError):
        insert.run(tx, [DEVICE | {"created_at": AT.replace(tzinfo=None)}])
