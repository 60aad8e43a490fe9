"""CA keys in a PKCS#11 token: made there, found again, and never replaced."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from core.errors import CaKeyUnavailable, TokenUnavailable
from core.pkcs11_uri import TokenUri
from pki.algorithms import KeyType, generate_key
from pki.keys.contract import Origin, check_that_it_signs
from pki.keys.stores import FILES, KeyStores
from pki.keys.token_client import Facts, TokenClient
from pki.keys.tokens import read_record, record_path
from tests.support.tokens import MODULE, SoftTokens

PASSPHRASE = b"a passphrase for tests"
LIMIT = 60.0  # of a request: it must not end a test on a busy machine


@pytest.fixture(scope="module")
def uri(soft_tokens: SoftTokens) -> TokenUri:
    return soft_tokens.create()


def stores(folder: Path, *places: TokenUri | None) -> KeyStores:
    return KeyStores(folder, PASSPHRASE, issuing=places, root=places, timeout=LIMIT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ca"


@pytest.fixture
def own(uri: TokenUri, tmp_path: Path) -> TokenUri:
    """The module's token with names of keys for one test."""
    return replace(uri, object=tmp_path.name[-32:])


@pytest.fixture
def keys(folder: Path, own: TokenUri) -> Iterator[KeyStores]:
    opened = stores(folder, own)
    yield opened
    opened.close()


LONG = pytest.mark.long
IN_TOKENS = [
    KeyType.EC_P256,
    KeyType.EC_P384,
    KeyType.ED25519,
    pytest.param(KeyType.RSA_3072, marks=LONG),
    pytest.param(KeyType.RSA_4096, marks=LONG),
]


