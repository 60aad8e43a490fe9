"""A backup is whole, closed and honest; a restore does not bring back a device that was revoked since."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import db
from app import create_app
from broker.files.acl import number_of
from config import Settings
from core.errors import (
    BackupRefused,
    CaKeyUnavailable,
    DatabaseTooNew,
    LinkExpired,
    LinkUsed,
    PortalError,
    PortalRunning,
)
from core.files import replace_file
from core.roles import Role
from core.states import Approval, BrokerKind, DeviceStatus, RepeatedSerial
from operations import data_folder
from operations.backup.archive import MANIFEST, Backup
from operations.backup.revocations import RevocationReplay
from operations.owner_tokens import first_token
from operations.wiring import open_portal, prepare
from pki.encoding import pem
from pki.issuers import CLOCK_SKEW
from store import audit, brokers, enrolment, generations, schema, tenants
from store import copy as store_copy
from store.enrolment import EnrolmentProfile
from store.scope import ALL_TENANTS
from store.tables import Certificate, Delivery
from tests.support.backups import (
    Story,
    all_bytes,
    bring_passphrase,
    contents,
    copied,
    crl_number,
    listed,
    lose_the_database,
    opened,
    put_back,
    status_of,
)
from tests.support.harness import PER_DEVICE, Clock, settings_for
from tests.workflows.test_registration import OPERATOR, PUMP, token_of
from workflows.operators import new_token

# --- The file -----------------------------------------------------------------------------------------------------


def test_a_backup_is_one_private_file_made_while_the_portal_works(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        portal.registrations.register(OPERATOR, PUMP)
        made = copied(settings, file, clock)
        portal.registrations.register(OPERATOR, PUMP)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert made.manifest.counts["devices"] == 1
    assert list(file.parent.iterdir()) == [file]


def test_what_is_there_is_never_overwritten(settings: Settings, file: Path, clock: Clock) -> None:
    file.write_bytes(b"a backup of last week")
    with pytest.raises(BackupRefused, match="not overwritten"):
        copied(settings, file, clock)
    assert file.read_bytes() == b"a backup of last week"


def test_a_backup_alone_can_sign_nothing_and_opens_nothing(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        token = first_token(portal)
        assert token is not None
        registered = portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    copied(settings, file, clock)
    passphrase = (settings.secrets_dir / "ca-passphrase").read_bytes().strip()
    with zipfile.ZipFile(file) as archive:
        inside = b"".join(archive.read(name) for name in archive.namelist())
        assert {name for name in archive.namelist() if name.startswith("secrets/")} == {
            "secrets/broker-password", "secrets/idempotency-pepper", "secrets/link-keys", "secrets/webhook-key",
        }  # fmt: skip
    assert registered.bundle_password is not None
    for secret in (passphrase, token.encode(), registered.bundle_password.encode(), b"BEGIN PRIVATE KEY"):
        assert secret not in inside


def test_a_key_that_is_not_encrypted_is_not_put_into_a_backup(settings: Settings, file: Path, clock: Clock) -> None:
    replace_file(settings.ca_dir / "stray.key.pem", b"-----BEGIN PRIVATE KEY-----\n")
    with pytest.raises(BackupRefused, match=r"stray\.key\.pem"):
        copied(settings, file, clock)
    assert not file.exists()


def test_where_there_is_no_portal_no_backup_is_made(tmp_path: Path, file: Path, clock: Clock) -> None:
    with pytest.raises(BackupRefused, match="no portal"):
        copied(settings_for(tmp_path / "nothing"), file, clock)
    assert not (tmp_path / "nothing").exists()


# --- There and back -----------------------------------------------------------------------------------------------


def test_a_backup_moves_a_portal_to_any_database(
    settings: Settings, elsewhere: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        device = portal.registrations.register(OPERATOR, PUMP)
        gone = portal.registrations.register(OPERATOR, PUMP)
        portal.revocations.revoke(OPERATOR, gone.device_id, "key_compromise")
        before = contents(portal)
    copied(settings, file, clock)
    bring_passphrase(settings, elsewhere)
    put_back(elsewhere, file, clock, replace=False, keep_links=True)
    with opened(elsewhere, clock) as portal:
        prepare(portal)
        after = contents(portal)
        for name in ("tenants", "devices", "acl_entries", "certificates", "deliveries", "idempotency_keys", "tokens"):
            issued = [row for row in after[name] if "'server'" not in row and "'canary'" not in row]
            assert issued == [row for row in before[name] if "'server'" not in row and "'canary'" not in row]
        assert after["audit_entries"][: len(before["audit_entries"])] == before["audit_entries"]
        assert portal.deliveries.deliver(OPERATOR, token_of(device)).content
        assert portal.registrations.register(OPERATOR, PUMP).status is DeviceStatus.ACTIVE
        with portal.database.snapshot() as tx:
            assert audit.verify(tx, "default").problem is None
        assert listed(elsewhere)[gone.serial_number]


def test_brokers_elsewhere_are_told_of_more_generations_than_any_was_told_before(
    settings: Settings, elsewhere: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal, portal.database.transaction(sees=ALL_TENANTS) as tx:
        brokers.add_broker(tx, "edge", BrokerKind.AGENT, at=clock(), joined=True)
    copied(settings, file, clock)
    bring_passphrase(settings, elsewhere)
    started = clock()
    put_back(elsewhere, file, clock, replace=False)
    with opened(elsewhere, clock) as portal, portal.database.snapshot(sees=ALL_TENANTS) as tx:
        assert generations.get_broker_state(tx).generation >= int(started.timestamp() * 1000)


def test_the_data_folder_of_another_portal_becomes_the_copys(
    settings: Settings, elsewhere: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        portal.registrations.register(OPERATOR, PUMP)
    copied(settings, file, clock)
    with opened(elsewhere, clock) as portal:  # a first start there, by mistake
        prepare(portal)
        other = portal.authority.first.ca_pem
    bring_passphrase(settings, elsewhere)
    done = put_back(elsewhere, file, clock, replace=False)
    assert any("CA that is not in the backup" in note for note in done.notes)
    with opened(elsewhere, clock) as portal:
        prepare(portal)
        assert portal.authority.first.ca_pem != other
        for path in (elsewhere.tls_dir / "server.pem", elsewhere.broker_file("server.pem")):
            certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
            certificate.verify_directly_issued_by(portal.authority.first.issuing.issuer.certificate)
    assert (elsewhere.secrets_dir / "link-keys").read_bytes() == (settings.secrets_dir / "link-keys").read_bytes()


def test_an_older_schema_is_restored_and_then_migrated(
    settings: Settings, elsewhere: Settings, file: Path, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(settings, clock) as portal:
        portal.registrations.register(OPERATOR, PUMP)
    copied(settings, file, clock)
    shutil.copytree(schema.MIGRATIONS, tmp_path / "migrations")
    (tmp_path / "migrations" / "versions" / "9000_colour.py").write_text(
        "from alembic import op\nimport sqlalchemy as sa\n"
        f"revision, down_revision = '9000', '{schema.newest_revision()}'\n"
        "branch_labels = depends_on = None\n"
        "def upgrade():\n"
        "    op.add_column('devices', sa.Column('colour', sa.String(8), server_default='grey', nullable=False))\n"
    )
    monkeypatch.setattr(schema, "MIGRATIONS", tmp_path / "migrations")
    bring_passphrase(settings, elsewhere)
    put_back(elsewhere, file, clock)
    with opened(elsewhere, clock) as portal, portal.database.snapshot() as tx:
        assert schema.revision(tx) == "9000"
        assert tx.execute(sa.text("SELECT colour FROM devices")).scalars().all() == ["grey"]


# --- What is refused ----------------------------------------------------------------------------------------------


def altered(file: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a backup with one member changed."""
    other = file.with_name("altered.backup")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(other, "w") as target:
        for member in source.namelist():
            content = source.read(member)
            target.writestr(member, change(content) if member == name else content)
    return other


