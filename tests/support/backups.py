"""What the tests of backups share: a story of devices revoked after a backup, and looks at what a restore left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa
from cryptography import x509

import db
from config import Settings
from core.files import replace_file
from core.states import DeviceStatus
from operations.backup.backup import WrittenBackup, back_up
from operations.backup.common import Restored
from operations.backup.restore import restore
from operations.wiring import Portal, open_portal, prepare
from store import copy as store_copy
from store import generations, issuers
from store.devices import update_device
from store.tables import METADATA, Certificate
from tests.support.harness import Clock
from tests.workflows.test_registration import OPERATOR, PUMP
from workflows.registration import Registered


@contextlib.contextmanager
def opened(settings: Settings, clock: Clock) -> Iterator[Portal]:
    portal = open_portal(settings, clock)
    try:
        yield portal
    finally:
        portal.close()


def bring_passphrase(source: Settings, target: Settings) -> None:
    target.secrets_dir.mkdir(mode=0o700, exist_ok=True)
    replace_file(target.secrets_dir / "ca-passphrase", (source.secrets_dir / "ca-passphrase").read_bytes())


def put_back(
    settings: Settings,
    file: Path,
    clock: Clock,
    *,
    replace: bool = True,
    keep_links: bool = False,
    crls: Sequence[Path] = (),
) -> Restored:
    return restore(settings, file, replace=replace, keep_links=keep_links, now=clock(), crl_files=crls)


def copied(settings: Settings, file: Path, clock: Clock) -> WrittenBackup:
    return back_up(settings, file, now=clock())


def contents(portal: Portal) -> dict[str, list[str]]:
    with portal.database.snapshot() as tx:
        return {name: [repr(row) for row in store_copy.rows(tx, name)] for name in store_copy.table_names()}


def all_bytes(settings: Settings) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in settings.data_dir.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != "portal.db-shm"
    }


def listed(settings: Settings) -> dict[str, x509.RevokedCertificate]:
    crl = x509.load_pem_x509_crl(settings.broker_file("crl.pem").read_bytes())
    return {f"{entry.serial_number:x}": entry for entry in crl}


def crl_number(settings: Settings) -> int:
    crl = x509.load_pem_x509_crl(settings.broker_file("crl.pem").read_bytes())
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def status_of(portal: Portal, device: Registered) -> DeviceStatus:
    with portal.database.snapshot() as tx:
        return db.get_device(tx, "default", device.device_id).status


class Story:
    """Three devices in a copy; since then one was revoked, one suspended, another registered."""

    def __init__(self, settings: Settings, file: Path, clock: Clock) -> None:
        self.settings, self.file, self.clock = settings, file, clock
        with opened(settings, clock) as portal:
            prepare(portal)
            self.stays, self.goes, self.held = (portal.registrations.register(OPERATOR, PUMP) for _ in range(3))
            copied(settings, file, clock)
            clock.advance(minutes=5)
            self.late = portal.registrations.register(OPERATOR, PUMP)
            self.late_and_gone = portal.registrations.register(OPERATOR, PUMP)
            for device in (self.goes, self.late_and_gone):
                portal.revocations.revoke(OPERATOR, device.device_id, "key_compromise")
            with portal.database.transaction() as tx:
                generation = db.next_generation(tx, at=clock())
                values = {"status": "suspended", "updated_at": clock(), "generation": generation}
                update_device(tx, "default", self.held.device_id, values)
                held = sa.update(Certificate).where(Certificate.device_id == self.held.device_id)
                tx.execute(held.values(status="held", revoked_at=clock(), revocation_reason="certificate_hold"))
                issuers.touch_issuer(tx, 2, generation=generation)
            portal.reconciler.install()
            with portal.database.snapshot() as tx:
                self.generation = generations.get_broker_state(tx).generation
        self.number = crl_number(settings)
        self.on_crl = listed(settings)
        clock.advance(minutes=5)

    def put_back(self) -> Restored:
        return put_back(self.settings, self.file, self.clock)


def lose_the_database(settings: Settings) -> None:
    if settings.database_url.startswith("sqlite"):
        for path in settings.data_dir.glob("portal.db*"):
            path.write_bytes(b"torn" * 1000)
    else:
        engine = sa.create_engine(settings.database_owner_url)
        METADATA.drop_all(engine)
        with engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE alembic_version"))
        engine.dispose()
