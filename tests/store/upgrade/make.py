"""Make the data folders that tests/store/test_upgrade.py opens, with the code of the commit named in README.md.

Run it in a checkout of that commit:

    PYTHONPATH=. python …/make.py sqlite.tar.gz
    PYTHONPATH=. python …/make.py postgresql.tar.gz postgresql+psycopg://user@/an_empty_database?host=/socket
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tarfile
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.serialization import Encoding

UNNEEDED = (".lock", "-shm", "-wal")


class Clock:
    """The time of the portal."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC).replace(microsecond=0)

    def __call__(self) -> datetime:
        return self.now


def old(module: str) -> Any:
    """A module of the old code."""
    return importlib.import_module(module)


def path_of(registered: dict[str, Any]) -> str:
    """The path of a download link."""
    return "/download/" + str(registered["download_url"]).rpartition("/")[2]


def fill(app: Any, api: Any, clock: Clock) -> dict[str, Any]:
    """Leave rows in every table; return what the test must know."""

    def registered(name: str, **fields: Any) -> dict[str, Any]:
        clock.now += timedelta(minutes=1)
        answer: dict[str, Any] = api.register(name=name, **fields)
        return answer

    def done(answer: Any) -> Any:
        assert answer.status_code < 300, answer.text
        clock.now += timedelta(minutes=1)
        return answer.json

    portal = old("app").portal_of(app)
    done(api.post("/webhooks", {"name": "inventory", "url": "https://inventory.example.com/events"}))
    fields = {"name": "repeated", "type": "pump", "location": "hall 1", "firmware": "1.0"}
    repeated = done(api.post("/register", fields, headers={"Idempotency-Key": "an-idempotency-key"}))
    topics = [{"filter": "devices/{id}/status", "access": "write"}, {"filter": "devices/hall-1/#", "access": "read"}]
    devices = {
        "active": registered("active"),
        "own_topics": registered("own topics", topics=topics, external_id="asset-1"),
        "revoked": registered("revoked"),
        "suspended": registered("suspended"),
        "renewed": registered("renewed"),
        "expiring": registered("expiring", validity_days=1),
        "pending": registered("pending bundle"),
        "repeated": repeated,
        "interrupted": registered("interrupted fetch"),
    }
    for name in ("active", "renewed", "suspended"):
        clock.now += timedelta(minutes=1)
        answer = api.client.get(path_of(devices[name]))
        assert answer.data
        answer.close()
    done(api.post(f"/revoke/{devices['revoked']['device_id']}", {"reason": "key_compromise"}))
    done(api.post(f"/devices/{devices['suspended']['device_id']}/suspend", {}))
    done(api.post(f"/devices/{devices['renewed']['device_id']}/renew", {}))
    enrol(api, done)
    clock.now += timedelta(hours=20)  # past two thirds of one day
    old("jobs_events").announce_expiring(portal)
    portal.enforcement.install()
    answer = api.client.get(path_of(devices["interrupted"]), buffered=False)
    assert answer.status_code == 200  # and nobody reads it, so that the fetch is left unfinished
    return {name: device["device_id"] for name, device in devices.items()} | {
        "path": path_of(devices["pending"]),
        "interrupted_path": path_of(devices["interrupted"]),
        "password": devices["pending"]["bundle_password"],
    }


def enrol(api: Any, done: Any) -> None:
    """Enrol devices by a token and by a manufacturer, and leave requests that wait for an operator."""
    est, pki = old("tests.est"), old("tests.pki")
    token = done(api.post("/enrolment-tokens", {"name": "a batch", "type": "pump"}))["token"]
    est.certificates_of(est.Device(api, token).enrol())
    token = done(api.post("/enrolment-tokens", {"name": "by hand", "type": "pump", "approval": "operator"}))["token"]
    assert est.Device(api, token).enrol().status_code == 202
    maker = pki.Authority("A maker's CA")
    certificate = maker.certificate.public_bytes(pki.PEM).decode()
    record = done(api.post("/manufacturers", {"name": "A maker", "certificate": certificate}))
    proof = maker.issue(record["nonce"]).certificate.public_bytes(pki.PEM).decode()
    done(api.post(f"/manufacturers/{record['manufacturer_id']}/proof", {"certificate": proof}))
    device = est.Device(api, certificate=maker.issue("sn-1").certificate.public_bytes(Encoding.DER))
    est.certificates_of(device.enrol())
    assert device.enrol(est.csr_der()).status_code == 202  # again, with another key


def check_filled(engine: sa.Engine) -> None:
    """Raise ``AssertionError`` if a table is empty."""
    with engine.connect() as connection:
        for name in sa.inspect(connection).get_table_names():
            count = connection.execute(sa.text(f'SELECT count(*) FROM "{name}"')).scalar_one()  # noqa: S608 - a table
            print(f"{name}: {count}")
            assert count, name


def main() -> None:
    """Make one archive."""
    output, url = Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else ""
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data"
        environment = {"PORTAL_DATABASE_URL": url} if url else {}
        settings = old("tests.harness").settings_for(folder, **environment)
        portal = old("installation").open_portal(settings, clock)
        old("installation").prepare(portal)
        token = old("installation").first_token(portal)
        portal.close()
        app = old("app").create_app(settings, background=False, clock=clock)
        known = fill(app, old("tests.harness").Api(app.test_client(), token), clock)
        check_filled(old("app").portal_of(app).database.engine)
        old("app").portal_of(app).close()
        facts = known | {"token": token, "now": clock.now.isoformat()}
        (Path(place) / "facts.json").write_text(json.dumps(facts, indent=1))
        if url:
            place_url = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
            command = ["pg_dump", "--no-owner", "--no-privileges", "--inserts", place_url]
            dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            lines = [line for line in dump.splitlines() if line and not line.startswith(("--", "\\"))]
            (Path(place) / "dump.sql").write_text("\n".join(lines))
        else:
            with sa.create_engine(f"sqlite:///{folder / 'portal.db'}").connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        with tarfile.open(output, "w:gz") as archive:
            archive.add(place, ".", filter=lambda file: None if file.name.endswith(UNNEEDED) else file)


if __name__ == "__main__":
    main()