def with_revision(content: bytes) -> bytes:
    return json.dumps(json.loads(content) | {"revision": "9999"}).encode()


def sealed_by(name: str) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | {"sealed_by": name}).encode()


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("tables/tokens.jsonl", lambda content: content.replace(b"admin", b"adm1n"), BackupRefused, "is damaged"),
        ("tables/devices.jsonl", lambda content: content + b"[]\n", BackupRefused, "is damaged"),
        (
            MANIFEST,
            lambda content: content.replace(b"tokens", b"tokenz"),
            BackupRefused,
            "changed after it was written",
        ),
        (MANIFEST, with_revision, DatabaseTooNew, "newer version"),
        (MANIFEST, lambda _: b"{}", BackupRefused, "not a backup"),
        (MANIFEST, lambda content: content.replace(b'"format": 1', b'"format": 2'), BackupRefused, "not a backup"),
        (MANIFEST, sealed_by("../../x"), BackupRefused, "not a backup"),
        (MANIFEST, sealed_by("/x"), BackupRefused, "not a backup"),
        (MANIFEST, sealed_by("issuing-1\n"), BackupRefused, "not a backup"),
        ("manifest.seal", lambda _: b"0" * 64, BackupRefused, "changed after it was written"),
    ],
)
def test_a_backup_that_was_changed_is_refused_and_nothing_is_touched(
    settings: Settings,
    file: Path,
    clock: Clock,
    name: str,
    change: Callable[[bytes], bytes],
    error: type[PortalError],
    said: str,
) -> None:
    copied(settings, file, clock)
    before = all_bytes(settings)
    with pytest.raises(error, match=said):
        put_back(settings, altered(file, name, change), clock)
    assert all_bytes(settings) == before


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_what_is_no_backup_is_refused(settings: Settings, file: Path, clock: Clock, content: bytes | None) -> None:
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BackupRefused, match="cannot be read as a backup"):
        put_back(settings, file, clock)


