"""Makes a fleet by writing its rows: a million devices in the time that the portal registers some thousands."""

from __future__ import annotations

import contextlib
import random
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import IssuerKind, PresenceState
from store.database import Base, Database
from store.quotas import recount_clients
from store.tables import Certificate, Device, IssuerRow, Presence
from tests.support.brokers import enforce_all

TENANT = "default"
TYPES, LOCATIONS = 20, 200
RARE = "rare"  # the type and the location of every hundred-thousandth device, and of the first
BATCH = 10_000
CERTIFICATE_BYTES = 620  # what a certificate of the portal has


def add_fleet(data: Path, devices: int, *, revoked: int = 0, url: str = "", per_device: bool = False) -> None:
    """Write ``devices`` devices with a certificate each, the first ``revoked`` of them revoked a day ago.

    ``data`` is the data folder of a portal that was made and does not run; ``url`` its database where that is not
    the folder's own. ``per_device`` says that the broker must learn of each of them.
    """
    database = Database(url or f"sqlite:///{data / 'portal.db'}", folder=data, threads=1)
    chance = random.Random(devices)  # noqa: S311 - the same fleet each time, no secret
    now = datetime.now(UTC)
    with database.snapshot() as tx:
        issuer_id = tx.execute(sa.select(IssuerRow.id).where(IssuerRow.kind == IssuerKind.ISSUING)).scalars().first()
    with database.transaction() as tx:
        if database.is_sqlite:  # keys are random, so that each page is needed again: none is written before the end
            tx.exec_driver_sql("PRAGMA cache_size = -2000000")
        for start in range(0, devices, BATCH):
            rows = [
                _rows(chance, number, now, issuer_id, is_out=number < revoked, generation=int(per_device))
                for number in range(start, min(start + BATCH, devices))
            ]
            _insert(tx, Device, [device for device, _ in rows])
            _insert(tx, Certificate, [certificate for _, certificate in rows])
            _insert(tx, Presence, [_presence_of(device) for device, _ in rows])
        recount_clients(tx)
    with database.transaction() as tx:
        # As long ago as the revocations are: the broker has obeyed them.
        enforce_all(tx)
        if revoked:
            tx.execute(sa.update(IssuerRow).where(IssuerRow.id == issuer_id).values(revoked_generation=1))
    if not database.is_sqlite:
        with contextlib.closing(database.engine.raw_connection()) as connection:
            driver: Any = connection.driver_connection  # outside a transaction
            driver.execute("VACUUM ANALYZE devices, certificates, presences")
    database.close()


def _insert(tx: Connection, of: type[Base], rows: list[dict[str, Any]]) -> None:
    """Insert rows that have the same columns, on PostgreSQL by COPY, which takes a third of the time."""
    if tx.dialect.name == "sqlite":
        tx.execute(sa.insert(of), rows)
        return
    table: Any = of.__table__
    columns = [table.c[name] for name in rows[0]]
    kinds = [column.type.dialect_impl(tx.dialect).bind_processor(tx.dialect) for column in columns]
    names = ", ".join(f'"{column.name}"' for column in columns)
    driver: Any = tx.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(f"COPY {table.name} ({names}) FROM STDIN") as copy:
        for row in rows:
            values = [row[name] for name in rows[0]]
            copy.write_row([kind(value) if kind else value for kind, value in zip(kinds, values, strict=True)])


def _presence_of(device: dict[str, Any]) -> dict[str, Any]:
    since = device["created_at"]
    return {"tenant_id": TENANT, "identity": device["id"], "state": int(PresenceState.NEVER_SEEN), "since": since}


def _rows(
    chance: random.Random, number: int, now: datetime, issuer_id: int | None, *, is_out: bool, generation: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    rare = number % 100_000 == 0
    at = now - timedelta(days=2) + timedelta(milliseconds=100 * number / 1000)
    out: dict[str, Any] = {"revoked_at": None, "revocation_reason": None}
    if is_out:
        out = {"revoked_at": now - timedelta(days=1), "revocation_reason": "superseded"}
    device_id = str(uuid.UUID(int=chance.getrandbits(128), version=4))
    device = {
        "id": device_id,
        "tenant_id": TENANT,
        "external_id": None,
        "name": f"{'pump' if number % 2 else 'valve'}-{number:07}",
        "type": RARE if rare else f"type {number % TYPES}",
        "location": RARE if rare else f"hall {number % LOCATIONS}",
        "firmware": "1.0",
        "metadata": {"line": 4},
        "own_topics": False,
        "status": "revoked" if is_out else "active",
        "created_at": at,
        "updated_at": at,
        "generation": 1 if is_out else generation,
        **out,
    }
    certificate = {
        "tenant_id": TENANT,
        "issuer_id": issuer_id,
        "device_id": device_id,
        "purpose": "device",
        "serial_number": f"{1 << 158 | chance.getrandbits(158):040x}",
        "fingerprint": f"{chance.getrandbits(256):064x}",
        "der": chance.randbytes(CERTIFICATE_BYTES),
        "not_before": at,
        "not_after": at + timedelta(days=365 if number % 50 else 30 + number % 300),
        "issued_at": at,
        "status": "revoked" if is_out else "active",
        **out,
    }
    return device, certificate
