"""One tenant is backed up and restored alone: renumbered among the rows of others, which stay byte for byte."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

import db
from app import create_app
from config import Settings
from core.broker_control import JOURNAL_FILE, RECORD_FILE, ControlKind
from core.errors import BackupRefused, GuardNeeded
from core.states import DeviceStatus
from core.tenants import TenantStatus
from operations.backup import tenant_restore
from operations.backup.archive import Backup
from operations.backup.backup import back_up
from operations.backup.common import Restored
from operations.backup.revocations import GuardRefusals
from operations.backup.tenant_restore import restore_tenant
from operations.wiring import Portal, prepare
from pki.algorithms import certificate_key_fingerprint
from store import audit, issuers, keys, tenant_copy, tenants
from store import copy as store_copy
from store.audit import Actor
from store.profile_tables import DeviceName
from store.scope import ALL_TENANTS
from store.tables import METADATA, Certificate, Device, IssuerRow, Tenant, Webhook
from tests.operations.backup.test_restore_journal import is_whole, killed
from tests.support.backups import copied, opened, put_back
from tests.support.harness import ON_SQLITE, Clock, key_path
from tests.support.tenants import add_tenant
from tests.workflows.test_registration import OPERATOR, PUMP

ACME, GLOBEX = (dataclasses.replace(OPERATOR, tenant_id=name) for name in ("acme", "globex"))


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_ENFORCE_TIMEOUT="1")


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    return tmp_path / "acme.backup"


def back_up_acme(settings: Settings, alone: Path, clock: Clock) -> None:
    back_up(settings, alone, now=clock(), tenant_id="acme")


def put_acme_back(
    settings: Settings, alone: Path, clock: Clock, *, replace: bool = True, crls: tuple[Path, ...] = ()
) -> Restored:
    return restore_tenant(settings, alone, "acme", replace=replace, keep_links=False, now=clock(), crl_files=crls)


def register(portal: Portal, actor: Actor) -> str:
    return portal.registrations.register(actor, PUMP).device_id


def status_of(portal: Portal, device_id: str) -> DeviceStatus:
    with portal.database.snapshot() as tx:
        return db.get_device(tx, "acme", device_id).status


def rows_of_others(portal: Portal) -> dict[str, list[str]]:
    """All rows but acme's, without what the installation counts: the generation, and the first tenant's record."""
    with portal.database.snapshot() as tx:
        found = {
            name: [repr(row) for row in store_copy.rows(tx, name) if store_copy.owner_of(name, row) != "acme"]
            for name in store_copy.table_names("any")
        }
    found["audit_entries"] = [row for row in found["audit_entries"] if "'tenant_id': 'default'" not in row]
    found["audit_heads"] = [row for row in found["audit_heads"] if "'tenant_id': 'default'" not in row]
    return found


def state(portal: Portal) -> dict[str, list[str]]:
    with portal.database.snapshot() as tx:
        return {name: [repr(row) for row in store_copy.rows(tx, name)] for name in store_copy.table_names()}


class Fleet:
    """Two tenants; since acme's backup one device was revoked, one suspended, one registered, a webhook deleted."""

    def __init__(self, settings: Settings, alone: Path, clock: Clock) -> None:
        with opened(settings, clock) as portal:
            prepare(portal)
            for name in ("acme", "globex"):
                add_tenant(portal, name)
            self.stays, self.goes, self.held = (register(portal, ACME) for _ in range(3))
            register(portal, GLOBEX)
            hook = portal.webhooks.create(ACME, "gone", "https://example.com", [])[1]
            portal.webhooks.create(ACME, "stays", "https://example.com", [])
            register(portal, ACME)
            back_up_acme(settings, alone, clock)
            clock.advance(minutes=5)
            register(portal, GLOBEX)
            self.late = register(portal, ACME)
            portal.revocations.revoke(ACME, self.goes, "key_compromise")
            portal.revocations.suspend(ACME, self.held)
            portal.webhooks.delete(ACME, hook.id)
            portal.reconciler.install()
            self.others = rows_of_others(portal)
            with portal.database.snapshot() as tx:
                self.generation = tx.exec_driver_sql("SELECT generation FROM broker_state").scalar_one()
        clock.advance(minutes=5)


@pytest.fixture
def fleet(settings: Settings, alone: Path, clock: Clock) -> Fleet:
    return Fleet(settings, alone, clock)


