"""Bundles in each form, opened by the tool that it is for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.hazmat.primitives.serialization.pkcs12 import load_key_and_certificates
from flask import Flask

from core.roles import Role
from tests.support.harness import ON_SQLITE, Api, api_as, csr_pem, problem_of

pytestmark = ON_SQLITE

PASSWORD = "correct horse battery"
KEY_TYPES = ("ec-p256", "ed25519", "rsa-2048")


def openssl(*arguments: str | Path, fails: bool = False) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout + done.stderr


def delivered(app: Flask, tmp_path: Path, **fields: Any) -> tuple[dict[str, Any], Path]:
    """A registered device, with the file that its link gives."""
    registered = api_as(app, Role.OPERATOR).register(bundle_password=PASSWORD, **fields)
    path = "/download/" + registered["download_url"].rpartition("/")[2]
    anyone = api_as(app, None)
    looked = anyone.call("HEAD", path)
    answer = anyone.get(path)
    kind = "p12" if fields["bundle_format"] == "p12" else "zip"
    for headers in (looked.headers, answer.headers):
        assert headers["Content-Type"] == {"p12": "application/x-pkcs12", "zip": "application/zip"}[kind]
        assert headers["Content-Disposition"] == f'attachment; filename="{registered["device_id"]}.{kind}"'
        assert headers["Content-Length"] == str(len(answer.data))
    file = tmp_path / f"bundle.{kind}"
    file.write_bytes(answer.data)
    answer.close()
    return registered, file


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_p12_opens_with_openssl_and_holds_key_certificate_and_issuers(
    shared_app: Flask, tmp_path: Path, key_type: str
) -> None:
    registered, file = delivered(shared_app, tmp_path, bundle_format="p12", key_type=key_type)
    password = ("-passin", f"pass:{PASSWORD}")
    said = openssl("pkcs12", "-in", file, *password, "-info", "-noout")
    assert "MAC: sha256" in said
    assert said.count("PBES2, PBKDF2, AES-256-CBC") == 2
    pem = openssl("pkcs12", "-in", file, *password, "-nodes")
    certificates = x509.load_pem_x509_certificates(pem.encode())
    assert f"{certificates[0].serial_number:x}" == registered["serial_number"]
    key = load_pem_private_key(pem.encode(), None)
    assert key.public_key() == certificates[0].public_key()
    certificates[0].verify_directly_issued_by(certificates[1])
    assert registered["device_id"] in said + pem, "the alias"
    assert "invalid password" in openssl("pkcs12", "-in", file, "-passin", "pass:wrong", "-noout", fails=True)


def test_a_p12_for_older_readers_is_made_by_the_documented_command(shared_app: Flask, tmp_path: Path) -> None:
    _, file = delivered(shared_app, tmp_path, bundle_format="p12")
    file.rename(tmp_path / "device.p12")
    documented = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    commands = re.findall(r"^ +(openssl pkcs12 .*-in (?:device.p12|all.pem) .*)$", documented, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        environment = {**os.environ, "P12_PASSWORD": PASSWORD}
        subprocess.run(shlex.split(command), cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert "BEGIN PRIVATE KEY" not in (tmp_path / "all.pem").read_text()
    older = tmp_path / "older.p12"
    said = openssl("pkcs12", "-in", older, "-passin", f"pass:{PASSWORD}", "-info", "-noout")
    assert "MAC: sha1" in said
    assert said.count("pbeWithSHA1And3-KeyTripleDES-CBC") == 2
    key, certificate, _ = load_key_and_certificates(older.read_bytes(), PASSWORD.encode())
    assert key is not None
    assert certificate is not None
    assert key.public_key() == certificate.public_key()


@pytest.mark.skipif(shutil.which("keytool") is None, reason="keytool comes with a JDK, which the tests do not install")
def test_p12_is_a_java_keystore(shared_app: Flask, tmp_path: Path) -> None:
    registered, file = delivered(shared_app, tmp_path, bundle_format="p12")
    command = ["keytool", "-list", "-v", "-storetype", "PKCS12", "-keystore", str(file), "-storepass:env", "STOREPASS"]
    environment = {"STOREPASS": PASSWORD, "PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "Entry type: PrivateKeyEntry" in said
    assert "Certificate chain length: 3" in said
    assert f"Alias name: {registered['device_id']}" in said
    wrong = subprocess.run(command, env=environment | {"STOREPASS": "wrong password"}, capture_output=True, check=False)
    assert wrong.returncode != 0


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_pem_opens_with_any_unzip_and_its_key_with_openssl(shared_app: Flask, tmp_path: Path, key_type: str) -> None:
    registered, file = delivered(shared_app, tmp_path, bundle_format="pem", key_type=key_type)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    key, certificate = tmp_path / "device.key", tmp_path / "device.pem"
    assert key.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    structure = openssl("asn1parse", "-in", key)
    for part in ("PBES2", "PBKDF2", "hmacWithSHA256", "aes-256-cbc", f":{600_000:06X}"):
        assert part in structure
    public = openssl("pkey", "-in", key, "-passin", f"pass:{PASSWORD}", "-pubout")
    assert public == openssl("x509", "-in", certificate, "-pubkey", "-noout")
    openssl("pkey", "-in", key, "-passin", "pass:wrong", "-noout", fails=True)
    openssl("verify", "-CAfile", tmp_path / "ca.pem", certificate)
    assert "compare it" in (tmp_path / "README.txt").read_text()
    assert f"{x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number:x}" == registered["serial_number"]


def test_pem_opens_with_unzip(shared_app: Flask, tmp_path: Path) -> None:
    _, file = delivered(shared_app, tmp_path, bundle_format="pem")
    subprocess.run(["unzip", "-q", file.name], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "device.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("bundle_format", ["p12", "pem"])
def test_a_renewal_takes_a_form_too(shared_app: Flask, bundle_format: str) -> None:
    api = api_as(shared_app, Role.OPERATOR)
    renewed = api.post(f"/devices/{api.register()['device_id']}/renew", {"bundle_format": bundle_format}).json
    content = api.get("/download/" + renewed["download_url"].rpartition("/")[2]).data
    assert content.startswith(b"PK" if bundle_format == "pem" else b"\x30")
    assert b"BEGIN PRIVATE KEY" not in content


@pytest.mark.parametrize("fields", [{"bundle_format": "rar"}, {"bundle_format": "p12", "csr": csr_pem()}])
def test_a_form_that_there_is_not_or_that_a_csr_makes_void_is_refused(api: Api, fields: dict[str, str]) -> None:
    plain = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
    problem_of(api.post("/register", plain | fields), 422, "invalid_input")


@pytest.mark.parametrize("bundle_format", ["zip", "pem"])
def test_the_readme_says_of_each_file_whether_it_is_encrypted(
    shared_app: Flask, tmp_path: Path, bundle_format: str
) -> None:
    _, file = delivered(shared_app, tmp_path, bundle_format=bundle_format)
    with zipfile.ZipFile(file) as archive:
        readme = archive.read("README.txt").decode()
        in_itself = ["device.key"] if bundle_format == "pem" else []
        if in_itself:
            assert archive.read("device.key").startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        encrypted = {one.filename for one in archive.infolist() if one.flag_bits & 1}.union(in_itself)
        plain = set(archive.namelist()) - encrypted
    lines = re.findall(r"^(Encrypted|Not encrypted)[^:]*: (.+)$", readme, re.MULTILINE)
    said = {name: set(files.split(", ")) for name, files in lines}
    assert said == {"Encrypted": encrypted, "Not encrypted": plain}
    listed = set(re.findall(r"^  (\S+\.\S+|SHA256SUMS)  ", readme, re.MULTILINE))
    assert listed == encrypted | plain - {"README.txt"} | ({"SHA256SUMS"} & encrypted)
