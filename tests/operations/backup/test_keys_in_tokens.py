"""A backup of a portal whose keys are in a token: it holds none of them, and is restored only where the token is."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from app import create_app
from config import Settings
from core.errors import BackupRefused, CaKeyUnavailable
from core.pkcs11_uri import TokenUri
from core.states import DeviceStatus
from operations import authority
from operations.backup.archive import MANIFEST, SEAL, seal_of
from pki.algorithms import KeyType, generate_key
from pki.keys.contract import Origin, sign_message
from pki.keys.stores import KeyStores
from store import audit
from tests.support.backups import all_bytes, bring_passphrase, copied, opened, put_back, status_of
from tests.support.harness import Clock, first_start, settings_for
from tests.support.mosquitto import short_folder
from tests.support.tokens import SoftTokens
from tests.workflows.test_registration import OPERATOR, PUMP

RECORD = "ca/issuing-1.token.json"


def in_token(folder: Path, uri: TokenUri, *, after: str = "") -> Settings:
    return settings_for(folder, PORTAL_CA_KEYS=f"{uri} {after}".strip(), PORTAL_TOKEN_TIMEOUT="60")


@pytest.fixture(scope="module")
def uri(soft_tokens: SoftTokens) -> TokenUri:
    return soft_tokens.create()


@pytest.fixture(scope="module")
def started(uri: TokenUri) -> Iterator[Path]:
    """A data folder whose keys were born in a token; copied, never used."""
    folder = short_folder(in_memory=True)
    first_start(in_token(folder, uri))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def settings(started: Path, uri: TokenUri, tmp_path: Path) -> Settings:
    shutil.copytree(started, tmp_path / "data", symlinks=True)
    return in_token(tmp_path / "data", uri)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere"


def rewritten(file: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Write a backup again with other members, as somebody does who has it."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_it_holds_no_key_says_so_and_is_restored_where_the_token_is(
    settings: Settings, uri: TokenUri, elsewhere: Path, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        device = portal.registrations.register(OPERATOR, PUMP)
    app = create_app(settings, background=False)
    with app.app_context():
        said = app.test_cli_runner().invoke(args=["backup", str(file)]).output
    assert f"the key of issuing-1, which stays in the token '{uri.token}'" in said
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        assert b"BEGIN ENCRYPTED PRIVATE KEY" not in b"".join(map(archive.read, names))
    assert {name for name in names if name.startswith("ca/")} == {"ca/root.token.json", RECORD}
    target = in_token(elsewhere, uri)
    put_back(target, file, clock, replace=False)
    with opened(target, clock) as portal:
        assert portal.keys.describe("issuing-1").origin is Origin.BORN_IN_TOKEN
        assert status_of(portal, device) is DeviceStatus.ACTIVE
        portal.registrations.register(OPERATOR, PUMP)


def test_what_is_restored_to_the_same_folder_keeps_its_keys(settings: Settings, file: Path, clock: Clock) -> None:
    copied(settings, file, clock)
    before = (settings.ca_dir / "issuing-1.token.json").read_bytes()
    put_back(settings, file, clock)
    assert (settings.ca_dir / "issuing-1.token.json").read_bytes() == before
    assert not list(settings.ca_dir.glob("*before-restore*"))


def named_nowhere(folder: Path, _uri: TokenUri, _patch: pytest.MonkeyPatch) -> Settings:
    return settings_for(folder)


def in_another_token(folder: Path, uri: TokenUri, patch: pytest.MonkeyPatch) -> Settings:
    """On a machine with one token, which has the label of the lost one."""
    others = folder.with_name("other tokens")
    others.mkdir()
    tokens = SoftTokens(others).set_up()
    patch.setenv("SOFTHSM2_CONF", tokens.environment["SOFTHSM2_CONF"])
    return in_token(folder, replace(tokens.create(uri.token), object=uri.object))


def without_its_pin(folder: Path, uri: TokenUri, _patch: pytest.MonkeyPatch) -> Settings:
    return in_token(folder, replace(uri, pin_file=Path("/nonexistent/pin")))


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        (named_nowhere, r"in the token '.*', which PORTAL_CA_KEYS does not name"),
        (in_another_token, "was replaced by another one, which does not have the keys"),
        (without_its_pin, "/nonexistent/pin cannot be read"),
    ],
)
def test_without_the_token_nothing_is_restored(
    settings: Settings,
    uri: TokenUri,
    elsewhere: Path,
    file: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    where: Callable[[Path, TokenUri, pytest.MonkeyPatch], Settings],
    sentence: str,
) -> None:
    copied(settings, file, clock)
    target = where(elsewhere, uri, monkeypatch)
    with pytest.raises(CaKeyUnavailable, match=f"{sentence}.* bring it here") as refusal:
        put_back(target, file, clock, replace=False)
    assert "nothing was changed" in refusal.value.detail
    assert not (elsewhere / "portal.db").exists()
    assert not [path for path in all_bytes(target) if path.suffix in {".json", ".pem"}]
    left = {path.name for path in elsewhere.iterdir() if path.is_dir()}
    assert left == {"secrets"} | ({"ca"} if where is without_its_pin else set()), (
        "the PIN's lock, where it was asked for"
    )


def test_a_key_in_the_token_that_is_not_the_certificates_is_noticed(
    settings: Settings, uri: TokenUri, elsewhere: Path, file: Path, clock: Clock
) -> None:
    """As the first CA's key seals the backup, the second one's is what only the check of all keys sees."""
    with opened(settings, clock) as portal:
        authority.roll_over(portal, audit.system_actor(portal.first_tenant), lambda _: None)
        other = KeyStores(elsewhere / "ca", b"", issuing=[replace(uri, object="o")], root=[uri], timeout=60.0)
        other.create("issuing-2", KeyType.EC_P256)
        other.close()
        shutil.copy(elsewhere / "ca" / "issuing-2.token.json", settings.ca_dir / "issuing-2.token.json")
        shutil.rmtree(elsewhere)
    copied(settings, file, clock)
    with pytest.raises(CaKeyUnavailable, match="issuing-2 in the token does not belong to its certificate"):
        put_back(in_token(elsewhere, uri), file, clock, replace=False)
    assert not (elsewhere / "portal.db").exists()


# --- Who has the backup, and not the token ----------------------------------------------------------------------------


def changed(members: dict[str, bytes]) -> None:
    manifest: dict[str, Any] = json.loads(members[MANIFEST])
    members[MANIFEST] = json.dumps({**manifest, "generation": 7}).encode()


def sealed_by_nobody(members: dict[str, bytes]) -> None:
    members[SEAL] = b"signature:zz"


def sealed_by_another_key(members: dict[str, bytes]) -> None:
    members[SEAL] = seal_of(members[MANIFEST], generate_key(KeyType.EC_P256)).encode()


@pytest.mark.parametrize("change", [changed, sealed_by_nobody, sealed_by_another_key])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_backup_that_was_changed_is_refused(
    settings: Settings,
    uri: TokenUri,
    elsewhere: Path,
    file: Path,
    clock: Clock,
    change: Callable[[dict[str, bytes]], None],
    is_new: bool,
) -> None:
    copied(settings, file, clock)
    rewritten(file, change)
    with pytest.raises(BackupRefused, match="changed after it was written"):
        put_back(in_token(elsewhere, uri) if is_new else settings, file, clock)


def test_a_backup_sealed_by_a_key_of_ones_own_is_not_believed(
    settings: Settings,
    soft_tokens: SoftTokens,
    uri: TokenUri,
    elsewhere: Path,
    tmp_path: Path,
    file: Path,
    clock: Clock,
) -> None:
    """Somebody made a portal of the same name in a token of his own, and has its backup restored."""
    his = in_token(tmp_path / "his", soft_tokens.create())
    first_start(his)
    copied(his, file, clock)
    with pytest.raises(CaKeyUnavailable, match=r"which PORTAL_CA_KEYS does not name|does not have the key"):
        put_back(in_token(elsewhere, uri), file, clock, replace=False)
    assert not (elsewhere / "portal.db").exists()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_backup_that_brings_the_key_that_sealed_it_is_not_believed(
    settings: Settings, uri: TokenUri, elsewhere: Path, file: Path, clock: Clock, is_new: bool
) -> None:
    """Its issuers and their keys are the right ones: only the token knows that it has no key of the other name."""
    copied(settings, file, clock)
    his = generate_key(KeyType.EC_P256)
    assert isinstance(his, ec.EllipticCurvePrivateKey)

    def change(members: dict[str, bytes]) -> None:
        point = his.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        record = json.dumps({**json.loads(members[RECORD]), "label": "his", "id": "07", "public": point.hex()}).encode()
        manifest: dict[str, Any] = json.loads(members[MANIFEST])
        manifest["members"]["ca/his.token.json"] = {"size": len(record), "sha256": hashlib.sha256(record).hexdigest()}
        content = json.dumps({**manifest, "sealed_by": "his", "generation": 7}).encode()
        signature = sign_message(his, b"onboarding portal: seal of a backup\n" + content)
        seal = f"signature:{signature.hex()}".encode()
        members |= {"ca/his.token.json": record, MANIFEST: content, SEAL: seal}

    rewritten(file, change)
    with pytest.raises(CaKeyUnavailable, match="does not have the key his"):
        put_back(in_token(elsewhere, uri) if is_new else settings, file, clock)


# --- Keys that were moved since ---------------------------------------------------------------------------------------


def test_a_backup_from_before_a_move_does_not_bring_the_keys_file_back(
    uri: TokenUri, tmp_path: Path, file: Path, clock: Clock, elsewhere: Path
) -> None:
    settings = in_token(tmp_path / "data", replace(uri, object="moved"), after="file")
    first_start(settings_for(settings.data_dir))
    copied(settings, file, clock)
    with opened(settings, clock) as portal:
        authority.move_key(portal, audit.system_actor(portal.first_tenant), "issuing-1")
    put_back(settings, file, clock)
    assert not (settings.ca_dir / "issuing-1.key.pem").exists()
    with opened(settings, clock) as portal:
        assert portal.keys.describe("issuing-1").origin is Origin.IMPORTED
        portal.registrations.register(OPERATOR, PUMP)
    before = settings_for(elsewhere)
    elsewhere.mkdir()
    bring_passphrase(settings, before)
    put_back(before, file, clock, replace=False)  # the key's file is in this backup, so that no token is needed
    with opened(before, clock) as portal:
        assert portal.keys.describe("issuing-1").origin is Origin.FILE