# --- What is in it ----------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_it_has_the_rows_of_one_tenant_of_every_table_and_no_others(
    settings: Settings, fleet: Fleet, alone: Path
) -> None:
    of_tenants = {table.name for table in METADATA.sorted_tables if "tenant_id" in table.c} | {"tenants"}
    with Backup(alone) as backup:
        assert backup.manifest.counts.keys() == of_tenants
        assert backup.manifest.counts["devices"] == 4
        for name in of_tenants:
            assert {store_copy.owner_of(name, row) for row in backup.rows(name)} <= {"acme"}
    members = zipfile.ZipFile(alone).namelist()
    assert {name for name in members if name.startswith(("ca/", "secrets/"))} == {"ca/acme-issuing-1.key.pem"}


def test_what_counts_rows_of_the_whole_installation_is_renumbered_with_all_that_refers_to_it() -> None:
    """A column that names a row by its number has a foreign key, by which it is found."""
    for name in store_copy.table_names("any"):
        for column in METADATA.tables[name].c:
            if isinstance(column.type, sa.Integer) and column.name.endswith("_id"):
                assert column.name in tenant_copy._references(name), f"{name}.{column.name}"


def test_a_restored_connection_is_at_no_broker_of_this_installation(
    settings: Settings, fleet: Fleet, clock: Clock
) -> None:
    with opened(settings, clock) as portal, portal.database.transaction(sees=ALL_TENANTS) as tx:
        changed = tenant_copy.Renumbering(tx).change("presences", {"identity": "a", "broker_id": 1})
    assert changed == {"identity": "a", "broker_id": None}


# --- Restored in the place of what is there ---------------------------------------------------------------------------


def test_a_tenant_is_put_back_and_keeps_what_was_taken_from_it_since(
    settings: Settings, fleet: Fleet, alone: Path, clock: Clock
) -> None:
    done = put_acme_back(settings, alone, clock)
    assert done.before is not None
    assert not done.unknown
    assert done.generation > fleet.generation
    kept = " ".join(one.what for one in done.kept)
    for what in (fleet.goes, fleet.held, fleet.late, "webhook gone"):
        assert what in kept
    with opened(settings, clock) as portal:
        assert status_of(portal, fleet.stays) is DeviceStatus.ACTIVE
        assert status_of(portal, fleet.goes) is DeviceStatus.REVOKED
        assert status_of(portal, fleet.held) is DeviceStatus.SUSPENDED
        with portal.database.snapshot() as tx:
            assert tx.execute(sa.select(Device.id).where(Device.id == fleet.late)).one_or_none() is None
            assert tx.execute(sa.select(Webhook.name).where(Webhook.tenant_id == "acme")).scalars().all() == ["stays"]
            assert tenants.get_tenant(tx, "acme").status is TenantStatus.ACTIVE
            assert tenants.get_tenant(tx, "acme").generation == done.generation
            assert audit.verify(tx, "acme").problem is None
            newest = audit.list_audit_entries(tx, "acme", limit=1, filters={"action": "backup:restore"})
        assert [entry.object for entry in newest] == ["tenant:acme"]
        prepare(portal)
        assert status_of(portal, register(portal, ACME)) is DeviceStatus.ACTIVE


def test_rows_of_others_stay_byte_for_byte(settings: Settings, fleet: Fleet, alone: Path, clock: Clock) -> None:
    put_acme_back(settings, alone, clock)
    with opened(settings, clock) as portal:
        assert rows_of_others(portal) == fleet.others


