"""Bundles opened by 7z and pyzipper; links and seals that open for nobody else."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pyzipper
from cryptography.exceptions import InvalidTag
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LinkExpired, LinkUnknown
from credential_delivery import (
    AnswerSeal,
    Credentials,
    generate_download_link,
    new_bundle_password,
    package_credentials,
    read_download_token,
)

NOW = datetime(2027, 1, 1, tzinfo=UTC)
CREDENTIALS = Credentials(
    device_id="3f2b8c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b",
    key_pem=b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
    certificate_pem="certificate\n",
    chain_pem="certificate\nissuer\n",
    ca_pem="what the device trusts\n",
    broker_host="broker.example",
    broker_port=8883,
    example_topic="devices/x/hello",
)
SECRET = ["device.key", "ca.pem"]
SUMS = "SHA256SUMS"
PUBLIC = ["device.pem", "chain.pem", "mosquitto-client.conf", "README.txt"]
KEYS = ["an-older-signing-key-of-many-chars", "the-newest-signing-key-of-many-chars"]
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def bundle() -> bytes:
    return package_credentials(CREDENTIALS, "correct horse", now=NOW)


def opened(bundle: bytes, password: str | None) -> pyzipper.AESZipFile:
    archive = pyzipper.AESZipFile(io.BytesIO(bundle))
    if password is not None:
        archive.setpassword(password.encode())
    return archive


def test_the_example_of_who_may_only_read_is_a_subscription() -> None:
    reader = dataclasses.replace(CREDENTIALS, example_topic="devices/+/a b", example_reads=True)
    for credentials, expected in (
        (CREDENTIALS, "-t devices/x/hello -m hello -q 1"),
        (reader, "-t 'devices/+/a b' -v -q 1"),
    ):
        with opened(package_credentials(credentials, "correct horse", now=NOW), None) as archive:
            readme = archive.read("README.txt").decode()
        assert expected in readme
        assert ("mosquitto_sub -h" in readme, "mosquitto_pub -h" in readme) == (
            credentials.example_reads,
            not credentials.example_reads,
        )
        assert "device's" not in readme


def test_it_opens_with_7z_and_the_password(bundle: bytes, tmp_path: Path) -> None:
    (tmp_path / "bundle.zip").write_bytes(bundle)
    subprocess.run(["7z", "x", "-pcorrect horse", "bundle.zip"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "device.key").read_bytes() == CREDENTIALS.key_pem
    assert (tmp_path / "ca.pem").read_text() == CREDENTIALS.ca_pem


def test_sha256sum_checks_what_is_not_encrypted_by_what_is(bundle: bytes, tmp_path: Path) -> None:
    (tmp_path / "bundle.zip").write_bytes(bundle)
    subprocess.run(["7z", "x", "-pcorrect horse", "bundle.zip"], cwd=tmp_path, check=True, capture_output=True)
    check = ["sha256sum", "--check", "--strict", SUMS]
    done = subprocess.run(check, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == sorted(f"{name}: OK" for name in SECRET + PUBLIC)
    (tmp_path / "README.txt").write_text("run this")
    assert subprocess.run(check, cwd=tmp_path, check=False, capture_output=True).returncode == 1


def test_no_two_entries_share_a_keystream(bundle: bytes) -> None:
    archive = opened(bundle, None)
    salts = {
        bundle[(start := entry.header_offset + 30 + len(entry.filename) + 11) : start + 16]
        for entry in archive.infolist()
        if entry.flag_bits & 1
    }
    assert len(salts) == 3


def test_7z_refuses_another_password(bundle: bytes, tmp_path: Path) -> None:
    (tmp_path / "bundle.zip").write_bytes(bundle)
    done = subprocess.run(["7z", "t", "-pwrong", "bundle.zip"], cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode != 0


def test_what_is_secret_or_trusted_is_aes_256_encrypted_and_authenticated(bundle: bytes) -> None:
    entries = {entry.filename: entry for entry in opened(bundle, None).infolist()}
    assert sorted(entries) == sorted([*SECRET, *PUBLIC, SUMS])
    for name in (*SECRET, SUMS):
        assert entries[name].flag_bits & 1
        assert (entries[name].wz_aes_version, entries[name].wz_aes_strength) == (2, 3)
        assert (entries[name].extract_version, entries[name].CRC) == (51, 0)
    for name in PUBLIC:
        assert not entries[name].flag_bits & 1
    assert b"PRIVATE KEY" not in bundle


@pytest.mark.parametrize("name", [*SECRET, SUMS])
def test_an_altered_byte_in_an_encrypted_entry_is_noticed(bundle: bytes, name: str) -> None:
    entry = opened(bundle, None).getinfo(name)
    middle = entry.header_offset + 30 + len(name) + 11 + 18 + 4  # header, name, extra field, salt and verifier
    altered = bundle[:middle] + bytes([bundle[middle] ^ 1]) + bundle[middle + 1 :]
    with pytest.raises(pyzipper.BadZipFile, match="HMAC"):
        opened(altered, "correct horse").read(name)


def test_an_empty_password_still_encrypts() -> None:
    bundle = package_credentials(CREDENTIALS, "", now=NOW)
    assert b"PRIVATE KEY" not in bundle
    assert all(opened(bundle, None).getinfo(name).flag_bits & 1 for name in SECRET)


def test_the_extracted_files_have_the_time_of_packing_and_secret_ones_are_their_owners_alone(bundle: bytes) -> None:
    for entry in opened(bundle, None).infolist():
        assert entry.date_time == (2027, 1, 1, 0, 0, 0)
        assert entry.external_attr >> 16 == (0o100600 if entry.filename in SECRET else 0o100644)


def test_the_public_part_reads_without_a_password(bundle: bytes) -> None:
    archive = opened(bundle, None)
    assert archive.read("device.pem").decode() == CREDENTIALS.certificate_pem
    assert "-h broker.example" in archive.read("mosquitto-client.conf").decode()
    assert CREDENTIALS.device_id in archive.read("README.txt").decode()


def test_the_readme_which_opens_anywhere_names_what_opens_the_rest(bundle: bytes, tmp_path: Path) -> None:
    (tmp_path / "bundle.zip").write_bytes(bundle)
    with zipfile.ZipFile(tmp_path / "bundle.zip") as archive:
        readme = archive.read("README.txt").decode()
        with pytest.raises((NotImplementedError, RuntimeError)):
            archive.read("device.key")
    for program in ("portal unpack", "7z", "bsdtar --passphrase", "zip4j"):
        assert program in readme
    assert max(map(len, readme.splitlines())) <= 120


def test_two_bundles_of_the_same_share_no_salt(bundle: bytes) -> None:
    assert package_credentials(CREDENTIALS, "correct horse", now=NOW) != bundle


def test_a_generated_password_has_128_bits_and_more() -> None:
    passwords = {new_bundle_password() for _ in range(100)}
    assert len(passwords) == 100
    assert all(len(password) * 6 >= 128 and password.isascii() for password in passwords)


def test_a_link_names_its_delivery_and_nothing_else() -> None:
    link = generate_download_link("d" * 32, KEYS, public_url="https://portal.example", now=NOW)
    assert link.startswith("https://portal.example/download/")
    assert read_download_token(link.rpartition("/")[2], KEYS, now=NOW, max_age=DAY).delivery_id == "d" * 32


def test_new_links_are_signed_with_the_last_key_and_older_ones_still_verify() -> None:
    token = generate_download_link("d", KEYS[:1], public_url="", now=NOW).rpartition("/")[2]
    assert read_download_token(token, KEYS, now=NOW, max_age=DAY).delivery_id == "d"
    newest = generate_download_link("d", KEYS, public_url="", now=NOW).rpartition("/")[2]
    with pytest.raises(LinkUnknown):
        read_download_token(newest, KEYS[:1], now=NOW, max_age=DAY)


def test_a_link_ends_with_its_age() -> None:
    token = generate_download_link("d", KEYS, public_url="", now=NOW).rpartition("/")[2]
    with pytest.raises(LinkExpired):
        read_download_token(token, KEYS, now=NOW + DAY + timedelta(seconds=1), max_age=DAY)


@given(token=st.text(max_size=200))
def test_no_text_that_was_not_signed_here_is_a_link(token: str) -> None:
    with pytest.raises(LinkUnknown):
        read_download_token(token, KEYS, now=NOW, max_age=DAY)


def test_a_seal_opens_with_its_key_only() -> None:
    seal = AnswerSeal.of("an idempotency key", pepper=b"p" * 32)
    sealed = seal.seal(b"the answer")
    assert AnswerSeal.of("an idempotency key", pepper=b"p" * 32).open(sealed) == b"the answer"
    for other in (
        AnswerSeal.of("another key here", pepper=b"p" * 32),
        AnswerSeal.of("an idempotency key", pepper=b"q" * 32),
    ):
        assert other.key_hash != seal.key_hash
        with pytest.raises(InvalidTag):
            other.open(sealed)


def test_the_hash_of_a_request_depends_on_the_idempotency_key() -> None:
    one, two = (AnswerSeal.of(key, pepper=b"p" * 32) for key in ("a first key here", "a second key here"))
    assert one.request_hash(b"body") == one.request_hash(b"body")
    assert one.request_hash(b"body") not in (one.request_hash(b"other"), two.request_hash(b"body"))


def test_responses_and_links_of_earlier_versions_still_open() -> None:
    seal = AnswerSeal.of("an idempotency key", pepper=b"p" * 32)
    assert seal.key_hash == "56abe63d8c7e7d337f4d7b338980d933df5f9e76810a54c89fefcc717071bbf7"
    assert seal.request_hash(b"body") == "bc51812e0e48e92b8a0c84e825ab10231fcd473c3b40626e06d69bba0526df0a"
    token = ".eJxTSiEAlADfiAzF.azbsgA.ygdH4hYBtTKyiEVhMAMsAdKeElyWSvweV-CKuypipww"
    keys = ["a-signing-key-of-many-characters"]
    assert read_download_token(token, keys, now=NOW, max_age=DAY).delivery_id == "d" * 32


def test_what_to_trust_of_https_is_there_only_where_it_differs() -> None:
    apart = dataclasses.replace(CREDENTIALS, portal_ca_pem="what clients of HTTPS trust\n")
    for credentials, there in ((CREDENTIALS, False), (apart, True)):
        archive = opened(package_credentials(credentials, "correct horse", now=NOW), "correct horse")
        assert ("portal-ca.pem" in archive.namelist()) == there
        assert (b"portal-ca.pem" in archive.read("README.txt")) == there
    assert archive.read("portal-ca.pem") == apart.portal_ca_pem.encode()
    assert b"portal-ca.pem" in archive.read(SUMS)