def test_a_member_more_is_refused(settings: Settings, file: Path, clock: Clock) -> None:
    copied(settings, file, clock)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("secrets/link-keys-2", "more")
    with pytest.raises(BackupRefused, match="does not hold what its manifest names"):
        put_back(settings, file, clock)


def test_the_passphrase_must_open_the_issuing_key(
    settings: Settings, elsewhere: Settings, file: Path, clock: Clock
) -> None:
    copied(settings, file, clock)
    with pytest.raises(CaKeyUnavailable, match="passphrase"):
        put_back(elsewhere, file, clock)
    replace_file(elsewhere.secrets_dir / "ca-passphrase", b"this is another passphrase\n")
    with pytest.raises(CaKeyUnavailable, match="does not decrypt the CA key in the backup"):
        put_back(elsewhere, file, clock)
    assert not elsewhere.ca_dir.exists()


def test_no_restore_while_a_portal_is_at_work_and_no_portal_during_a_restore(
    settings: Settings, file: Path, clock: Clock
) -> None:
    copied(settings, file, clock)
    with opened(settings, clock), pytest.raises(PortalRunning, match="stop it first"):
        put_back(settings, file, clock)
    with data_folder.exclusive(settings), pytest.raises(PortalRunning, match="being restored"):
        open_portal(settings, clock)
    put_back(settings, file, clock)


def test_a_database_with_devices_is_replaced_only_with_force(settings: Settings, file: Path, clock: Clock) -> None:
    copied(settings, file, clock)
    with opened(settings, clock) as portal:
        portal.registrations.register(OPERATOR, PUMP)
        before = contents(portal)
    with pytest.raises(BackupRefused, match=r"1 devices.*--replace"):
        put_back(settings, file, clock, replace=False)
    with opened(settings, clock) as portal:
        assert contents(portal) == before
    done = put_back(settings, file, clock)
    assert done.before is not None
    assert done.before.exists()
    assert stat.S_IMODE(done.before.stat().st_mode) == 0o600


