"""The database refuses by itself what must never be, and keeps what it acknowledged."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

import db
from config import Settings
from core.errors import DatabaseTooNew, DatabaseUnavailable, DeviceNotFound, StartupError
from core.states import DeviceStatus
from core.topics import is_device_id
from operations.wiring import Portal, open_portal
from store import brokers, devices, generations, issuers, schema, tenants
from store import database as database_module
from store.database import Database
from store.devices import DeviceFilter
from store.tables import METADATA, AclEntry, AuditEntry, Certificate, Delivery, Device
from tests.support.harness import as_owner

NOW = datetime(2027, 1, 1, tzinfo=UTC)


def add_device(tx: Connection, **values: Any) -> str:
    device_id = str(uuid.uuid4())
    defaults: dict[str, Any] = {
        "tenant_id": "default",
        "device_id": device_id,
        "name": "pump-1",
        "type": "pump",
        "location": "hall 1",
        "firmware": "1.0",
        "metadata": {},
        "status": DeviceStatus.ACTIVE,
        "topics": None,
        "created_at": NOW,
        "generation": 1,
    }
    db.add_device(tx, **(defaults | values))
    return str(values.get("device_id", device_id))


def add_certificate(tx: Connection, device_id: str | None, **values: Any) -> int:
    defaults: dict[str, Any] = {
        "tenant_id": "default",
        "issuer_id": 2,
        "device_id": device_id,
        "purpose": "device",
        "serial_number": uuid.uuid4().hex,
        "fingerprint": uuid.uuid4().hex,
        "der": b"\x30",
        "not_before": NOW,
        "not_after": NOW + timedelta(days=1),
        "issued_at": NOW,
    }
    return db.add_certificate(tx, **(defaults | values))


def refused(portal: Portal, statement: Callable[[Connection], object]) -> str:
    """Run a statement in a transaction that must fail, and return what the database says."""
    with pytest.raises(DBAPIError) as caught, portal.database.transaction() as tx:
        statement(tx)
    return str(caught.value.orig)


@pytest.mark.parametrize(
    ("values", "constraint"),
    [
        ({"status": "gone"}, "status"),
        ({"status": "revoked"}, "_devices_revo"),
        ({"revoked_at": NOW, "revocation_reason": "unspecified"}, "_devices_revo"),
        ({"id": "too short"}, "id_is_uuid"),
        ({"tenant_id": "nobody"}, ""),
    ],
)
def test_a_device_in_an_impossible_state_is_refused(portal: Portal, values: dict[str, Any], constraint: str) -> None:
    with portal.database.transaction() as tx:
        device_id = add_device(tx)
    said = refused(portal, lambda tx: tx.execute(sa.update(Device).where(Device.id == device_id).values(values)))
    assert constraint in said


def test_a_device_has_one_active_certificate(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        device_id = add_device(tx)
        add_certificate(tx, device_id)
    refused(portal, lambda tx: add_certificate(tx, device_id))


def test_a_serial_number_is_used_once_by_an_issuer(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        add_certificate(tx, add_device(tx), serial_number="ab" * 20)
    refused(portal, lambda tx: add_certificate(tx, add_device(tx), serial_number="ab" * 20))


@pytest.mark.parametrize(
    "values",
    [
        {"purpose": "device", "device_id": None},
        {"purpose": "canary"},
        {"purpose": "anything"},
        {"not_after": NOW},
        {"issuer_id": 999},
        {"revoked_at": NOW},
    ],
)
def test_a_certificate_that_contradicts_itself_is_refused(portal: Portal, values: dict[str, Any]) -> None:
    with portal.database.transaction() as tx:
        device_id = add_device(tx)
    refused(portal, lambda tx: add_certificate(tx, **({"device_id": device_id} | values)))


def test_a_certificate_belongs_to_the_tenant_of_its_device(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "another", created_at=NOW)
        device_id = add_device(tx)
    refused(portal, lambda tx: add_certificate(tx, device_id, tenant_id="another"))


def test_revoked_is_final_in_the_database_itself(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        device_id = add_device(tx)
        add_certificate(tx, device_id)
        db.revoke_device(tx, "default", device_id, revoked_at=NOW, reason="superseded", generation=2)
    back = {"status": "active", "revoked_at": None, "revocation_reason": None}
    device = sa.update(Device).where(Device.id == device_id).values(back)
    certificate = sa.update(Certificate).where(Certificate.device_id == device_id).values(back)
    assert "revoked is final" in refused(portal, lambda tx: tx.execute(device))
    assert "revoked is final" in refused(portal, lambda tx: tx.execute(certificate))


def test_the_audit_record_is_append_only(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        assert tx.execute(sa.select(sa.func.count()).select_from(AuditEntry)).scalar_one() > 0
    assert "append-only" in refused(portal, lambda tx: tx.execute(sa.update(AuditEntry).values(actor="nobody")))
    assert "append-only" in refused(portal, lambda tx: tx.execute(sa.delete(AuditEntry)))


def test_a_bundle_stays_only_while_its_link_is_open(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        device_id = add_device(tx)
        certificate_id = add_certificate(tx, device_id)
        values = {"id": "1" * 32, "tenant_id": "default", "device_id": device_id, "certificate_id": certificate_id}
        times = {"created_at": NOW, "expires_at": NOW}
        tx.execute(sa.insert(Delivery), {**values, **times, "status": "ready", "bundle": b"PK"})
    said = refused(portal, lambda tx: tx.execute(sa.update(Delivery).values(status="delivered")))
    assert "bundle" in said


def test_a_topic_is_listed_once_for_a_device(portal: Portal) -> None:
    refused(portal, lambda tx: add_device(tx, topics=[("devices/{id}/a", "read"), ("devices/{id}/a", "write")]))
    refused(portal, lambda tx: add_device(tx, topics=[("devices/{id}/a", "everything")]))
    with portal.database.snapshot() as tx:
        assert tx.execute(sa.select(sa.func.count()).select_from(AclEntry)).scalar_one() == 0


def test_the_applied_generation_is_never_ahead_of_the_newest_and_never_goes_back(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        newest = db.next_generation(tx, at=NOW)
        brokers.set_applied_generation(tx, 1, newest, applied_at=NOW)
        brokers.set_applied_generation(tx, 1, newest - 1, applied_at=NOW)
        assert generations.get_broker_state(tx).applied_generation == newest
    refused(portal, lambda tx: brokers.set_applied_generation(tx, 1, newest + 1, applied_at=NOW))


def test_a_transaction_that_fails_leaves_nothing(portal: Portal) -> None:
    device_id = str(uuid.uuid4())

    def fail(tx: Connection) -> None:
        add_device(tx, device_id=device_id)
        add_device(tx, device_id=device_id)

    refused(portal, fail)
    with portal.database.snapshot() as tx, pytest.raises(DeviceNotFound):
        db.get_device(tx, "default", device_id)


def test_times_without_a_zone_are_refused(portal: Portal) -> None:
    with pytest.raises(ValueError, match="without a zone"), portal.database.transaction() as tx:
        add_device(tx, created_at=datetime(2027, 1, 1))  # noqa: DTZ001 - the mistake under test


def test_times_come_back_in_utc_to_the_microsecond(portal: Portal) -> None:
    created_at = datetime(2027, 1, 1, 12, 30, 15, 123456, tzinfo=UTC)
    with portal.database.transaction() as tx:
        device_id = add_device(tx, created_at=created_at)
        assert db.get_device(tx, "default", device_id).created_at == created_at


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (DeviceFilter(), ["c", "b", "a"]),
        (DeviceFilter(status="active"), ["c", "b", "a"]),
        (DeviceFilter(status="revoked"), []),
        (DeviceFilter(type="valve"), ["b"]),
        (DeviceFilter(location="hall 2"), ["c"]),
        (DeviceFilter(q="B"), ["b"]),
        (DeviceFilter(q="%"), []),
        (DeviceFilter(q="_"), []),
        (DeviceFilter(expires_before=NOW + timedelta(days=2)), ["a"]),
    ],
)
def test_devices_are_found_newest_first_by_every_filter(portal: Portal, wanted: DeviceFilter, found: list[str]) -> None:
    with portal.database.transaction() as tx:
        for number, (name, kind, place) in enumerate(
            [("a", "pump", "hall 1"), ("b", "valve", "hall 1"), ("c", "pump", "hall 2")]
        ):
            device_id = add_device(tx, name=name, type=kind, location=place, created_at=NOW + timedelta(hours=number))
            add_certificate(tx, device_id, not_after=NOW + timedelta(days=1 + 2 * number))
        listed = devices.list_devices(tx, "default", wanted, limit=10)
    assert [device.name for device, *_ in listed.devices] == found


def test_pages_hold_every_device_once_even_where_times_are_equal(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        wanted = {add_device(tx) for _ in range(7)}
        seen: list[str] = []
        after = None
        while page := devices.list_devices(tx, "default", DeviceFilter(), limit=3, after=after).devices:
            seen += [device.id for device, *_ in page]
            after = (page[-1][0].created_at, page[-1][0].id)
    assert len(seen) == 7
    assert set(seen) == wanted


def test_devices_that_end_soon_are_paged_by_their_end(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        ends = {}
        for days in (5, 1, 3, 1, 4, 9):
            device_id = add_device(tx)
            add_certificate(tx, device_id, not_after=NOW + timedelta(days=days))
            ends[device_id] = NOW + timedelta(days=days)
        wanted, seen = DeviceFilter(expires_before=NOW + timedelta(days=6)), []
        after = None
        while page := devices.list_devices(tx, "default", wanted, limit=2, after=after).devices:
            seen += [(end, device.id) for device, end, *_ in page]
            after = (page[-1][1] or NOW, page[-1][0].id)
    assert seen == sorted((end, device_id) for device_id, end in ends.items() if end < NOW + timedelta(days=6))


def test_a_crl_with_a_number_that_is_not_higher_changes_nothing(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        newest = issuers.get_crl(tx, 2)
        assert newest is not None
        assert not issuers.put_crl(tx, newest)


def test_a_token_is_found_by_its_hash_only(portal: Portal) -> None:
    with portal.database.snapshot() as tx:
        columns = {column["name"] for column in sa.inspect(tx).get_columns("tokens")}
        assert tenants.find_token(tx, "0" * 64) is None
    assert "token_hash" in columns
    assert "token" not in columns


# --- Schema and engine --------------------------------------------------------------------------------------------


def test_the_migrations_make_what_the_tables_say(portal: Portal) -> None:
    with portal.database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_each_migration_continues_the_one_whose_number_is_before_its_own() -> None:
    scripts = ScriptDirectory(str(schema.MIGRATIONS)).walk_revisions()
    assert [script.revision for script in scripts] == schema.revisions()[::-1]


def test_a_database_from_a_newer_version_is_refused(portal: Portal) -> None:
    with as_owner(portal) as tx:
        tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseTooNew, match="newer version"):
        portal.database.migrate()


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path / 'portal.db'}", folder=tmp_path, threads=2)
    database.migrate()
    return database


@pytest.mark.parametrize(
    ("pragma", "value"),
    [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("secure_delete", 1)],
)
def test_sqlite_is_durable_and_strict(sqlite: Database, pragma: str, value: object) -> None:
    with sqlite.snapshot() as tx:
        assert tx.exec_driver_sql(f"PRAGMA {pragma}").scalar_one() == value
    sqlite.close()


def test_the_sqlite_file_is_readable_by_its_owner_only(sqlite: Database, tmp_path: Path) -> None:
    with sqlite.transaction() as tx:
        tx.execute(sa.text("SELECT 1"))
    sqlite_files = list(tmp_path.glob("portal.db*"))
    assert sqlite_files
    assert all(path.stat().st_mode & 0o077 == 0 for path in sqlite_files)
    sqlite.close()


def test_a_lock_held_by_another_program_is_a_clear_error(
    sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_SECONDS", 0.0)
    impatient = Database(f"sqlite:///{tmp_path / 'portal.db'}", folder=tmp_path, threads=1)
    other = sqlite3.connect(tmp_path / "portal.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailable, match="try again"), impatient.transaction():
        pass
    other.execute("ROLLBACK")
    with impatient.transaction() as tx:
        tenants.add_tenant(tx, "default", created_at=NOW)
    other.close()
    impatient.close()
    sqlite.close()


def test_a_url_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError):
        Database("sqlite+nothing:///x", folder=tmp_path, threads=1)


def test_an_error_of_the_database_does_not_show_what_was_sent(portal: Portal) -> None:
    with pytest.raises(IntegrityError, match="SQL parameters hidden"), portal.database.transaction() as tx:
        add_certificate(tx, None)


def test_two_portals_on_one_new_data_folder_become_one(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    first, second = open_portal(settings), open_portal(settings)
    assert first.authority.first.ca_pem == second.authority.first.ca_pem
    first.close()
    second.close()


def test_a_new_device_id_is_a_uuid_of_version_7_that_begins_with_the_time() -> None:
    made = uuid.UUID(db.new_device_id(datetime(2027, 1, 31, 12, tzinfo=UTC)))
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert datetime.fromtimestamp((made.int >> 80) / 1000, UTC) == datetime(2027, 1, 31, 12, tzinfo=UTC)
    assert is_device_id(str(made))


def test_ids_made_at_the_same_time_differ() -> None:
    now = datetime(2027, 1, 31, tzinfo=UTC)
    assert len({db.new_device_id(now) for _ in range(1000)}) == 1000