@ON_SQLITE
def test_what_the_guard_still_refuses_of_others_is_not_looked_at(
    settings: Settings, fleet: Fleet, alone: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(settings, clock) as portal, portal.database.snapshot() as tx:
        everybody = frozenset(tx.execute(sa.select(Device.id).where(Device.tenant_id == "globex")).scalars())
    refused = GuardRefusals(denied=everybody | {fleet.goes})
    monkeypatch.setattr(tenant_restore, "refused_by_the_guard", lambda *_: refused)
    put_acme_back(settings, alone, clock)
    assert not settings.broker_file(RECORD_FILE).exists(), "the guard's journal has to be written anew"
    with opened(settings, clock) as portal:
        assert rows_of_others(portal) == fleet.others


def test_each_certificate_is_its_devices_and_its_cas_after_it_was_renumbered(
    settings: Settings, fleet: Fleet, alone: Path, clock: Clock
) -> None:
    put_acme_back(settings, alone, clock)
    with opened(settings, clock) as portal, portal.database.snapshot() as tx:
        query = sa.select(Certificate.id, IssuerRow.name).join(IssuerRow, IssuerRow.id == Certificate.issuer_id)
        found = tx.execute(query.where(Certificate.tenant_id == "acme")).all()
        with Backup(alone) as backup:
            before = [row["id"] for row in backup.rows("certificates")]
        assert {name for _, name in found} == {"acme-issuing-1"}
        assert not {number for number, _ in found} & set(before)
    put_acme_back(settings, alone, clock)  # can be repeated


def test_what_was_there_can_be_put_back_again(settings: Settings, fleet: Fleet, alone: Path, clock: Clock) -> None:
    before = put_acme_back(settings, alone, clock).before
    assert before is not None
    put_acme_back(settings, before, clock)
    with opened(settings, clock) as portal:
        assert status_of(portal, fleet.late) is not None


def test_a_tenant_of_a_backup_of_the_whole_is_put_back_alone(
    settings: Settings, fleet: Fleet, file: Path, clock: Clock
) -> None:
    copied(settings, file, clock)
    with opened(settings, clock) as portal:
        portal.revocations.revoke(ACME, fleet.stays, "key_compromise")
        others = rows_of_others(portal)
    assert put_acme_back(settings, file, clock).counts["devices"] == 5
    with opened(settings, clock) as portal:
        assert status_of(portal, fleet.stays) is DeviceStatus.REVOKED
        assert rows_of_others(portal) == others


STEPS = [
    "restore.journaled",
    "restore.tenant_filled",
    "restore.journaled:2",
    "restore.put",
    "restore.placed",
    "restore.ended",
]


@pytest.mark.parametrize("step", STEPS)
def test_after_a_kill_it_is_as_it_was_or_as_the_backup_has_it(
    settings: Settings, fleet: Fleet, alone: Path, clock: Clock, step: str
) -> None:
    key = key_path(settings, "acme-issuing-1")
    key.unlink()
    killed(step, lambda: put_acme_back(settings, alone, clock))
    with opened(settings, clock) as portal:
        is_whole(settings)
        assert key.exists() == (step == "restore.ended")
        with portal.database.snapshot() as tx:
            late = tx.execute(sa.select(Device.id).where(Device.id == fleet.late)).one_or_none()
        assert (late is None) == (step == "restore.ended")
        assert status_of(portal, fleet.goes) is DeviceStatus.REVOKED
        assert status_of(portal, fleet.held) is DeviceStatus.SUSPENDED
        assert rows_of_others(portal) == fleet.others


# --- Where it is not there --------------------------------------------------------------------------------------------


@pytest.fixture
def gone(settings: Settings, file: Path, alone: Path, clock: Clock) -> str:
    """A device of acme, whose rows are gone: the installation is as before it was added. The key is gone, too."""
    with opened(settings, clock) as portal:
        prepare(portal)
        copied(settings, file, clock)
        add_tenant(portal, "acme")
        device_id = register(portal, ACME)
        portal.reconciler.install()
        back_up_acme(settings, alone, clock)
        portal.revocations.revoke(ACME, register(portal, ACME), "key_compromise")
        portal.revocations.revoke(ACME, device_id, "key_compromise")
    return device_id


def test_a_tenant_whose_rows_are_gone_comes_back_suspended_and_is_resumed(
    settings: Settings, gone: str, file: Path, alone: Path, clock: Clock
) -> None:
    put_back(settings, file, clock)
    key_path(settings, "acme-issuing-1").unlink()
    done = put_acme_back(settings, alone, clock, replace=False)
    assert done.unknown
    assert done.before is None
    assert key_path(settings, "acme-issuing-1").exists()
    with opened(settings, clock) as portal:
        with portal.database.snapshot() as tx:
            assert tenants.get_tenant(tx, "acme").status is TenantStatus.SUSPENDED
        assert status_of(portal, gone) is DeviceStatus.REVOKED  # the installation has its key as compromised
        portal.tenants.resume(OPERATOR, "acme")
        prepare(portal)
        assert status_of(portal, register(portal, ACME)) is DeviceStatus.ACTIVE


@ON_SQLITE
def test_a_saved_crl_says_what_was_revoked_of_a_tenant_whose_rows_are_gone(
    settings: Settings, file: Path, alone: Path, clock: Clock, tmp_path: Path
) -> None:
    saved, of_another = tmp_path / "acme.crl", tmp_path / "default.crl"
    with opened(settings, clock) as portal:
        prepare(portal)
        copied(settings, file, clock)
        add_tenant(portal, "acme")
        gone, stays = register(portal, ACME), register(portal, ACME)
        back_up_acme(settings, alone, clock)
        portal.revocations.revoke(ACME, gone, "superseded")
        portal.reconciler.crls.sign_due()
        with portal.database.snapshot() as tx:
            for path, name in ((saved, "acme"), (of_another, "default")):
                crl = issuers.get_crl(tx, portal.authority.issuing_of(name).id)
                assert crl is not None
                path.write_bytes(crl.der)
    put_back(settings, file, clock)
    for name in ("crl.pem", JOURNAL_FILE):
        settings.broker_file(name).unlink(missing_ok=True)
    with pytest.raises(BackupRefused, match="a CA that is not in the backup"):
        put_acme_back(settings, alone, clock, crls=(of_another,))
    put_acme_back(settings, alone, clock, crls=(saved,))
    with opened(settings, clock) as portal:
        assert status_of(portal, gone) is DeviceStatus.REVOKED
        assert status_of(portal, stays) is DeviceStatus.ACTIVE


# --- Conflicts --------------------------------------------------------------------------------------------------------


def harm_topics(portal: Portal, _clock: Clock) -> str:
    with portal.database.transaction() as tx:
        tx.execute(sa.update(Tenant).where(Tenant.id == "globex").values(topic_prefix="acme/hall"))
    return "topics of the tenant globex are below acme/hall"


def harm_key(portal: Portal, clock: Clock) -> str:
    with portal.database.transaction() as tx:
        der = tx.execute(sa.select(Certificate.der).where(Certificate.tenant_id == "acme")).scalars().first()
        assert der is not None
        theirs = tx.execute(sa.select(Device.id).where(Device.tenant_id == "globex")).scalars().first()
        keys.block_keys(tx, "globex", theirs, [certificate_key_fingerprint(der)], at=clock())
    return "was revoked as compromised in the tenant globex"


@pytest.mark.parametrize("harm", [harm_topics, harm_key])
def test_what_is_another_tenants_by_now_stops_it_with_nothing_changed(
    settings: Settings, fleet: Fleet, alone: Path, clock: Clock, harm: Callable[[Portal, Clock], str], tmp_path: Path
) -> None:
    with opened(settings, clock) as portal:
        with portal.database.transaction() as tx:
            row = tx.execute(sa.select(Certificate).where(Certificate.device_id == fleet.stays)).mappings().one()
            values = {"name": "pump.example.com", "device_id": fleet.stays, "certificate_id": row["id"]}
            tx.execute(sa.insert(DeviceName), values | {"tenant_id": "acme"})
        newer = tmp_path / "newer.backup"
        back_up_acme(settings, newer, clock)
        said = harm(portal, clock)
        before = state(portal)
    with pytest.raises(BackupRefused, match=said):
        put_acme_back(settings, newer, clock)
    with opened(settings, clock) as portal:
        is_whole(settings)
        assert state(portal) == before


@ON_SQLITE
def test_what_cannot_be_restored_is_refused(
    settings: Settings, fleet: Fleet, alone: Path, file: Path, clock: Clock
) -> None:
    def refused(said: str, restoring: Callable[[], object]) -> None:
        with pytest.raises(BackupRefused, match=said):
            restoring()

    refused("use --replace", lambda: put_acme_back(settings, alone, clock, replace=False))
    refused("restore it with --tenant acme", lambda: put_back(settings, alone, clock))
    for name in ("default", "globex", "nobody"):
        with pytest.raises(BackupRefused, match="has no tenant"):
            restore_tenant(settings, alone, name, replace=True, keep_links=False, now=clock())
    refused("is the installation", lambda: back_up(settings, file, now=clock(), tenant_id="default"))
    refused("There is no tenant nobody", lambda: back_up(settings, file, now=clock(), tenant_id="nobody"))
    assert not file.exists()
    with zipfile.ZipFile(alone) as archive, zipfile.ZipFile(file, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, archive.read(name).replace(b'"generation": ', b'"generation": 1'))
    refused("changed after it was written", lambda: put_acme_back(settings, file, clock))
    with opened(settings, clock) as portal, portal.database.transaction() as tx:
        tx.execute(sa.update(Tenant).where(Tenant.id == "acme").values(status="removed"))
    refused("was removed here", lambda: put_acme_back(settings, alone, clock))
    files = settings.model_copy(update={"broker_control": ControlKind.FILES})
    with pytest.raises(GuardNeeded):
        put_acme_back(files, alone, clock)


@ON_SQLITE
def test_the_commands_say_what_they_did(settings: Settings, fleet: Fleet, alone: Path) -> None:
    app = create_app(settings, background=False)
    runner, other = app.test_cli_runner(), alone.with_name("another.backup")
    with app.app_context():
        made = runner.invoke(args=["backup", "--tenant", "acme", str(other)])
        refused = runner.invoke(args=["restore", "--tenant", "acme", str(alone)])
        done = runner.invoke(args=["restore", "--tenant", "acme", str(alone), "--replace"])
    assert made.exit_code == 0, made.output
    assert "5 devices" in made.output
    assert refused.exit_code == 1
    assert "use --replace" in refused.output
    assert done.exit_code == 0, done.output
    assert "Restored       4 devices" in done.output
    assert f"Kept revoked   device {fleet.goes} (pump-1) (key_compromise, " in done.output
    assert "before-restore-acme.backup" in done.output