@pytest.mark.parametrize("kind", IN_TOKENS)
def test_a_key_is_made_in_the_token_and_cannot_leave_it(keys: KeyStores, folder: Path, kind: KeyType) -> None:
    key = keys.create("issuing-1", kind)
    check_that_it_signs(key)
    assert keys.describe("issuing-1").origin is Origin.BORN_IN_TOKEN
    assert read_record(folder, "issuing-1").birth == {
        "local": True,
        "sensitive": True,
        "extractable": False,
        "always_sensitive": True,
        "never_extractable": True,
    }
    with pytest.raises(CaKeyUnavailable, match="cannot leave"):
        key.private_bytes(None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", IN_TOKENS)
def test_a_key_made_elsewhere_can_be_moved_in_and_is_said_to_be_imported(keys: KeyStores, kind: KeyType) -> None:
    made = generate_key(kind)
    moved = keys.adopt("issuing-1", made)
    check_that_it_signs(moved)
    assert moved.public_key() == made.public_key()
    assert keys.describe("issuing-1").origin is Origin.IMPORTED


def test_a_token_may_take_a_minute_to_make_a_key_whatever_a_request_may_wait(
    keys: KeyStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, float | None] = {}
    ask = TokenClient.ask

    def noted(client: TokenClient, request: Facts, *, seconds: float | None = None) -> Facts:
        limits[request["do"]] = seconds
        return ask(client, request, seconds=seconds)

    monkeypatch.setattr(TokenClient, "ask", noted)
    check_that_it_signs(keys.create("issuing-1", KeyType.EC_P256))
    assert (limits["make"] or 0) >= 60
    assert limits["sign"] is None


def test_another_process_finds_the_key_by_its_record(keys: KeyStores, folder: Path, own: TokenUri) -> None:
    made = keys.create("root", KeyType.EC_P384)
    other = stores(folder, own)
    try:
        loaded = other.load("root")
        assert loaded.public_key() == made.public_key()
        check_that_it_signs(loaded)
    finally:
        other.close()


def test_the_record_is_a_private_file_without_a_secret(keys: KeyStores, folder: Path, own: TokenUri) -> None:
    keys.create("root", KeyType.EC_P384)
    path = record_path(folder, "root")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert own.pin_file.read_text().strip() not in path.read_text()
    assert json.loads(path.read_text())["token"]["token"] == own.token


def test_the_place_of_a_key_is_the_token_that_made_it_not_what_the_setting_says(
    keys: KeyStores, folder: Path, own: TokenUri
) -> None:
    keys.create("root", KeyType.EC_P384)
    serial = read_record(folder, "root").token["serial"]
    told = f"pkcs11:token={own.token};serial={serial} ({own.object}-root)".replace(" ", "%20", 1)
    other = stores(folder, replace(own, token=None, serial=serial))
    for described in (keys.describe("root"), other.describe("root"), keys.examine("root")):
        assert described.place == told
    other.close()


def test_a_key_is_labelled_by_the_name_of_its_ca(keys: KeyStores, own: TokenUri, soft_tokens: SoftTokens) -> None:
    keys.create("issuing-7", KeyType.EC_P256)
    listed = soft_tokens.tool(own, "--list-objects", "--type", "privkey")
    assert f"label:      {own.object}-issuing-7" in listed


def test_a_key_that_is_there_is_never_replaced(keys: KeyStores) -> None:
    made = keys.create("root", KeyType.EC_P384)
    with pytest.raises(CaKeyUnavailable, match="never replaced"):
        keys.create("root", KeyType.EC_P384)
    with pytest.raises(CaKeyUnavailable, match="never replaced"):
        keys.adopt("root", generate_key(KeyType.EC_P384))
    assert keys.load("root").public_key() == made.public_key()


def test_a_key_of_another_portal_in_the_token_is_not_taken_for_ones_own(
    keys: KeyStores, tmp_path: Path, own: TokenUri
) -> None:
    keys.create("root", KeyType.EC_P384)
    other = stores(tmp_path / "another", own)
    try:
        with pytest.raises(TokenUnavailable, match=r"another portal or time .* set object="):
            other.create("root", KeyType.EC_P384)
        # What the error advises helps without anything else, also where the key was begun.
        elsewhere = replace(own, object=f"{own.object}-2"[-32:])
        renamed = stores(tmp_path / "another", elsewhere)
        check_that_it_signs(renamed.load("root"))
        renamed.close()
        assert read_record(tmp_path / "another", "root").label == f"{elsewhere.object}-root"
    finally:
        other.close()


def test_a_key_that_was_made_but_not_recorded_is_found_after_its_label_would_be_another(
    keys: KeyStores, folder: Path, own: TokenUri
) -> None:
    made = keys.create("root", KeyType.EC_P384)
    forget(folder, "root")
    renamed = stores(folder, replace(own, object=f"{own.object}-2"[-32:]))
    try:
        assert renamed.load("root").public_key() == made.public_key()
        assert read_record(folder, "root").label == f"{own.object}-root"
    finally:
        renamed.close()


def forget(folder: Path, name: str) -> None:
    """Leave of a record what there is before the key is made."""
    record = json.loads(record_path(folder, name).read_text())
    record_path(folder, name).write_text(json.dumps({**record, "public": "", "token": {}, "birth": {}}))


def test_a_making_that_was_cut_off_is_completed(keys: KeyStores, folder: Path, own: TokenUri) -> None:
    made = keys.create("root", KeyType.EC_P384)
    forget(folder, "root")
    assert keys.exists("root")
    assert keys.load("root").public_key() == made.public_key()
    begun = {"label": f"{own.object}-issuing-1", "id": "0a", "kind": "ec-p256"}
    record_path(folder, "issuing-1").touch(mode=0o600)
    record_path(folder, "issuing-1").write_text(json.dumps(begun))
    check_that_it_signs(keys.load("issuing-1"))
    assert read_record(folder, "issuing-1").id == "0a"


def test_a_key_can_be_read_before_its_token_is_asked(keys: KeyStores, folder: Path, own: TokenUri) -> None:
    made = keys.create("root", KeyType.EC_P384)
    gone = stores(folder, replace(own, module=Path("/nonexistent/module.so")))
    try:
        loaded = gone.load("root")
        assert loaded.public_key() == made.public_key()
        with pytest.raises(TokenUnavailable, match=r"there is no module /nonexistent/module\.so"):
            check_that_it_signs(loaded)
    finally:
        gone.close()


def test_each_key_is_where_it_was_made(folder: Path, own: TokenUri) -> None:
    before = stores(folder, FILES)
    root = before.create("root", KeyType.EC_P384)
    after = stores(folder, own, FILES)
    try:
        after.create("issuing-1", KeyType.EC_P256)
        assert after.load("root").public_key() == root.public_key()
        assert {after.describe(name).origin for name in ("root", "issuing-1")} == {Origin.FILE, Origin.BORN_IN_TOKEN}
        assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [
            "issuing-1.token.json",
            "root.key.pem",
        ]
    finally:
        after.close()


def test_a_key_in_a_token_that_no_setting_names_is_missing(keys: KeyStores, folder: Path) -> None:
    keys.create("issuing-1", KeyType.EC_P256)
    with pytest.raises(CaKeyUnavailable, match=r"in the token .*, which PORTAL_CA_KEYS does not name"):
        stores(folder, FILES).load("issuing-1")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"label": "a", "id": "b", "kind": "des"}', "\0"])
def test_a_damaged_record_is_refused_by_name(keys: KeyStores, folder: Path, content: str) -> None:
    folder.mkdir(mode=0o700)
    record_path(folder, "root").write_text(content)
    record_path(folder, "root").chmod(0o600)
    with pytest.raises(CaKeyUnavailable, match=r"root\.token\.json is damaged"):
        keys.load("root")


def test_the_module_is_where_the_tests_expect_it() -> None:
    assert os.path.exists(MODULE)


def test_a_key_that_is_destroyed_is_neither_in_the_token_nor_here_and_its_name_is_not_free(
    keys: KeyStores, folder: Path, own: TokenUri
) -> None:
    kept, key = keys.create("issuing-1", KeyType.EC_P256), keys.create("issuing-2", KeyType.EC_P256)
    record = read_record(folder, "issuing-2")
    keys.destroy("issuing-2")
    assert (keys.exists("issuing-2"), keys.is_taken("issuing-2"), keys.names()) == (False, True, ["issuing-1"])
    with pytest.raises((CaKeyUnavailable, TokenUnavailable)):
        check_that_it_signs(key)
    check_that_it_signs(kept)
    record_path(folder, "issuing-2").write_text(json.dumps(asdict(record)))  # as if it had been cut off in between
    record_path(folder, "issuing-2").chmod(0o600)
    with pytest.raises(TokenUnavailable):
        keys.examine("issuing-2")
    keys.destroy("issuing-2")
    assert not keys.exists("issuing-2")
