"""A link becomes a device's files, without ever losing the bundle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

import credential_delivery
from commands.errors import CheckFailed
from commands.files import Folder, NewFile
from commands.vocabulary import NAMES
from delivery.formats import BundleFormat
from tests.support.bundle_files import DEVICE_ID, PASSWORD, WRONG, Files, mode_of, names_in
from tests.support.cli_session import Session
from tests.support.portal_stub import BUNDLE_PASSWORD, PortalStub, Reply, build_bundle, device_files, problem

pytest_plugins = ("tests.support.cli_fixtures",)


# --- Download -----------------------------------------------------------------------------------------------------


def test_a_download_is_unpacked_into_a_folder_named_after_the_device(
    session: Session, stub: PortalStub, files: Files
) -> None:
    result = session.run("download", stub.add_link(build_bundle(files)), env=PASSWORD)
    assert result.exit_code == 0, result.output
    folder = Path(DEVICE_ID)
    assert names_in(folder) == set(NAMES)
    assert names_in(Path()) == {DEVICE_ID}
    assert mode_of(folder) == 0o700
    assert mode_of(folder / "device.key") == 0o600
    assert {name: (folder / name).read_bytes() for name in NAMES} == files
    assert f"folder\t{folder.absolute()}" in result.stdout
    assert "PRIVATE KEY" not in result.output


def test_a_download_needs_no_token_and_sends_none(session: Session, stub: PortalStub, files: Files) -> None:
    link = stub.add_link(build_bundle(files))
    assert session.run("download", link, env=PASSWORD | {"PORTAL_TOKEN": ""}).exit_code == 0
    assert session.run("download", stub.add_link(build_bundle(files)), "--out", "x", env=PASSWORD).exit_code == 0
    assert all("Authorization" not in request.headers for request in stub.requests)


def test_json_says_where_the_files_are(session: Session, stub: PortalStub, files: Files) -> None:
    answer = session.json("download", stub.add_link(build_bundle(files)), "--out", "sensor", env=PASSWORD)
    assert answer["device_id"] == DEVICE_ID
    assert answer["folder"] == str(Path("sensor").absolute())
    assert answer["files"] == sorted(NAMES)
    assert "password" not in json.dumps(answer)


def test_a_bundle_of_the_server_is_unpacked(session: Session, files: Files) -> None:
    credentials = credential_delivery.Credentials(
        DEVICE_ID,
        files["device.key"],
        files["device.pem"].decode(),
        files["chain.pem"].decode(),
        files["ca.pem"].decode(),
        "localhost",
        8883,
        f"devices/{DEVICE_ID}/hello",
    )
    packed = credential_delivery.package_credentials(credentials, BUNDLE_PASSWORD, now=datetime.now(UTC))
    Path("bundle.zip").write_bytes(packed)
    result = session.run("unpack", "bundle.zip", env=PASSWORD)
    assert result.exit_code == 0, result.output
    assert "left out" not in result.stderr
    assert names_in(Path(DEVICE_ID)) == set(NAMES)
    for trusted, checked in (("ca.pem", "chain.pem"), ("ca.pem", "device.pem")):
        verify = ["openssl", "verify", "-x509_strict", "-CAfile", trusted, "-untrusted", "chain.pem", checked]
        subprocess.run(verify, cwd=DEVICE_ID, check=True, capture_output=True)


def test_a_bundle_made_by_7z_is_unpacked(session: Session, files: Files) -> None:
    for name, content in files.items():
        Path(name).write_bytes(content)
    pack = ["7z", "a", "-tzip", "-mm=Copy"]
    subprocess.run([*pack, "bundle.zip", *(set(NAMES) - {"device.key", "ca.pem"})], check=True, capture_output=True)
    secret = [*pack, "-mem=AES256", f"-p{BUNDLE_PASSWORD}", "bundle.zip", "device.key", "ca.pem"]
    subprocess.run(secret, check=True, capture_output=True)
    assert session.run("unpack", "bundle.zip", env=PASSWORD).exit_code == 0


@pytest.mark.parametrize(
    "link", ["x", "https://x/", "http://x/download/aaaaaaaa", "https://x/download/", "https://u@x/download/aaaaaaaa"]
)
def test_an_invalid_link_is_refused_without_being_shown(link: str, session: Session, stub: PortalStub) -> None:
    result = session.run("download", link, env=PASSWORD)
    assert (result.exit_code, stub.requests) == (2, [])
    assert "aaaaaaaa" not in result.output


def test_the_link_is_not_used_up_without_a_password(session: Session, stub: PortalStub, files: Files) -> None:
    link = stub.add_link(build_bundle(files))
    assert session.run("download", link).exit_code == 2
    assert session.run("download", link, "--password-file", "not-there").exit_code == 2
    assert session.run("download", link, "--out", "sensor").exit_code == 2
    assert stub.requests == []
    assert names_in(Path()) == set()


def test_the_link_is_not_used_up_if_the_files_cannot_be_written(
    session: Session, stub: PortalStub, files: Files
) -> None:
    link = stub.add_link(build_bundle(files))
    Path("full").mkdir(mode=0o700)
    Path("full/ca.pem").write_text("another")
    Path("open").mkdir()
    Path("open/something").touch()
    Path("open").chmod(0o777)
    Path("file").touch()
    for out in ("full", "open", "file", "file/below"):
        assert session.run("download", link, "--out", out, env=PASSWORD).exit_code == 1
    assert stub.requests == []
    assert Path("full/ca.pem").read_text() == "another"


def test_force_replaces_existing_files(session: Session, stub: PortalStub, files: Files) -> None:
    Path("full").mkdir(mode=0o700)
    Path("full/ca.pem").write_text("another")
    link = stub.add_link(build_bundle(files))
    assert session.run("download", link, "--out", "full", "--force", env=PASSWORD).exit_code == 0
    assert Path("full/ca.pem").read_bytes() == files["ca.pem"]


@pytest.mark.parametrize("password", [WRONG, {"PORTAL_BUNDLE_PASSWORD": "ü"}])
def test_a_wrong_password_does_not_lose_the_bundle(
    password: dict[str, str], session: Session, stub: PortalStub, files: Files
) -> None:
    result = session.run("download", stub.add_link(build_bundle(files)), "--out", "sensor", env=password)
    assert result.exit_code == 1
    (kept,) = Path("sensor").iterdir()
    assert mode_of(kept) == 0o600
    assert f"portal unpack {kept}" in result.stderr
    assert password["PORTAL_BUNDLE_PASSWORD"] not in result.output
    assert session.run("unpack", str(kept), "--out", "sensor", env=PASSWORD).exit_code == 0
    assert names_in(Path("sensor")) == {*NAMES, kept.name}


def test_a_folder_of_the_device_s_name_does_not_lose_the_bundle(
    session: Session, stub: PortalStub, files: Files
) -> None:
    Path(DEVICE_ID).mkdir(mode=0o700)
    Path(DEVICE_ID, "device.key").write_text("another")
    result = session.run("download", stub.add_link(build_bundle(files)), env=PASSWORD)
    assert result.exit_code == 1
    assert Path(DEVICE_ID, "device.key").read_text() == "another"
    assert [name for name in names_in(Path()) if name.startswith("bundle-")]


@pytest.mark.parametrize(
    ("reply", "exit_code"),
    [
        (problem(410, "link_used", "This link was used already."), 1),
        (problem(404, "link_unknown", "This link is not known."), 1),
        (Reply(200, b"<html>", {"Content-Type": "text/html"}), 3),
        (Reply(200, b"PK" * 99, breaks_off=True), 3),
    ],
)
def test_a_fetch_that_fails_leaves_nothing(reply: Reply, exit_code: int, session: Session, stub: PortalStub) -> None:
    link = stub.add_link(b"")
    stub.replies["GET", link.removeprefix(stub.url)] = reply
    result = session.run("download", link, "--out", "sensor", env=PASSWORD)
    assert result.exit_code == exit_code
    assert link.rsplit("/", 1)[1] not in result.output
    assert names_in(Path()) == set()


def test_a_download_that_breaks_off_is_repeated_with_the_same_idempotency_key(
    session: Session, stub: PortalStub, files: Files
) -> None:
    bundle = build_bundle(files)
    link = stub.add_link(bundle)
    path = link.removeprefix(stub.url)
    stub.replies["GET", path] = [Reply(200, bundle, breaks_off=True)]
    assert session.run("download", link, env=PASSWORD).exit_code == 0
    keys = [request.headers["Idempotency-Key"] for request in stub.calls("GET", path)]
    assert len(keys) == 2
    assert keys[0] == keys[1]
    assert len(keys[0]) >= 32


def test_each_download_has_an_idempotency_key_of_its_own(session: Session, stub: PortalStub, files: Files) -> None:
    links = [stub.add_link(build_bundle(files)) for _ in range(2)]
    for number, link in enumerate(links):
        assert session.run("download", link, "--out", str(number), env=PASSWORD).exit_code == 0
    assert len({request.headers["Idempotency-Key"] for request in stub.requests}) == 2
    assert session.run("download", links[0], "--out", "again", env=PASSWORD).exit_code == 1


def test_a_download_that_was_lost_says_with_which_key_it_can_be_repeated(
    session: Session, stub: PortalStub, files: Files
) -> None:
    bundle = build_bundle(files)
    link = stub.add_link(bundle)
    stub.replies["GET", link.removeprefix(stub.url)] = [Reply(200, bundle, breaks_off=True)] * 3
    lost = session.run("download", link, env=PASSWORD)
    assert lost.exit_code == 3
    key = stub.requests[0].headers["Idempotency-Key"]
    assert f"--idempotency-key {key}" in lost.stderr
    assert session.run("download", link, "--idempotency-key", key, env=PASSWORD).exit_code == 0
    assert stub.requests[-1].headers["Idempotency-Key"] == key


# --- Files --------------------------------------------------------------------------------------------------------


def test_either_all_files_are_written_or_none(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "sensor", ("a", "b"), force=False)
    with pytest.raises(CheckFailed, match="cannot be written"):
        folder.write({"a": NewFile(b"1"), "missing/b": NewFile(b"2")})
    assert names_in(folder.path) == set()


def test_an_existing_folder_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "sensor").mkdir(mode=0o755)
    (tmp_path / "sensor/own").touch()
    Folder(tmp_path / "sensor", NAMES, force=False).leave()
    assert mode_of(tmp_path / "sensor") == 0o755
    assert names_in(tmp_path / "sensor") == {"own"}


def test_the_key_s_mode_does_not_depend_on_the_umask(session: Session, files: Files) -> None:
    Path("bundle.zip").write_bytes(build_bundle(files))
    before = os.umask(0)
    try:
        session.run("unpack", "bundle.zip", "--out", "sensor", env=PASSWORD)
    finally:
        os.umask(before)
    assert mode_of(Path("sensor")) == 0o700
    assert mode_of(Path("sensor/device.key")) == 0o600
    shutil.rmtree("sensor")


# --- Other forms --------------------------------------------------------------------------------------------------


def packed_as(files: Files, bundle_format: str, device_id: str = DEVICE_ID) -> bytes:
    texts = (files["device.pem"].decode(), files["chain.pem"].decode(), files["ca.pem"].decode())
    credentials = credential_delivery.Credentials(
        device_id, files["device.key"], *texts, "localhost", 8883, f"devices/{device_id}/hello"
    )
    form = BundleFormat(bundle_format)
    return credential_delivery.package_credentials(
        credentials, BUNDLE_PASSWORD, now=datetime.now(UTC), bundle_format=form
    )


def test_the_portal_is_asked_for_a_format(session: Session, stub: PortalStub, files: Files) -> None:
    link = stub.add_link(packed_as(files, "p12"))
    assert session.run("download", link, "--format", "p12", env=PASSWORD).exit_code == 0
    assert {request.query.get("format") for request in stub.requests if request.method == "GET"} == {"p12"}
    assert session.run("download", link, "--format", "rar", env=PASSWORD).exit_code == 2


def test_a_p12_is_checked_and_written_with_its_certificates(session: Session, stub: PortalStub, files: Files) -> None:
    content = packed_as(files, "p12")
    result = session.run("download", stub.add_link(content), env=PASSWORD)
    assert result.exit_code == 0, result.output
    folder = Path(DEVICE_ID)
    assert names_in(folder) == {"device.p12", "device.pem", "chain.pem", "ca.pem"}
    assert (folder / "device.p12").read_bytes() == content
    assert mode_of(folder / "device.p12") == 0o600
    assert (folder / "ca.pem").read_bytes() == files["ca.pem"]
    assert (folder / "chain.pem").read_bytes() == files["chain.pem"]


def test_a_pem_keeps_its_key_encrypted_and_warns_of_the_unprotected_ca(
    session: Session, stub: PortalStub, files: Files
) -> None:
    result = session.run("download", stub.add_link(packed_as(files, "pem")), env=PASSWORD)
    assert result.exit_code == 0, result.output
    assert names_in(Path(DEVICE_ID)) == set(NAMES)
    assert "ENCRYPTED PRIVATE KEY" in Path(DEVICE_ID, "device.key").read_text()
    assert "compare it with portal ca" in result.stderr


def test_a_p12_to_which_something_was_appended_is_refused(session: Session, stub: PortalStub, files: Files) -> None:
    link = stub.add_link(packed_as(files, "p12") + b"\0appended")
    result = session.run("download", link, "--out", "sensor", env=PASSWORD)
    assert result.exit_code == 1
    assert "was modified on its way" in result.stderr
    assert "device.p12" not in str(names_in(Path()))


@pytest.mark.parametrize(("bundle_format", "extension"), [("p12", "p12"), ("pem", "zip")])
def test_a_wrong_password_keeps_the_file_of_every_format(
    bundle_format: str, extension: str, session: Session, stub: PortalStub, files: Files
) -> None:
    wrong = {"PORTAL_BUNDLE_PASSWORD": "another password"}
    result = session.run("download", stub.add_link(packed_as(files, bundle_format)), env=wrong)
    assert result.exit_code == 1
    (kept,) = Path().glob(f"bundle-*.{extension}")
    assert "The password is wrong" in result.stderr
    assert session.run("unpack", str(kept), env=PASSWORD).exit_code == 0


def test_the_format_is_sent(session: Session, stub: PortalStub) -> None:
    plain = ("register", "sensor-7", "--type", "t", "--location", "l", "--firmware", "1", "--format", "p12")
    session.json(*plain)
    assert stub.requests[-1].body["bundle_format"] == "p12"
    assert session.run(*plain, "--csr", "x").exit_code == 2


@pytest.mark.parametrize("bundle_format", ["p12", "pem", "zip"])
@pytest.mark.parametrize("chosen_by", ["option", "tenant"])
def test_a_password_that_the_key_still_needs_is_shown_although_the_bundle_is_unpacked(
    bundle_format: str, chosen_by: str, session: Session, stub: PortalStub
) -> None:
    plain = ("register", "sensor-7", "--type", "t", "--location", "l", "--firmware", "1", "--out", "sensor")
    by_option = ("--format", bundle_format) if chosen_by == "option" else ()
    stub.bundle_of = lambda device_id: packed_as(device_files(stub.pki, device_id), bundle_format, device_id)
    answer = session.json(*plain, *by_option)
    assert ("bundle_password" in answer) is (bundle_format != "zip")
    shown = session.run(*plain, "--force", *by_option, "--password-out", "password.txt")
    assert shown.exit_code == 0, shown.output
    assert BUNDLE_PASSWORD not in shown.output
    in_pipe = session.run(*plain, "--force", *by_option)
    assert (in_pipe.exit_code == 2) is (chosen_by == "option" and bundle_format != "zip")
    assert ("is not a terminal" in in_pipe.stderr) is (in_pipe.exit_code == 2)
