"""Bundles that are made at the download, opened by programs that we did not write: 7z, bsdtar, pyzipper and zip4j."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pyzipper
from flask import Flask

from core.roles import Role
from tests.support.harness import ON_SQLITE, api_as

pytestmark = ON_SQLITE

ZIP4J = Path(__file__).parents[1] / "support" / "Zip4j.java"
JARS = "/usr/share/java/zip4j.jar"
PYZIPPER = """
import os, sys, pyzipper
with pyzipper.AESZipFile(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2], pwd=os.environ["BUNDLE_PASSWORD"].encode())
"""
ENCRYPTED = {"device.key", "ca.pem", "SHA256SUMS"}
HEADER_BYTES, SALT_BYTES, VERIFIER_BYTES, MAC_BYTES, BLOCK_BYTES = 30, 16, 2, 10, 16


@dataclass(frozen=True)
class Delivered:
    """A bundle as its link gave it."""

    file: Path
    password: str

    @property
    def content(self) -> bytes:
        return self.file.read_bytes()


Extract = Callable[[Path, Path, str], list[str]]
# The command of each judge that extracts an archive into a folder that exists.
JUDGES: dict[str, Extract] = {
    "7z": lambda file, folder, password: ["7z", "x", f"-p{password}", f"-o{folder}", str(file)],
    "bsdtar": lambda file, folder, password: [
        "bsdtar",
        "-x",
        "--passphrase",
        password,
        "-C",
        str(folder),
        "-f",
        str(file),
    ],
    "pyzipper": lambda file, folder, _: [sys.executable, "-c", PYZIPPER, str(file), str(folder)],
    "zip4j": lambda file, folder, _: ["java", "-Xshare:auto", "-cp", JARS, str(ZIP4J), str(file), str(folder)],
}
each_judge = pytest.mark.parametrize(
    "judge", [name if name != "zip4j" else pytest.param(name, marks=pytest.mark.long) for name in JUDGES]
)


def downloaded(app: Flask, folder: Path, name: str = "bundle.zip") -> Delivered:
    """Register a device for which the portal chooses the password, and fetch its bundle, which is made then."""
    registered = api_as(app, Role.OPERATOR).register()
    file = folder / name
    file.write_bytes(api_as(app, None).get("/download/" + registered["download_url"].rpartition("/")[2]).data)
    return Delivered(file, registered["bundle_password"])


def extract(judge: str, file: Path, folder: Path, password: str) -> subprocess.CompletedProcess[bytes]:
    folder.mkdir()
    command = JUDGES[judge](file, folder, password)
    environment = {**os.environ, "BUNDLE_PASSWORD": password}
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@each_judge
def test_it_opens_with_the_password_and_everything_in_it_fits(shared_app: Flask, tmp_path: Path, judge: str) -> None:
    bundle = downloaded(shared_app, tmp_path)
    there = tmp_path / "there"
    done = extract(judge, bundle.file, there, bundle.password)
    assert done.returncode == 0, done.stderr
    sums = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    checked = subprocess.run(sums, cwd=there, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(checked) == sorted(f"{path.name}: OK" for path in there.iterdir() if path.name != "SHA256SUMS")
    assert {path.name for path in there.iterdir()} >= ENCRYPTED | {"device.pem", "chain.pem", "README.txt"}
    public = openssl("pkey", "-in", there / "device.key", "-pubout")
    assert public == openssl("x509", "-in", there / "device.pem", "-pubkey", "-noout")
    openssl("verify", "-CAfile", there / "ca.pem", "-untrusted", there / "chain.pem", there / "device.pem")


@each_judge
def test_it_opens_with_no_other_password(shared_app: Flask, tmp_path: Path, judge: str) -> None:
    bundle = downloaded(shared_app, tmp_path)
    there = tmp_path / "there"
    assert extract(judge, bundle.file, there, bundle.password[:-1]).returncode != 0
    for path in there.iterdir():
        assert path.name not in ENCRYPTED or not path.read_bytes().strip(b"\0")  # some leave the length alone


def test_7z_calls_it_aes_256_and_what_is_public_not_encrypted(shared_app: Flask, tmp_path: Path) -> None:
    bundle = downloaded(shared_app, tmp_path)
    command = ["7z", "l", "-slt", str(bundle.file)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("----------\n")[1]
    entries = [
        dict(line.split(" = ") for line in entry.splitlines() if " = " in line) for entry in listed.split("\n\n")
    ]
    methods = {entry["Path"]: (entry["Encrypted"], entry["Method"]) for entry in entries if entry}
    assert {name for name, (encrypted, _) in methods.items() if encrypted == "+"} == ENCRYPTED
    assert {method for encrypted, method in methods.values() if encrypted == "+"} == {"AES-256 Store"}


def test_each_encrypted_entry_has_a_salt_of_its_own_and_no_key_stream_is_used_twice(
    shared_app: Flask, tmp_path: Path
) -> None:
    """What a reader of two bundles could find: with one key stream for two texts it learns one from the other."""
    salts: list[bytes] = []
    blocks: list[bytes] = []
    for name in ("one.zip", "other.zip"):
        bundle = downloaded(shared_app, tmp_path, name)
        there = tmp_path / f"{name}-there"
        assert extract("bsdtar", bundle.file, there, bundle.password).returncode == 0
        with pyzipper.AESZipFile(bundle.file) as archive:
            entries = [entry for entry in archive.infolist() if entry.flag_bits & 1]
        for entry in entries:
            salt, encrypted = encrypted_parts(bundle.content, entry)
            salts.append(salt)
            text = (there / entry.filename).read_bytes()
            assert len(text) == len(encrypted)
            stream = bytes(one ^ other for one, other in zip(encrypted, text, strict=True))
            blocks += [
                stream[at : at + BLOCK_BYTES] for at in range(0, len(stream) // BLOCK_BYTES * BLOCK_BYTES, BLOCK_BYTES)
            ]
    assert len(salts) == len(set(salts)) == 2 * len(ENCRYPTED)
    assert len(blocks) == len(set(blocks)) > 100


def encrypted_parts(archive: bytes, entry: pyzipper.zipfile_aes.AESZipInfo) -> tuple[bytes, bytes]:
    """The salt of an entry and its encrypted content, without verifier and authentication code (WinZip's AE-2)."""
    header = archive[entry.header_offset : entry.header_offset + HEADER_BYTES]
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + HEADER_BYTES + names
    data = archive[start : start + entry.compress_size]
    return data[:SALT_BYTES], data[SALT_BYTES + VERIFIER_BYTES : -MAC_BYTES]
