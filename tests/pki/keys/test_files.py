"""How the private keys of the CAs are kept."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from ca import generate_keypair
from core.errors import CaKeyUnavailable
from pki.algorithms import PBKDF2_ROUNDS, KeyType, PrivateKey, encrypt_private_key, public_key_der
from pki.keys.contract import CaKeys
from pki.keys.files import KeyFiles, passphrase

PASSPHRASE = b"a passphrase for tests"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ca"


@pytest.fixture
def keys(folder: Path) -> KeyFiles:
    return KeyFiles(folder, PASSPHRASE)


def put(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / "root.key.pem"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def encrypted(key: PrivateKey) -> bytes:
    return encrypt_private_key(key, PASSPHRASE, rounds=1)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- Key files ----------------------------------------------------------------------------------------------------


def test_a_key_that_was_made_can_be_loaded_again(keys: CaKeys) -> None:
    created = keys.create("issuing-1", KeyType.EC_P256)
    assert keys.exists("issuing-1")
    assert keys.load("issuing-1").public_key() == created.public_key()


def test_a_key_is_a_file_of_mode_0600_in_a_folder_of_mode_0700(keys: CaKeys, folder: Path) -> None:
    folder.mkdir(mode=0o755)
    keys.create("root", KeyType.EC_P384)
    assert [path.name for path in folder.iterdir()] == ["root.key.pem"]
    assert mode_of(folder / "root.key.pem") == 0o600
    assert mode_of(folder) == 0o700


def test_a_key_that_is_destroyed_is_gone_with_what_was_set_aside_of_it(keys: KeyFiles, folder: Path) -> None:
    for name in ("issuing-1", "issuing-2"):
        keys.create(name, KeyType.EC_P256)
    aside = keys.set_aside("issuing-1")
    aside.with_name("issuing-1.key.pem").write_bytes(aside.read_bytes())
    for _ in range(2):
        keys.destroy("issuing-1")
        assert [path.name for path in folder.iterdir()] == ["issuing-2.key.pem"]


def test_openssl_opens_a_key_with_the_passphrase_only(keys: CaKeys, folder: Path) -> None:
    created = keys.create("root", KeyType.EC_P384)
    command = ["openssl", "pkey", "-in", str(folder / "root.key.pem"), "-pubout", "-passin"]
    opened = subprocess.run([*command, f"pass:{PASSPHRASE.decode()}"], check=True, capture_output=True)
    assert opened.stdout == created.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    refused = subprocess.run([*command, "pass:another passphrase"], check=False, capture_output=True)
    assert refused.returncode != 0


@pytest.mark.parametrize("kind", [KeyType.EC_P256, KeyType.EC_P384, KeyType.ED25519, KeyType.RSA_2048])
def test_every_kind_of_key_can_be_encrypted(kind: KeyType) -> None:
    key = generate_keypair(kind)
    loaded = load_pem_private_key(encrypted(key), PASSPHRASE)
    assert loaded.public_key() == key.public_key()


def test_a_passphrase_is_stretched_and_never_twice_alike(folder: Path) -> None:
    key = generate_keypair(KeyType.EC_P256)
    first, second = encrypt_private_key(key, PASSPHRASE), encrypt_private_key(key, PASSPHRASE)
    assert first != second
    put(folder, first)
    command = ["openssl", "asn1parse", "-in", str(folder / "root.key.pem")]
    structure = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for part in ("PBES2", "PBKDF2", "hmacWithSHA256", "aes-256-cbc", f"INTEGER           :{PBKDF2_ROUNDS:06X}"):
        assert part in structure


def test_a_key_that_openssl_encrypted_can_be_loaded(keys: CaKeys, folder: Path) -> None:
    key = generate_keypair(KeyType.EC_P384)
    clear = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    command = ["openssl", "pkcs8", "-topk8", "-iter", "1000", "-passout", f"pass:{PASSPHRASE.decode()}"]
    put(folder, subprocess.run(command, input=clear, check=True, capture_output=True).stdout)
    assert keys.load("root").public_key() == key.public_key()


def test_a_key_that_is_there_is_never_replaced(keys: CaKeys, folder: Path) -> None:
    path = put(folder, b"whatever this is")
    with pytest.raises(CaKeyUnavailable, match="never replaced"):
        keys.create("root", KeyType.EC_P384)
    assert path.read_bytes() == b"whatever this is"
    assert list(folder.iterdir()) == [path]


def test_a_link_that_leads_nowhere_is_not_replaced_either(keys: CaKeys, folder: Path) -> None:
    folder.mkdir()
    (folder / "root.key.pem").symlink_to("/nonexistent/token")
    assert keys.exists("root")
    with pytest.raises(CaKeyUnavailable, match="never replaced"):
        keys.create("root", KeyType.EC_P384)


def test_of_many_that_create_a_key_at_once_one_succeeds(folder: Path) -> None:
    made: list[bytes] = []
    refused: list[str] = []
    start = threading.Barrier(4)

    def create() -> None:
        start.wait()
        try:
            made.append(public_key_der(KeyFiles(folder, PASSPHRASE).create("root", KeyType.EC_P256).public_key()))
        except CaKeyUnavailable as refusal:
            refused.append(refusal.detail)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 3)
    assert public_key_der(KeyFiles(folder, PASSPHRASE).load("root").public_key()) == made[0]
    assert [path.name for path in folder.iterdir()] == ["root.key.pem"]


def test_a_key_that_was_moved_away_is_missing(keys: CaKeys, folder: Path, tmp_path: Path) -> None:
    put(folder, encrypted(generate_keypair(KeyType.EC_P384))).rename(tmp_path / "elsewhere")
    assert not keys.exists("root")
    with pytest.raises(
        CaKeyUnavailable, match=r"root\.key\.pem cannot be read \(No such file or directory\); restore it"
    ):
        keys.load("root")


def test_a_wrong_passphrase_is_reported_without_being_shown(folder: Path) -> None:
    put(folder, encrypted(generate_keypair(KeyType.EC_P384)))
    with pytest.raises(CaKeyUnavailable, match=r"root\.key\.pem does not open: .*PORTAL_CA_PASSPHRASE") as refusal:
        KeyFiles(folder, b"another passphrase").load("root")
    assert "another passphrase" not in f"{refusal.value!r} {refusal.value.__cause__!r}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o777])
def test_a_key_that_is_open_to_others_is_refused(keys: CaKeys, folder: Path, mode: int) -> None:
    put(folder, encrypted(generate_keypair(KeyType.EC_P384)), mode)
    with pytest.raises(CaKeyUnavailable, match=r"open to other users; .*chmod 600 .*root\.key\.pem"):
        keys.load("root")


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_of_the_owner_alone_is_loaded(keys: CaKeys, folder: Path, mode: int) -> None:
    put(folder, encrypted(generate_keypair(KeyType.EC_P384)), mode)
    assert keys.load("root")


def test_a_key_that_belongs_to_another_user_is_refused(
    keys: CaKeys, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(folder, encrypted(generate_keypair(KeyType.EC_P384)))
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CaKeyUnavailable, match="belongs to another user"):
        keys.load("root")


def x25519_key() -> bytes:
    return x25519.X25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSPHRASE)
    )


DAMAGED = {
    "empty": b"",
    "binary": bytes(range(256)),
    "truncated": encrypted(generate_keypair(KeyType.EC_P384))[:200],
    "zeros at the end": encrypted(generate_keypair(KeyType.EC_P384))[:-60] + bytes(60),
    "not encrypted": generate_keypair(KeyType.EC_P384).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    "nothing in it": b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n-----END ENCRYPTED PRIVATE KEY-----\n",
    "of a kind that cannot sign": x25519_key(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_key_is_refused_by_name(keys: CaKeys, folder: Path, content: bytes) -> None:
    put(folder, content)
    with pytest.raises(CaKeyUnavailable, match=r"root\.key\.pem .*restore"):
        keys.load("root")


def test_a_folder_or_a_pipe_in_place_of_a_key_is_refused(keys: CaKeys, folder: Path) -> None:
    (folder / "root.key.pem").mkdir(parents=True)
    with pytest.raises(CaKeyUnavailable):
        keys.load("root")
    os.mkfifo(folder / "pipe.key.pem", 0o600)
    with pytest.raises(CaKeyUnavailable, match="not a regular file"):
        keys.load("pipe")


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CaKeyUnavailable, match=r"cannot be written"):
        KeyFiles(tmp_path / "file" / "ca", PASSPHRASE).create("root", KeyType.EC_P256)


@pytest.mark.parametrize("name", ["", "..", "../root", "a/b", "/etc/passwd", "Root", "root\n", "root.key"])
def test_a_name_never_leads_out_of_the_folder(keys: CaKeys, name: str) -> None:
    with pytest.raises(CaKeyUnavailable):
        keys.exists(name)


def test_key_files_do_not_show_the_passphrase(folder: Path) -> None:
    assert PASSPHRASE.decode() not in repr(KeyFiles(folder, PASSPHRASE))


# --- Passphrase ---------------------------------------------------------------------------------------------------


def test_a_passphrase_that_is_given_is_used_and_no_file_made(tmp_path: Path) -> None:
    assert passphrase("pässphrase of an operator", tmp_path / "file") == "pässphrase of an operator".encode()
    assert list(tmp_path.iterdir()) == []


def test_a_passphrase_file_is_made_once_with_256_random_bits(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "ca-passphrase"
    made = passphrase("", path)
    assert len(made) == 43  # 32 bytes in Base64
    assert mode_of(path) == 0o600
    assert mode_of(path.parent) == 0o700
    assert passphrase("", path) == made
    assert passphrase("", tmp_path / "secrets" / "other") != made
    assert {entry.name for entry in path.parent.iterdir()} == {"ca-passphrase", "other"}


def test_a_passphrase_file_that_is_there_is_read_and_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "ca-passphrase"
    made = passphrase("", path)
    before = path.parent.stat().st_mtime_ns
    assert passphrase("", path) == made
    assert path.parent.stat().st_mtime_ns == before


def test_a_missing_passphrase_file_is_not_made_for_a_backup(tmp_path: Path) -> None:
    with pytest.raises(CaKeyUnavailable, match="put your copy of it there, or set PORTAL_CA_PASSPHRASE"):
        passphrase("", tmp_path / "ca-passphrase", make=False)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_start_together_get_the_same_passphrase(tmp_path: Path) -> None:
    found: list[bytes] = []
    start = threading.Barrier(8)

    def read() -> None:
        start.wait()
        found.append(passphrase("", tmp_path / "secrets" / "ca-passphrase"))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (b"x" * 43, 0o640, "open to other users"),
        (b"x" * 43, 0o604, "open to other users"),
        (b"", 0o600, "damaged"),
        (b"\n\n\n", 0o600, "damaged"),
        (b"too short\n", 0o600, "damaged"),
    ],
)
def test_a_passphrase_file_that_is_open_or_damaged_is_refused(
    tmp_path: Path, content: bytes, mode: int, told: str
) -> None:
    path = tmp_path / "ca-passphrase"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(CaKeyUnavailable, match=told) as refusal:
        passphrase("", path)
    assert str(path) in refusal.value.detail
    assert path.read_bytes() == content
