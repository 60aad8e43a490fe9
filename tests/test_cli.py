"""The commands of the command line, against a small portal."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from cli import cli
from commands import client
from commands.context import VERSION
from tests.support.cli_session import PROJECT, Session
from tests.support.pki import PEM
from tests.support.portal_stub import BUNDLE_PASSWORD, PortalStub, Reply, problem

pytest_plugins = ("tests.support.cli_fixtures",)
REGISTER = ("register", "sensor-7", "--type", "thermometer", "--location", "Hall 2", "--firmware", "1.4.2")
UNKNOWN = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
EVIL = "\x1b]0;owned\x07\x1b[2Jname\r\n\u202egnp"


Named = tuple[tuple[str, ...], click.Command]


def all_commands(group: click.Group = cli, prefix: tuple[str, ...] = ()) -> Iterator[Named]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


@pytest.mark.parametrize("named", list(all_commands()), ids=lambda named: " ".join(named[0]))
def test_every_command_has_a_summary_an_example_and_json(named: Named, session: Session) -> None:
    words, command = named
    result = session.run(*words, "--help")
    assert result.exit_code == 0
    summary = (command.help or "").splitlines()[0]
    assert summary.endswith(".")
    assert len(summary) <= 60
    assert re.search(r"Examples:\n  \S*.*portal ", result.output)
    assert "--json" in result.output


def test_the_version_is_the_project_s(session: Session) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    assert session.run("--version").output == f"portal, version {VERSION}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, session: Session) -> None:
    result = session.run("completion", shell)
    assert result.exit_code == 0
    assert "_PORTAL_COMPLETE" in result.stdout


def test_a_registration_sends_what_was_given(session: Session, stub: PortalStub) -> None:
    session.json(
        *REGISTER,
        "--metadata",
        "owner=ops=2",
        "--topic",
        "devices/{id}/a:b:write",
        "--key-type",
        "ed25519",
        "--days",
        "9",
    )
    (request,) = stub.calls("POST", "/register")
    assert request.body == {
        "name": "sensor-7",
        "type": "thermometer",
        "location": "Hall 2",
        "firmware": "1.4.2",
        "metadata": {"owner": "ops=2"},
        "topics": [{"filter": "devices/{id}/a:b", "access": "write"}],
        "key_type": "ed25519",
        "validity_days": 9,
    }


def test_each_registration_has_an_idempotency_key_of_its_own(session: Session, stub: PortalStub) -> None:
    session.json(*REGISTER)
    session.json(*REGISTER)
    keys = [request.headers["Idempotency-Key"] for request in stub.calls("POST", "/register")]
    assert len(set(keys)) == 2
    assert min(len(key) for key in keys) >= 32


def test_a_broken_connection_is_tried_again_with_the_same_key(session: Session, stub: PortalStub) -> None:
    stub.replies["POST", "/register"] = [
        Reply(breaks_off=True, body=b""),
        Reply(201, {"a": "b" * 99}, breaks_off=True),
    ]
    answer = session.json(*REGISTER)
    keys = {request.headers["Idempotency-Key"] for request in stub.calls("POST", "/register")}
    assert answer["device_id"] in stub.devices
    assert (len(stub.calls("POST", "/register")), len(keys)) == (3, 1)


@pytest.mark.parametrize("failure", [Reply(breaks_off=True, body=b""), problem(503, "unavailable", "Not now.")])
def test_a_registration_of_unknown_end_says_how_to_find_out(failure: Reply, session: Session, stub: PortalStub) -> None:
    stub.replies["POST", "/register"] = failure
    result = session.run(*REGISTER, "--password-out", "password")
    key = stub.calls("POST", "/register")[0].headers["Idempotency-Key"]
    assert f"--idempotency-key {key}" in result.stderr
    assert not Path("password").exists()
    del stub.replies["POST", "/register"]
    assert session.json(*REGISTER, "--idempotency-key", key)["device_id"] in stub.devices


def test_a_password_never_goes_into_a_pipe_unasked(session: Session, stub: PortalStub) -> None:
    result = session.run(*REGISTER)
    assert result.exit_code == 2
    assert "--password-out" in result.stderr
    assert stub.requests == []


def test_a_password_goes_into_a_new_private_file(session: Session) -> None:
    result = session.run(*REGISTER, "--password-out", "password")
    assert result.exit_code == 0
    assert Path("password").read_text() == BUNDLE_PASSWORD + "\n"
    assert stat.S_IMODE(Path("password").stat().st_mode) == 0o600
    assert BUNDLE_PASSWORD not in result.output
    assert "Next: portal download http" in result.stderr
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [
        "device_id",
        "fingerprint",
        "expires_at",
        "download_url",
        "download_expires_at",
    ]


def test_a_password_file_that_exists_stops_before_anything_is_asked(session: Session, stub: PortalStub) -> None:
    Path("password").touch()
    result = session.run(*REGISTER, "--password-out", "password")
    assert (result.exit_code, stub.requests) == (2, [])
    assert "password already exists" in result.stderr


def test_json_holds_the_password_only_where_it_has_no_other_place(session: Session) -> None:
    assert session.json(*REGISTER)["bundle_password"] == BUNDLE_PASSWORD
    assert "bundle_password" not in session.json(*REGISTER, "--password-out", "password")
    assert "bundle_password" not in session.json(*REGISTER, "--out", "files")
    Path("chosen").write_text("chosen by myself\n")
    assert "bundle_password" not in session.json(*REGISTER, "--password-file", "chosen")


def test_register_and_unpack_at_once(session: Session, stub: PortalStub) -> None:
    result = session.run(*REGISTER, "--out", "sensor")
    assert result.exit_code == 0, result.output
    (device_id,) = stub.devices
    assert stat.S_IMODE(Path("sensor").stat().st_mode) == 0o700
    assert stat.S_IMODE(Path("sensor/device.key").stat().st_mode) == 0o600
    assert sorted(path.name for path in Path("sensor").iterdir()) == sorted(
        ["device.key", "device.pem", "chain.pem", "ca.pem", "mosquitto-client.conf", "README.txt"]
    )
    assert f"device_id\t{device_id}\n" in result.stdout
    assert BUNDLE_PASSWORD not in result.output
    (download,) = [request for request in stub.requests if request.path.startswith("/download/")]
    assert "Authorization" not in download.headers


def test_a_chosen_password_opens_the_bundle_at_once(session: Session, stub: PortalStub) -> None:
    result = session.run(*REGISTER, "--password-file", "-", "--out", "sensor", stdin="chosen by myself\n")
    assert result.exit_code == 0, result.output
    assert stub.calls("POST", "/register")[0].body["bundle_password"] == "chosen by myself"
    assert Path("sensor/device.key").is_file()


def test_a_folder_that_is_in_use_stops_before_anything_is_asked(session: Session, stub: PortalStub) -> None:
    Path("sensor").mkdir(mode=0o700)
    Path("sensor/device.key").write_text("another")
    result = session.run(*REGISTER, "--out", "sensor")
    assert (result.exit_code, stub.requests) == (1, [])
    assert Path("sensor/device.key").read_text() == "another"


def test_a_fetch_that_fails_loses_neither_link_nor_password(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/download/signed-link-token-0"] = problem(503, "broker_unavailable", "The broker is away.")
    result = session.run(*REGISTER, "--out", "sensor")
    assert result.exit_code == 1
    assert "The broker is away." in result.stderr
    assert BUNDLE_PASSWORD not in result.output
    assert Path("sensor/bundle-password.txt").read_text() == BUNDLE_PASSWORD + "\n"
    assert stat.S_IMODE(Path("sensor/bundle-password.txt").stat().st_mode) == 0o600
    link = re.search(r"portal download '?(\S+)", result.stderr)
    assert link is not None
    stub.replies.clear()
    again = session.run("download", link[1], "--out", "sensor", "--password-file", "sensor/bundle-password.txt")
    assert again.exit_code == 0, again.output


def test_a_csr_brings_its_certificate(session: Session, stub: PortalStub) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    Path("sensor.csr").write_bytes(csr.public_bytes(PEM))
    result = session.run(*REGISTER, "--csr", "sensor.csr")
    assert result.exit_code == 0, result.output
    assert len(x509.load_pem_x509_certificates(result.stdout.encode())) == 2
    files = session.json(*REGISTER, "--csr", "sensor.csr", "--out", "sensor")["files"]
    assert files["files"] == ["ca.pem", "chain.pem", "device.pem"]
    assert Path("sensor/ca.pem").read_bytes() == stub.pki.ca_bundle


@pytest.mark.parametrize(
    "extra",
    [
        ("--csr", "x", "--key-type", "ed25519"),
        ("--password-file", "x", "--password-out", "y"),
        ("--topic", "devices/{id}/#"),
        ("--topic", "devices/{id}/#:everything"),
        ("--metadata", "novalue"),
        ("--metadata", "a=1", "--metadata", "a=2"),
        ("--days", "0"),
        ("--key-type", "rsa-1024"),
        ("--csr", "not-there.csr"),
        ("--password-file", "not-there"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(extra: tuple[str, ...], session: Session, stub: PortalStub) -> None:
    assert (session.run(*REGISTER, *extra).exit_code, stub.requests) == (2, [])


def test_a_list_is_plain_when_piped(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    result = session.run("list")
    assert result.stdout == f"{device_id}\tsensor-7\tthermometer\tHall 2\tactive\t2036-01-01T00:00:00Z\n"
    assert result.stderr == ""


def test_all_pages_are_read_when_asked(session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_PAGE", 2)
    for index in range(5):
        stub.add_device(f"sensor-{index}")
    everything = session.json("list", "--all")
    assert [device["name"] for device in everything["devices"]] == [f"sensor-{index}" for index in range(5)]
    assert everything["next_cursor"] is None
    some = session.json("list", "--limit", "3")
    assert len(some["devices"]) == 3
    rest = session.json("list", "--cursor", some["next_cursor"])
    assert [device["name"] for device in rest["devices"]] == ["sensor-3", "sensor-4"]


def test_a_cursor_that_goes_in_circles_ends(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/devices"] = Reply(body={"devices": [{"device_id": UNKNOWN}], "next_cursor": "again"})
    assert session.run("list", "--all").exit_code == 0
    assert len(stub.requests) == 2


def test_filters_reach_the_portal(session: Session, stub: PortalStub) -> None:
    session.run(
        "list", "--status", "active", "--type", "t", "--location", "l", "--q", "x", "--expires-before", "2027-01-31"
    )
    assert stub.requests[0].query == {
        "status": "active",
        "type": "t",
        "location": "l",
        "q": "x",
        "expires_before": "2027-01-31T00:00:00Z",
        "limit": "50",
    }
    session.run("list", "--expires-before", "30d")
    before = datetime.fromisoformat(stub.requests[1].query["expires_before"])
    assert abs(before - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)


def test_a_device_is_shown_field_by_field(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device(metadata={"owner": "ops"})
    lines = session.run("show", device_id.upper()).stdout.splitlines()
    assert f"device_id\t{device_id}" in lines
    assert {"metadata.owner\tops", "topics.0\tdevices/{id}/#:readwrite", "broker\tapplied"} <= set(lines)
    assert session.json("show", device_id) == stub.devices[device_id]


def test_a_device_is_changed(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    assert session.run("update", device_id, "--name", "new", "--topic", "devices/news:read").exit_code == 0
    assert session.run("update", device_id, "--default-topics", "--no-metadata").exit_code == 0
    bodies = [request.body for request in stub.calls("PATCH", f"/devices/{device_id}")]
    assert bodies == [
        {"name": "new", "topics": [{"filter": "devices/news", "access": "read"}]},
        {"metadata": {}, "topics": None},
    ]


def test_a_change_of_nothing_is_a_usage_error(session: Session) -> None:
    assert session.run("update", UNKNOWN).exit_code == 2


def test_a_revocation_without_a_terminal_needs_yes(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    result = session.run("revoke", device_id)
    assert (result.exit_code, stub.requests) == (2, [])
    assert "--yes" in result.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_revocation_that_is_not_enforced_yet_is_loud(
    options: tuple[str, ...], session: Session, stub: PortalStub
) -> None:
    device_id = stub.add_device()
    stub.broker = "pending"
    result = session.run("revoke", device_id, "--yes", "--reason", "key_compromise", *options)
    assert result.exit_code == 0
    assert "THE BROKER DOES NOT ENFORCE THIS YET" in result.stderr
    assert stub.requests[-1].body == {"reason": "key_compromise"}


def test_an_enforced_revocation_says_so(session: Session, stub: PortalStub) -> None:
    result = session.run("revoke", stub.add_device(), "--yes")
    assert "broker\tenforced" in result.stdout
    assert "Warning" not in result.stderr


@pytest.mark.parametrize("device_id", ["0f9d2c4e", "sensor-7", "../tokens", UNKNOWN + "0", ""])
def test_an_id_is_given_in_full(device_id: str, session: Session, stub: PortalStub) -> None:
    for command in (("show",), ("revoke", "--yes"), ("certificates",), ("token", "revoke", "--yes")):
        assert session.run(*command, device_id).exit_code == 2
    assert stub.requests == []


def test_certificates_and_audit_are_lines(session: Session, stub: PortalStub) -> None:
    assert session.run("certificates", stub.add_device()).stdout.split("\t")[:2] == ["0a1b", "active"]
    line = session.run("audit", "--action", "device:register").stdout
    assert line.startswith("2026-01-01T00:00:00Z\ttoken:factory\tdevice:register\tdevice:")
    assert stub.requests[-1].query["action"] == "device:register"


def test_a_new_token_is_shown_once_and_never_in_a_pipe(session: Session, stub: PortalStub) -> None:
    create = ("token", "create", "factory", "--role", "operator")
    assert session.run(*create).exit_code == 2
    assert stub.requests == []
    result = session.run(*create, "--days", "9", "--token-out", "token")
    assert "secret-of-new-token" not in result.output
    assert Path("token").read_text() == "secret-of-new-token\n"
    assert stub.requests[0].body == {"name": "factory", "role": "operator", "expires_in_days": 9}
    assert session.json(*create)["token"] == "secret-of-new-token"


def test_a_token_is_not_made_twice_where_the_connection_breaks(session: Session, stub: PortalStub) -> None:
    stub.replies["POST", "/tokens"] = Reply(breaks_off=True, body=b"")
    assert session.run("token", "create", "x", "--role", "admin", "--token-out", "token").exit_code == 3
    assert len(stub.requests) == 1
    assert not Path("token").exists()


def test_tokens_are_listed_and_revoked(session: Session) -> None:
    assert session.run("token", "list").stdout.split("\t")[:3] == [UNKNOWN, "factory", "operator"]
    assert session.run("token", "revoke", UNKNOWN).exit_code == 2
    assert session.run("token", "revoke", UNKNOWN, "--yes").exit_code == 0


def test_status_says_what_keeps_the_portal(session: Session, stub: PortalStub) -> None:
    assert session.run("status").exit_code == 0
    checks = [{"name": "database", "ok": True}, {"name": "broker", "ok": False, "problem": "It does not answer."}]
    stub.replies["GET", "/readyz"] = Reply(503, {"status": "not ready", "checks": checks})
    result = session.run("status")
    assert result.exit_code == 1
    assert "ready\tno" in result.stdout
    assert "broker\tno: It does not answer." in result.stdout
    shown = session.run("status", "--json")
    assert (shown.exit_code, json.loads(shown.stdout)["checks"]) == (1, checks)


def test_the_ca_is_printed_or_saved(session: Session, stub: PortalStub) -> None:
    assert session.run("ca").stdout.encode() == stub.pki.ca_bundle
    assert session.run("ca", "--out", "ca.pem").exit_code == 0
    assert Path("ca.pem").read_bytes() == stub.pki.ca_bundle
    assert session.run("ca", "--out", "ca.pem").exit_code == 1
    root = session.json("ca")["certificates"][-1]
    assert root["subject"] == "CN=Test root"
    assert re.fullmatch("[0-9a-f]{64}", root["fingerprint"])
