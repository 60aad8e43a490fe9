"""A data folder of an older version, with rows in every table, is opened, migrated and used: see upgrade/README.md."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pyzipper
import sqlalchemy as sa
from cryptography import x509
from flask import Flask

from app import create_app, portal_of
from operations.wiring import Portal
from store import audit
from store.tables import METADATA, Certificate, Device, DeviceKey
from tests.conftest import DATABASES
from tests.support.databases import postgres_database
from tests.support.harness import Api, problem_of, settings_for
from tests.support.mosquitto import short_folder

ARCHIVES = Path(__file__).parent / "upgrade"
_FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on


class StoppedClock:
    """A clock that shows the time at which the folder was left."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(params=DATABASES)
def left(request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """The folder of the older version beside its facts, with the URL of its database (empty for SQLite)."""
    place = short_folder()
    with tarfile.open(ARCHIVES / f"{request.param}.tar.gz") as archive:
        archive.extractall(place, **_FILTER)  # noqa: S202 - our own archive
    if request.param == "sqlite":
        yield place, ""
    else:
        with postgres_database() as url:
            with psycopg.connect(sa.make_url(url).set(drivername="postgresql").render_as_string(False)) as connection:
                connection.execute((place / "dump.sql").read_bytes())
            yield place, url
    shutil.rmtree(place)


@pytest.fixture
def facts(left: tuple[Path, str]) -> dict[str, str]:
    """Ids of devices by what was done to them, the operator's token, a link with its password, and the time."""
    known: dict[str, str] = json.loads((left[0] / "facts.json").read_text())
    return known


@pytest.fixture
def clock(facts: dict[str, str]) -> StoppedClock:
    return StoppedClock(datetime.fromisoformat(facts["now"]))


@pytest.fixture
def app(left: tuple[Path, str], clock: StoppedClock) -> Iterator[Flask]:
    folder, url = left
    environment = {"PORTAL_DATABASE_URL": url} if url else {}
    built = create_app(settings_for(folder / "data", **environment), background=False, clock=clock)
    yield built
    portal_of(built).close()


@pytest.fixture
def portal(app: Flask) -> Portal:
    return portal_of(app)


@pytest.fixture
def api(app: Flask, facts: dict[str, str]) -> Api:
    return Api(app.test_client(), facts["token"])


@pytest.fixture
def anyone(app: Flask) -> Api:
    return Api(app.test_client(), None)


def rows_of(url: str) -> dict[str, int]:
    """How many rows each table has."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        names = [name for name in sa.inspect(connection).get_table_names() if name != "alembic_version"]
        counts = {
            name: connection.execute(sa.select(sa.func.count()).select_from(sa.table(name))).scalar_one()
            for name in names
        }
    engine.dispose()
    return counts


def serials_on_crls(portal: Portal) -> set[str]:
    """The serial numbers on the CRLs that the broker is given."""
    blocks = (portal.settings.broker_dir / "crl.pem").read_bytes().split(b"-----BEGIN X509 CRL-----")[1:]
    lists = [x509.load_pem_x509_crl(b"-----BEGIN X509 CRL-----" + block) for block in blocks]
    return {f"{entry.serial_number:x}" for one in lists for entry in one}


def certificates_of(api: Api, device_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.get(f"/devices/{device_id}/certificates").json["certificates"]
    return found


def test_every_row_of_the_older_version_is_kept_and_can_be_read(
    left: tuple[Path, str], request: pytest.FixtureRequest
) -> None:
    folder, url = left
    before = rows_of(url or f"sqlite:///{folder / 'data' / 'portal.db'}")
    assert all(before.values())
    portal: Portal = request.getfixturevalue("portal")  # which migrates the database
    with portal.database.snapshot() as tx:
        for name, count in before.items():
            rows = tx.execute(sa.select(METADATA.tables[name])).all()  # as today's types read them
            assert len(rows) >= count, name


def test_devices_keep_their_states_topics_and_certificates(api: Api, facts: dict[str, str]) -> None:
    listed = {device["device_id"]: device for device in api.get("/devices?limit=100").json["devices"]}
    assert len(listed) == 12
    states = {name: listed[facts[name]]["status"] for name in ("active", "revoked", "suspended", "renewed", "pending")}
    assert states == {
        "active": "active",
        "revoked": "revoked",
        "suspended": "suspended",
        "renewed": "active",
        "pending": "active",
    }
    own = api.get(f"/devices/{facts['own_topics']}").json
    assert (own["external_id"], [topic["access"] for topic in own["topics"]]) == ("asset-1", ["write", "read"])
    assert [one["status"] for one in certificates_of(api, facts["renewed"])] == ["active", "replaced"]
    assert [one["status"] for one in certificates_of(api, facts["suspended"])] == ["held"]
    assert len(api.get("/enrolments").json["enrolments"]) == 2
    assert [one["status"] for one in api.get("/manufacturers").json["manufacturers"]] == ["registered"]
    [webhook] = api.get("/webhooks").json["webhooks"]
    assert webhook["waiting"] > 10


def test_a_device_is_revoked_and_the_crl_holds_it_beside_those_revoked_before(
    api: Api, portal: Portal, facts: dict[str, str]
) -> None:
    before = {certificates_of(api, facts[name])[0]["serial_number"] for name in ("revoked", "suspended")}
    assert api.post(f"/revoke/{facts['active']}", {"reason": "key_compromise"}).status_code in (200, 202)
    portal.reconciler.install()
    now = {certificates_of(api, facts["active"])[0]["serial_number"]}
    assert serials_on_crls(portal) >= before | now
    assert api.get(f"/devices/{facts['active']}").json["status"] == "revoked"


def test_a_device_is_renewed_and_one_is_resumed_and_one_is_registered(api: Api, facts: dict[str, str]) -> None:
    assert api.post(f"/devices/{facts['active']}/renew", {}).status_code == 201
    assert [one["status"] for one in certificates_of(api, facts["active"])] == ["active", "replaced"]
    assert api.post(f"/devices/{facts['suspended']}/resume", {}).status_code in (200, 202)
    assert [one["status"] for one in certificates_of(api, facts["suspended"])] == ["active"]
    assert api.register(name="new")["status"] == "active"


def test_a_pending_bundle_is_delivered_once(anyone: Api, facts: dict[str, str]) -> None:
    answer = anyone.get(facts["path"])
    assert answer.status_code == 200
    with pyzipper.AESZipFile(io.BytesIO(answer.data)) as bundle:
        bundle.setpassword(facts["password"].encode())
        assert b"PRIVATE KEY" in bundle.read("device.key")
    problem_of(anyone.get(facts["path"]), 410, "link_used")


def test_a_fetch_that_the_older_version_left_unfinished_stays_closed_and_expires(
    anyone: Api, portal: Portal, facts: dict[str, str], clock: StoppedClock
) -> None:
    problem_of(anyone.get(facts["interrupted_path"]), 410, "link_used")
    clock.now += timedelta(hours=1)
    problem_of(anyone.get(facts["interrupted_path"]), 410, "link_expired")


def test_an_answer_of_before_opens_for_nobody_since_nothing_says_whose_it_is_and_makes_no_second_device(
    api: Api,
) -> None:
    before = len(api.get("/devices?limit=100").json["devices"])
    fields = {"name": "repeated", "type": "pump", "location": "hall 1", "firmware": "1.0"}
    answer = api.post("/register", fields, headers={"Idempotency-Key": "an-idempotency-key"})
    problem_of(answer, 409, "idempotency_conflict")
    assert len(api.get("/devices?limit=100").json["devices"]) == before


def test_the_audit_record_continues_soundly(api: Api, portal: Portal) -> None:
    api.register()
    with portal.database.snapshot() as tx:
        verdict = audit.verify(tx, portal.first_tenant)
    assert verdict.problem is None


def test_keys_that_were_compromised_before_the_upgrade_are_blocked(portal: Portal, facts: dict[str, str]) -> None:
    with portal.database.snapshot() as tx:
        keys = {row.device_id: row.compromised_at for row in tx.execute(sa.select(DeviceKey))}
        revoked = tx.execute(sa.select(Device).where(Device.id == facts["revoked"])).one()
        devices = set(tx.execute(sa.select(Certificate.device_id).where(Certificate.device_id.is_not(None))).scalars())
    assert set(keys) == devices
    assert keys[facts["active"]] is None
    assert revoked.revocation_reason == "key_compromise"
    assert keys[facts["revoked"]] == revoked.revoked_at
