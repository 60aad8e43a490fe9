"""Bundles that wait: sealed until they are fetched, in the format that is asked for then."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pyzipper
import sqlalchemy as sa
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.serialization import load_pem_private_key, pkcs12

import credential_delivery
from commands.bundle import check_bundle, open_bundle
from core.errors import LinkUnknown, LinkUsed, StateConflict
from credential_delivery import DownloadToken, SealedSecrets
from delivery.formats import BundleFormat
from operations.wiring import Portal
from pki.algorithms import certificate_key_fingerprint, public_key_fingerprint
from store import audit
from store.tables import Certificate, Delivery
from tests.support.harness import Clock
from tests.workflows.test_registration import OPERATOR, PUMP, token_of
from workflows.registration import Registered

CHOSEN = "a password of one's own"
KEY = "an-idempotency-key"


def link_keys(portal: Portal) -> list[str]:
    return (portal.settings.secrets_dir / "link-keys").read_text().split()


def link_of(portal: Portal, registered: Registered) -> DownloadToken:
    return credential_delivery.read_download_token(
        token_of(registered), link_keys(portal), now=portal.clock(), max_age=timedelta(days=1)
    )


def signed(portal: Portal, link: DownloadToken) -> str:
    """The token of a link that somebody with the portal's link keys signs."""
    url = credential_delivery.generate_download_link(
        link.delivery_id, link_keys(portal), public_url="", now=portal.clock(), secret=link.secret
    )
    return url.rpartition("/")[2]


def row_of(portal: Portal, registered: Registered) -> Any:
    wanted = sa.select(Delivery.status, Delivery.bundle, Delivery.sealed, Delivery.format)
    with portal.database.snapshot() as tx:
        return tx.execute(wanted.where(Delivery.device_id == registered.device_id)).one()


def sealed_of(portal: Portal, registered: Registered) -> bytes:
    row = row_of(portal, registered)
    assert row.sealed
    assert isinstance(row.bundle, bytes)
    return row.bundle


def test_what_waits_is_a_few_hundred_bytes_and_is_not_a_bundle(portal: Portal) -> None:
    sealed = sealed_of(portal, portal.registrations.register(OPERATOR, PUMP))
    assert len(sealed) < 256
    assert not zipfile.is_zipfile(io.BytesIO(sealed))