def test_a_restore_that_fails_half_way_changes_nothing(
    settings: Settings, file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(settings, file, clock)
    with opened(settings, clock) as portal:
        portal.registrations.register(OPERATOR, PUMP)
        before = contents(portal)

    def fail(*_: Any) -> None:
        raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(RevocationReplay, "keep", fail)
        with pytest.raises(RuntimeError):
            put_back(settings, file, clock)
    assert not list(settings.data_dir.glob("portal.db.*"))
    with opened(settings, clock) as portal:
        assert contents(portal) == before


# --- Nobody comes back --------------------------------------------------------------------------------------------


@PER_DEVICE
@pytest.mark.parametrize("lost", [False, True], ids=["the old database is readable", "only the CRL is left"])
def test_what_was_revoked_since_the_copy_stays_revoked(story: Story, clock: Clock, lost: bool) -> None:
    settings = story.settings
    loaded = settings.broker_file("acl").read_bytes()
    if lost:
        lose_the_database(settings)
    done = story.put_back()
    # A broker that starts before the portal reads these.
    acl = settings.broker_file("acl").read_text()
    assert f"user {story.stays.device_id}" in acl
    for gone in (story.goes, story.late_and_gone):
        assert f"user {gone.device_id}" not in acl
    assert set(listed(settings)) == set(story.on_crl)
    with opened(settings, clock) as portal:
        prepare(portal)
        assert status_of(portal, story.stays) is DeviceStatus.ACTIVE
        assert status_of(portal, story.goes) is DeviceStatus.REVOKED
        assert status_of(portal, story.held) is DeviceStatus.SUSPENDED
        with portal.database.snapshot() as tx:
            device = db.get_device(tx, "default", story.goes.device_id)
            assert audit.verify(tx, "default").problem is None
            assert generations.get_broker_state(tx).generation > story.generation
        recorded = portal.operators.audit("default", limit=50, before=None, filters={})[0]
        assert portal.broker.files.damage() == []
        acl = settings.broker_file("acl").read_text()
    assert device.revocation_reason == "key_compromise"
    assert device.revoked_at is not None
    on_crl = story.on_crl[story.goes.serial_number].revocation_date_utc + CLOCK_SKEW
    assert abs(device.revoked_at - on_crl) < timedelta(seconds=1)
    now_listed = listed(settings)
    assert set(story.on_crl) <= set(now_listed)
    assert story.late_and_gone.serial_number in now_listed
    assert story.stays.serial_number not in now_listed
    # A suspended device keeps its topics, and is refused by the CRL.
    on_hold = now_listed[story.held.serial_number].extensions.get_extension_for_class(x509.CRLReason).value.reason
    assert on_hold is x509.ReasonFlags.certificate_hold
    assert crl_number(settings) > story.number
    for granted in (story.stays, story.held):
        assert f"user {granted.device_id}" in acl
    for gone in (story.goes, story.late, story.late_and_gone):
        assert f"user {gone.device_id}" not in acl
    # A broker that has loaded the ACL of before, with devices that nobody knows any more, has to load this one.
    assert number_of(acl.encode()) > number_of(loaded)
    said = " ".join(kept.what for kept in done.kept)
    for what in (story.goes.device_id, story.held.device_id, story.late_and_gone.serial_number):
        assert what in said
    (entry,) = [entry for entry in recorded if entry.action == "backup:restore"]
    assert entry.detail["kept_revoked"] == len(done.kept)
    assert (entry.detail["replaced_record"] is None) == lost
    # A device registered since is known only to the database that was replaced. Its certificate is then revoked.
    assert (story.late.serial_number in now_listed) == (not lost)


@pytest.mark.parametrize("damaged", [False, True], ids=["the journal is whole", "the journal is damaged"])
def test_with_neither_database_nor_crl_the_guards_journal_says_what_is_refused(
    make_settings: Callable[..., Settings], clock: Clock, tmp_path: Path, damaged: bool
) -> None:
    story = Story(make_settings(PORTAL_BROKER_CONTROL="guard"), tmp_path / "portal.backup", clock)
    lose_the_database(story.settings)
    story.settings.broker_file("crl.pem").unlink()
    if damaged:
        story.settings.broker_file("guard.journal").write_bytes(b"nonsense\n")
    done = story.put_back()
    assert any("is not known" in note for note in done.notes) == damaged
    with opened(story.settings, clock) as portal:
        states = [status_of(portal, device) for device in (story.stays, story.goes, story.held)]
    active = DeviceStatus.ACTIVE
    assert states == ([active] * 3 if damaged else [active, DeviceStatus.REVOKED, DeviceStatus.SUSPENDED])
    assert (story.late_and_gone.serial_number in " ".join(kept.what for kept in done.kept)) != damaged


def test_a_restore_can_be_done_again_and_then_forgets_nothing(story: Story, clock: Clock) -> None:
    story.put_back()
    with opened(story.settings, clock) as portal:
        prepare(portal)
    again = story.put_back()
    with opened(story.settings, clock) as portal:
        prepare(portal)
        with portal.database.snapshot() as tx:
            assert audit.verify(tx, "default").problem is None
    assert {kept.reason for kept in again.kept} == {"key_compromise", "certificate_hold", "cessation_of_operation"}
    assert story.late_and_gone.serial_number in listed(story.settings)


def test_a_device_whose_old_certificate_was_superseded_keeps_working(story: Story, clock: Clock) -> None:
    with opened(story.settings, clock) as portal, portal.database.transaction() as tx:
        renewed = sa.update(Certificate).where(Certificate.device_id == story.stays.device_id)
        tx.execute(renewed.values(status="revoked", revoked_at=clock(), revocation_reason="superseded"))
    done = story.put_back()
    with opened(story.settings, clock) as portal:
        prepare(portal)
        assert status_of(portal, story.stays) is DeviceStatus.ACTIVE
    assert listed(story.settings)[story.stays.serial_number]
    assert any(f"certificate {story.stays.serial_number}" in kept.what for kept in done.kept)


def test_a_crl_that_was_altered_stops_the_restore(story: Story) -> None:
    path = story.settings.broker_file("crl.pem")
    crl = x509.load_pem_x509_crl(path.read_bytes())
    der = bytearray(crl.public_bytes(Encoding.DER))
    der[-1] ^= 1
    path.write_bytes(pem("X509 CRL", bytes(der)).encode())
    with pytest.raises(BackupRefused, match="signature of the CRL of issuing"):
        story.put_back()
    path.write_bytes(b"nonsense")
    with pytest.raises(BackupRefused, match="move it away"):
        story.put_back()


def test_without_a_crl_the_restore_says_what_it_cannot_know(story: Story) -> None:
    lose_the_database(story.settings)
    story.settings.broker_file("crl.pem").unlink()
    done = story.put_back()
    assert done.kept == []
    assert any("they are admitted again" in unknown for unknown in done.unknown)


def test_a_token_revoked_since_the_copy_stays_revoked(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        secret, record = new_token("default", "ci", Role.ADMIN, None, now=clock())
        with portal.database.transaction() as tx:
            tenants.add_token(tx, record, secret=secret)
        portal.registrations.register(OPERATOR, PUMP)
        copied(settings, file, clock)
        with portal.database.transaction() as tx:
            tenants.revoke_token(tx, "default", record.id, revoked_at=clock())
    done = put_back(settings, file, clock)
    assert [kept.what for kept in done.kept] == ["operator token ci"]
    with opened(settings, clock) as portal, portal.database.snapshot() as tx:
        found = tenants.find_token(tx, secret)
    assert found is not None
    assert found.revoked_at is not None


def test_an_enrolment_token_revoked_since_the_copy_stays_revoked_and_its_uses_stay_counted(
    settings: Settings, file: Path, clock: Clock
) -> None:
    terms = EnrolmentProfile(
        "pump", "hall 1", "1", "{serial}", ("ec-p256",), None, Approval.AT_ONCE, RepeatedSerial.OPERATOR
    )
    with opened(settings, clock) as portal:
        made = [
            portal.enrolment_tokens.create(OPERATOR, name, terms, device_id=None, count=2, life=timedelta(days=9))
            for name in ("leaked", "used")
        ]
        portal.registrations.register(OPERATOR, PUMP)
        copied(settings, file, clock)
        portal.enrolment_tokens.revoke(OPERATOR, made[0][1].id)
        with portal.database.transaction() as tx:
            enrolment.count_use(tx, "default", made[1][1].id)
    done = put_back(settings, file, clock)
    assert [kept.what for kept in done.kept] == ["enrolment token leaked"]
    with opened(settings, clock) as portal:
        leaked, used = (portal.enrolment_tokens.find(secret) for secret, _ in made)
    assert leaked is not None
    assert leaked.revoked_at is not None
    assert used is not None
    assert used.uses == 1


# --- Links --------------------------------------------------------------------------------------------------------


def test_bundles_of_a_copy_are_destroyed(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        device = portal.registrations.register(OPERATOR, PUMP)
    copied(settings, file, clock)
    assert put_back(settings, file, clock).links_expired == 1
    with opened(settings, clock) as portal:
        with pytest.raises(LinkExpired):
            portal.deliveries.check_download(token_of(device))
        with portal.database.snapshot() as tx:
            assert tx.execute(sa.select(Delivery.bundle)).scalars().all() == [None]


def test_a_bundle_that_was_kept_for_a_repeat_is_not_restored(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        token = token_of(portal.registrations.register(OPERATOR, PUMP))
        portal.deliveries.deliver(OPERATOR, token, "a-key-of-16-chars")
        copied(settings, file, clock)
    put_back(settings, file, clock, keep_links=True)
    with opened(settings, clock) as portal, pytest.raises(LinkUsed):
        portal.deliveries.deliver(OPERATOR, token, "a-key-of-16-chars")


def test_links_kept_are_those_that_nobody_used_since(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        waits, fetched, gone = (portal.registrations.register(OPERATOR, PUMP) for _ in range(3))
        copied(settings, file, clock)
        portal.deliveries.deliver(OPERATOR, token_of(fetched))
        portal.revocations.revoke(OPERATOR, gone.device_id, "superseded")
    assert put_back(settings, file, clock, keep_links=True).links_expired == 1
    with opened(settings, clock) as portal:
        assert portal.deliveries.check_download(token_of(waits)).status == "ready"
        for device in (fetched, gone):
            with pytest.raises(PortalError) as refused:
                portal.deliveries.check_download(token_of(device))
            assert not isinstance(refused.value, LinkUsed)


# --- Files --------------------------------------------------------------------------------------------------------


def test_keys_and_secrets_that_are_there_stay_and_a_root_key_moved_away_stays_away(
    settings: Settings, file: Path, clock: Clock
) -> None:
    copied(settings, file, clock)
    (settings.ca_dir / "root.key.pem").unlink()
    rotated = (settings.secrets_dir / "link-keys").read_bytes() + b"a-newer-key\n"
    replace_file(settings.secrets_dir / "link-keys", rotated)
    done = put_back(settings, file, clock)
    assert not (settings.ca_dir / "root.key.pem").exists()
    assert (settings.secrets_dir / "link-keys").read_bytes() == rotated
    assert any("root key" in note for note in done.notes)


def test_the_old_sqlite_file_is_kept_beside_each_time(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        portal.registrations.register(OPERATOR, PUMP)
    copied(settings, file, clock)
    first, second = put_back(settings, file, clock).before, put_back(settings, file, clock).before
    assert first is not None
    assert second is not None
    assert first != second
    if settings.database_url.startswith("sqlite"):
        assert (first.name, second.name) == ("portal.db.before-restore", "portal.db.before-restore-2")
    else:
        with Backup(first) as before:
            assert before.manifest.counts["devices"] == 1


# --- The commands -------------------------------------------------------------------------------------------------


def test_the_commands_say_what_they_did(story: Story) -> None:
    app = create_app(story.settings, background=False)
    runner = app.test_cli_runner()
    other = story.file.with_name("another.backup")
    with app.app_context():
        made = runner.invoke(args=["backup", str(other)])
        refused = runner.invoke(args=["restore", str(story.file)])
        done = runner.invoke(args=["restore", str(story.file), "--replace"])
    assert made.exit_code == 0, made.output
    assert "5 devices" in made.output
    assert "the passphrase of the CA keys" in made.output
    assert refused.exit_code == 1
    assert "--replace" in refused.output
    assert done.exit_code == 0, done.output
    assert f"Kept revoked   device {story.goes.device_id} (pump-1) (key_compromise, " in done.output
    assert story.late_and_gone.serial_number in done.output
    assert "Next           start the portal" in done.output


def test_a_large_table_is_copied_bit_by_bit(settings: Settings, file: Path, clock: Clock) -> None:
    now = datetime(2027, 1, 1, 12, 30, 15, 123456, tzinfo=UTC)
    with opened(settings, clock) as portal, portal.database.transaction() as tx:
        for number in range(2 * store_copy.BATCH + 7):
            db.add_device(
                tx, tenant_id="default", device_id=f"00000000-0000-4000-8000-{number:012}", name='"\u20ac\n',
                type="pump", location="", firmware="1", metadata={"n": [number, 0.1, None, "\u2028"]},
                status=DeviceStatus.PENDING, topics=None, created_at=now, generation=0,
            )  # fmt: skip
    with opened(settings, clock) as portal:
        before = contents(portal)["devices"]
    copied(settings, file, clock)
    put_back(settings, file, clock)
    with opened(settings, clock) as portal:
        assert contents(portal)["devices"] == before
