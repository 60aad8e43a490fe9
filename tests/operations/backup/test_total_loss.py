"""After the loss of data folder and database, a saved CRL keeps revoked what it lists, and the rest is named."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

import db
from app import create_app
from config import Settings
from core.errors import BackupRefused
from core.states import DeviceStatus
from operations.wiring import prepare
from pki.issuers import CLOCK_SKEW
from store.tables import Certificate
from tests.support.backups import (
    Story,
    all_bytes,
    bring_passphrase,
    copied,
    crl_number,
    listed,
    lose_the_database,
    opened,
    put_back,
    status_of,
)
from tests.support.harness import ON_SQLITE, Clock
from tests.workflows.test_registration import OPERATOR, PUMP

pytestmark = pytest.mark.both_stores

Saved = Callable[[bytes], bytes]


@pytest.fixture
def public_crl(story: Story, tmp_path: Path, elsewhere: Settings) -> Path:
    """The CRL as somebody saved it; the portal is lost but for its backup and passphrase, which are elsewhere now."""
    path = tmp_path / "saved.crl"
    path.write_bytes(story.settings.broker_file("crl.pem").read_bytes())
    bring_passphrase(story.settings, elsewhere)
    return path


def as_der(pem: bytes) -> bytes:
    return x509.load_pem_x509_crl(pem).public_bytes(Encoding.DER)


def with_text(pem: bytes) -> bytes:
    return b"Certificate Revocation List (CRL):\n    Version 2\n" + pem + b"\nsaved on Monday\n"


@pytest.mark.parametrize("form", [bytes, as_der, with_text], ids=["PEM", "DER", "PEM with text"])
@ON_SQLITE
def test_a_saved_crl_keeps_revoked_what_it_lists(
    story: Story, public_crl: Path, elsewhere: Settings, clock: Clock, form: Saved
) -> None:
    public_crl.write_bytes(form(public_crl.read_bytes()))
    done = put_back(elsewhere, story.file, clock, replace=False, crls=[public_crl])
    with opened(elsewhere, clock) as portal:
        prepare(portal)
        assert status_of(portal, story.stays) is DeviceStatus.ACTIVE
        assert status_of(portal, story.goes) is DeviceStatus.REVOKED
        assert status_of(portal, story.held) is DeviceStatus.SUSPENDED
        with portal.database.snapshot() as tx:
            device = db.get_device(tx, "default", story.goes.device_id)
    on_crl = story.on_crl[story.goes.serial_number].revocation_date_utc + CLOCK_SKEW
    assert device.revocation_reason == "key_compromise"
    assert device.revoked_at is not None
    assert abs(device.revoked_at - on_crl) < timedelta(seconds=1)
    assert set(story.on_crl) <= set(listed(elsewhere))
    assert crl_number(elsewhere) > story.number
    assert len([text for text in done.unknown if "issuing" in text and "time of its newest CRL" in text]) == 1


@ON_SQLITE
def test_without_any_crl_the_revoked_are_let_in_again_and_the_restore_says_so(
    story: Story, public_crl: Path, elsewhere: Settings, clock: Clock
) -> None:
    done = put_back(elsewhere, story.file, clock, replace=False)
    assert done.kept == []
    said = "\n".join(done.unknown)
    for what in ("admitted again; restore once more with --crl", "operator tokens", "topics", "webhooks", "registered"):
        assert what in said
    again = put_back(elsewhere, story.file, clock, crls=[public_crl])
    assert story.goes.device_id in " ".join(kept.what for kept in again.kept)


@ON_SQLITE
def test_of_several_crls_of_one_ca_the_newest_counts(
    settings: Settings, elsewhere: Settings, file: Path, clock: Clock, tmp_path: Path
) -> None:
    older, newer = tmp_path / "older.crl", tmp_path / "newer.crl"
    with opened(settings, clock) as portal:
        prepare(portal)
        device = portal.registrations.register(OPERATOR, PUMP)
        copied(settings, file, clock)
        portal.revocations.suspend(OPERATOR, device.device_id)
        portal.reconciler.install()
        shutil.copy(settings.broker_file("crl.pem"), older)
        clock.advance(minutes=5)
        portal.revocations.resume(OPERATOR, device.device_id)
        portal.reconciler.install()
        shutil.copy(settings.broker_file("crl.pem"), newer)
        with portal.database.snapshot() as tx:
            own = set(tx.scalars(sa.select(Certificate.serial_number).where(Certificate.purpose == "canary")))
    bring_passphrase(settings, elsewhere)
    # The portal's own certificates that showed the broker each CRL are on it, too. Nothing in it says what they were.
    probes = {f"certificate {serial_number}" for serial_number in own}
    for crls in ([older, newer], [newer, older]):
        done = put_back(elsewhere, file, clock, crls=crls)
        assert {kept.what for kept in done.kept} <= probes
    kept = put_back(elsewhere, file, clock, crls=[older]).kept
    assert any(device.device_id in one.what and one.reason == "certificate_hold" for one in kept)


# --- Attacks and mistakes ---------------------------------------------------------------------------------------------


def forged(pem: bytes) -> bytes:
    """The same CRL without an entry, signed with another key."""
    crl = x509.load_pem_x509_crl(pem)
    assert crl.next_update_utc is not None
    builder = x509.CertificateRevocationListBuilder().issuer_name(crl.issuer)
    builder = builder.last_update(crl.last_update_utc).next_update(crl.next_update_utc)
    for extension in crl.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    key = ec.derive_private_key(7, ec.SECP256R1())
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def of_another_ca(pem: bytes) -> bytes:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Another CA")])
    builder = x509.CertificateRevocationListBuilder().issuer_name(name).last_update(now)
    builder = builder.next_update(now + timedelta(days=1))
    return builder.sign(ec.derive_private_key(7, ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (forged, "does not verify"),
        (of_another_ca, "of a CA that is not in the backup"),
        (lambda pem: pem[:-40], "is cut off"),
        (lambda pem: as_der(pem)[:-40], "not a CRL in PEM or DER"),
        (lambda _: b"", "not a CRL in PEM or DER"),
    ],
    ids=["forged", "of another CA", "PEM cut off", "DER cut off", "empty"],
)
@ON_SQLITE
def test_a_crl_that_its_ca_did_not_sign_stops_the_restore_which_says_nothing_of_an_interrupted_one(
    story: Story,
    public_crl: Path,
    elsewhere: Settings,
    clock: Clock,
    form: Saved,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    public_crl.write_bytes(form(public_crl.read_bytes()))
    before = {path for path in all_bytes(elsewhere) if path.name != ".folder-id" and "portal.db" not in path.name}
    with caplog.at_level(logging.INFO), pytest.raises(BackupRefused, match=said):
        put_back(elsewhere, story.file, clock, replace=False, crls=[public_crl])
    assert not [record for record in caplog.records if "restore" in record.message]
    assert {
        path for path in all_bytes(elsewhere) if path.name != ".folder-id" and "portal.db" not in path.name
    } == before


# --- The command ------------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_the_exit_status_says_that_not_all_is_known(story: Story, tmp_path: Path) -> None:
    saved = tmp_path / "saved.crl"
    shutil.move(story.settings.broker_file("crl.pem"), saved)
    lose_the_database(story.settings)
    app = create_app(story.settings, background=False)
    runner = app.test_cli_runner()
    with app.app_context():
        without = runner.invoke(args=["restore", str(story.file), "--replace"])
        lose_the_database(story.settings)
        with_crl = runner.invoke(args=["restore", str(story.file), "--replace", "--crl", str(saved)])
    assert without.exit_code == 3, without.output
    assert "Not known      certificates of issuing" in without.output
    assert with_crl.exit_code == 3, with_crl.output
    assert f"Kept revoked   device {story.goes.device_id}" in with_crl.output