def test_the_secret_of_a_link_is_nowhere_in_the_data_folder(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP, KEY)
    secret = link_of(portal, registered).secret
    assert len(secret) == 22
    assert registered.bundle_password is not None
    portal.reconciler.install()
    files = [path for path in portal.settings.data_dir.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert secret.encode() not in content, path
        assert registered.bundle_password.encode() not in content, path


def test_whoever_has_the_data_folder_signs_a_link_that_opens_nothing_and_spends_nothing(portal: Portal) -> None:
    registered, other = (portal.registrations.register(OPERATOR, PUMP) for _ in range(2))
    link = link_of(portal, registered)
    for secret in ("", "A" * 22, link_of(portal, other).secret):
        with pytest.raises(LinkUnknown):
            portal.deliveries.deliver(OPERATOR, signed(portal, dataclasses.replace(link, secret=secret)))
    assert portal.deliveries.deliver(OPERATOR, token_of(registered)).content


def test_link_and_data_folder_together_open_a_bundle_without_its_password(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    about = f"{registered.device_id}/{registered.fingerprint}"
    sealed, link, keys = sealed_of(portal, registered), link_of(portal, registered), link_keys(portal)
    assert SealedSecrets.open(sealed, link, keys, about=about).password == registered.bundle_password
    with pytest.raises(LinkUnknown):  # without the portal's key
        SealedSecrets.open(sealed, link, ["another-key"], about=about)


def test_what_is_sealed_goes_with_no_other_device_or_certificate(portal: Portal) -> None:
    registered, other = (portal.registrations.register(OPERATOR, PUMP) for _ in range(2))
    theirs = sa.select(Certificate.id).where(Certificate.device_id == other.device_id).scalar_subquery()
    with portal.database.transaction() as tx:
        of_device = Delivery.device_id == registered.device_id
        tx.execute(sa.update(Delivery).where(of_device).values(certificate_id=theirs))
    with pytest.raises(LinkUnknown):
        portal.deliveries.deliver(OPERATOR, token_of(registered))


@pytest.mark.parametrize("form", BundleFormat)
@pytest.mark.parametrize("registered_as", [None, "p12"])
def test_a_bundle_is_made_in_the_format_that_is_asked_for(
    portal: Portal, form: BundleFormat, registered_as: str | None
) -> None:
    registered = portal.registrations.register(OPERATOR, dataclasses.replace(PUMP, bundle_format=registered_as))
    token, password = token_of(registered), registered.bundle_password
    assert password is not None
    assert portal.deliveries.check_download(token, None, form).format == form
    bundle = portal.deliveries.deliver(OPERATOR, token, bundle_format=form)
    assert bundle.format is form
    assert tuple(row_of(portal, registered)) == ("delivered", None, True, form)
    if form is BundleFormat.P12:
        key = pkcs12.load_key_and_certificates(bundle.content, password.encode())[0]
    else:
        with pyzipper.AESZipFile(io.BytesIO(bundle.content)) as archive:
            archive.setpassword(password.encode())
            pem = archive.read("device.key")
        key = load_pem_private_key(pem, password.encode() if form is BundleFormat.PEM else None)
    assert key is not None
    with portal.database.snapshot() as tx:
        der = tx.execute(sa.select(Certificate.der).where(Certificate.device_id == registered.device_id)).scalar_one()
    assert public_key_fingerprint(key.public_key()) == certificate_key_fingerprint(der)  # type: ignore[arg-type]


def test_without_a_wish_it_is_the_format_that_was_registered_and_the_commands_accept_it(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    bundle = portal.deliveries.deliver(OPERATOR, token_of(registered))
    assert bundle.format is BundleFormat.ZIP
    assert registered.bundle_password is not None
    checked = check_bundle(open_bundle(bundle.content, registered.bundle_password), now=portal.clock())
    assert (checked.device_id, checked.fingerprint) == (registered.device_id, registered.fingerprint)


def test_7z_opens_what_is_fetched_with_the_password_alone(portal: Portal, tmp_path: Path) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    bundle = tmp_path / "bundle.zip"
    bundle.write_bytes(portal.deliveries.deliver(OPERATOR, token_of(registered)).content)
    for password, status in ((registered.bundle_password, 0), ("another password", 2)):
        command = ["7z", "t", f"-p{password}", str(bundle)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == status


def test_a_password_that_a_person_chose_is_kept_in_no_form(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, dataclasses.replace(PUMP, bundle_password=CHOSEN))
    row = row_of(portal, registered)
    assert not row.sealed
    assert link_of(portal, registered).secret == ""
    assert row.bundle is not None
    assert open_bundle(row.bundle, CHOSEN).files["device.key"]
    with pytest.raises(StateConflict, match="made as zip"):
        portal.deliveries.deliver(OPERATOR, token_of(registered), bundle_format=BundleFormat.P12)
    fetched = portal.deliveries.deliver(OPERATOR, token_of(registered), bundle_format=BundleFormat.ZIP)
    assert fetched.content == row.bundle


def test_a_bundle_that_an_older_version_made_is_handed_out_as_it_is(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    with portal.database.transaction() as tx:
        tx.execute(sa.update(Delivery).values(bundle=b"PK of an older version", sealed=False))
    older = signed(portal, DownloadToken(link_of(portal, registered).delivery_id))
    assert portal.deliveries.deliver(OPERATOR, older).content == b"PK of an older version"
    with pytest.raises(LinkUsed):
        portal.deliveries.deliver(OPERATOR, older)


def test_a_repeat_gets_the_same_bytes_and_no_other_format(portal: Portal, clock: Clock) -> None:
    token = token_of(portal.registrations.register(OPERATOR, PUMP))
    first = portal.deliveries.deliver(OPERATOR, token, KEY, BundleFormat.PEM)
    assert portal.deliveries.deliver(OPERATOR, token, KEY) == first
    assert portal.deliveries.deliver(OPERATOR, token, KEY, BundleFormat.PEM) == first
    assert portal.deliveries.check_download(token, KEY).length == len(first.content)
    with pytest.raises(StateConflict, match="made as pem"):
        portal.deliveries.deliver(OPERATOR, token, KEY, BundleFormat.ZIP)
    clock.advance(seconds=portal.settings.link_grace + 1)
    with pytest.raises(LinkUsed):
        portal.deliveries.deliver(OPERATOR, token, KEY)


def test_a_key_is_derived_for_each_encrypted_entry_and_none_at_the_registration(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    salts: list[bytes] = []

    def counted(algorithm: object, length: int, salt: bytes, rounds: int) -> object:
        salts.append(salt)
        return PBKDF2HMAC(algorithm, length, salt, rounds)  # type: ignore[arg-type]

    monkeypatch.setattr("delivery.formats.PBKDF2HMAC", counted)
    registered = portal.registrations.register(OPERATOR, PUMP)
    assert salts == []
    bundle = portal.deliveries.deliver(OPERATOR, token_of(registered))
    with zipfile.ZipFile(io.BytesIO(bundle.content)) as archive:
        encrypted = [entry.filename for entry in archive.infolist() if entry.flag_bits & 1]
    assert encrypted == ["device.key", "ca.pem", "SHA256SUMS"]
    assert len(set(salts)) == len(salts) == len(encrypted)


def test_what_is_fetched_trusts_the_cas_of_that_time(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    assert registered.bundle_password is not None
    bundle = portal.deliveries.deliver(OPERATOR, token_of(registered))
    files = open_bundle(bundle.content, registered.bundle_password).files
    assert files["ca.pem"].decode() == portal.authority.of("default").ca_pem
    assert files["chain.pem"].startswith(files["device.pem"])


def test_an_interrupted_fetch_leaves_the_link_as_it_was(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)

    def fails(*_: object, **__: object) -> None:
        raise OSError(os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(audit, "record_all", fails)
        with pytest.raises(OSError, match="No space"):
            portal.deliveries.deliver(OPERATOR, token_of(registered))
    assert portal.deliveries.deliver(OPERATOR, token_of(registered)).content
