"""What a person at a terminal sees, with what a shell gets back."""

from __future__ import annotations

import io
import re
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from cli import cli
from commands.terminal import Terminal
from tests.support.checkpoints import KEY, NOTE
from tests.support.cli_session import Session
from tests.support.pki import Pki
from tests.support.portal_stub import BUNDLE_PASSWORD, TOKEN, PortalStub, Reply, build_bundle, device_files, problem
from tests.support.terminal import terminal

pytest_plugins = ("tests.support.cli_fixtures",)

SHORT_ID = "1e66977361d81fe2"
DEVICE_ID = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
REGISTER = ("register", "sensor-7", "--type", "thermometer", "--location", "Hall 2", "--firmware", "1.4.2")
GROUPS = (
    "application",
    "broker",
    "audit",
    "enrolment",
    "group",
    "manufacturer",
    "profile",
    "tenant",
    "token",
    "webhook",
)  # commands that are named by two words


def test_people_get_a_table_in_colour(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device("sensor \x1b[2J[red]x")
    with terminal(session, "list") as seen:
        assert seen.end() == 0, seen.seen
    assert "\x1b[" in seen.seen
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen.seen)
    assert re.match(r"ID +NAME +TYPE +LOCATION +STATUS +EXPIRES +SEEN *\n", plain)
    assert device_id in plain
    assert r"sensor \x1b[2J[red]x" in plain
    assert "\x1b[2J" not in seen.seen


def test_people_are_shown_profiles_if_a_device_has_one(session: Session, stub: PortalStub) -> None:
    stub.add_device(profile="tls-server")
    with terminal(session, "list", NO_COLOR="1", COLUMNS="140") as seen:
        assert seen.end() == 0, seen.seen
    assert re.search(r"SEEN +PROFILE *\n.* tls-server *\n", seen.seen)


def test_a_profile_is_shown_with_abbreviations_in_capitals(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/profiles/web"] = Reply(200, {"name": "web", "dns_names": ["a.example"], "ip_addresses": []})
    with terminal(session, "profile", "show", "web", NO_COLOR="1") as seen:
        assert seen.end() == 0, seen.seen
    assert re.search(r"^DNS names +a\.example *\n", seen.seen, re.MULTILINE)
    assert re.search(r"^IP addresses ", seen.seen, re.MULTILINE)


def test_no_color_means_no_escape_sequence(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    with terminal(session, "list", NO_COLOR="1", COLUMNS="72") as seen:
        assert seen.end() == 0, seen.seen
    assert "\x1b" not in seen.seen
    # What does not fit is left out; the id is never cut.
    assert re.search(rf"^{device_id}  sensor-7  active  2036-01-01 *$", seen.seen, re.MULTILINE)
    assert "\nNot shown for want of width: type, location, seen." in seen.seen


def test_a_sentence_is_broken_between_words_and_a_command_is_not(session: Session, stub: PortalStub) -> None:
    stub.broker = "pending"
    device_id = stub.add_device()
    with terminal(session, "revoke", device_id, "--yes", NO_COLOR="1", COLUMNS="50", PORTAL_COMMAND="./portal") as seen:
        assert seen.end() == 0, seen.seen
    assert seen.seen.rstrip().endswith("see: ./portal status")
    with terminal(session, "list", NO_COLOR="1", COLUMNS="76", PORTAL_TOKEN="") as seen:
        assert seen.end() == 2, seen.seen
    assert ": . data/operator.env" in seen.seen
    stub.replies["GET", "/devices"] = Reply(body={"devices": [], "next_cursor": None})
    with terminal(session, "expiring", "--within", "2036-02-03", NO_COLOR="1", COLUMNS="40") as seen:
        assert seen.end() == 0, seen.seen
    assert re.fullmatch(r"No active device has a certificate that *\nexpires before 2036-02-03\. *\n", seen.seen)


EMPTY_LISTS = {  # what each command that prints a table asks for, and says where there is nothing
    "list": ("/devices", "devices", "No devices yet."),
    "list --type pump": ("/devices", "devices", "No matching devices."),
    "expiring": ("/devices", "devices", "that expires before 20"),
    "broker list": ("/brokers", "brokers", "No brokers."),
    "application list": ("/applications", "applications", "No applications yet."),
    "application list --q x": ("/applications", "applications", "No matching applications."),
    f"certificates {DEVICE_ID}": (f"/devices/{DEVICE_ID}/certificates", "certificates", "has no certificates."),
    "enrolment list": ("/enrolment-tokens", "enrolment_tokens", "No enrolment tokens yet."),
    "manufacturer list": ("/manufacturers", "manufacturers", "No manufacturers yet."),
    "group list": ("/groups", "groups", "No groups yet."),
    "profile list": ("/profiles", "profiles", "No certificate profiles."),
    "tenant list": ("/tenants", "tenants", "No tenants."),
    "waiting": ("/enrolments", "enrolments", "No devices wait for approval."),
    "token list": ("/tokens", "tokens", "No operator tokens."),
    "audit list": ("/audit", "entries", "No entries yet."),
    "audit list --actor nobody": ("/audit", "entries", "No matching entries."),
    "webhook list": ("/webhooks", "webhooks", "No webhooks yet."),
    "webhook deliveries 1e66977361d81fe2": (
        "/webhooks/1e66977361d81fe2/deliveries",
        "deliveries",
        "No events for this webhook yet.",
    ),
}


@pytest.mark.parametrize("command", EMPTY_LISTS)
def test_an_empty_list_is_a_sentence(session: Session, stub: PortalStub, command: str) -> None:
    path, name, said = EMPTY_LISTS[command]
    stub.replies["GET", path] = Reply(body={name: [], "next_cursor": None})
    with terminal(session, *command.split(), NO_COLOR="1") as seen:
        assert seen.end() == 0, seen.seen
    assert stub.calls("GET", path)
    assert said in seen.seen
    assert "error" not in seen.seen.lower()
    assert "ID  " not in seen.seen  # no titles above nothing
    assert session.run(*command.split()).stdout == ""
    assert session.json(*command.split())[name] == []


ROW = {  # a row of any list
    "device_id": DEVICE_ID,
    "application_id": DEVICE_ID,
    "name": "pump",
    "serial_number": "0a1b",
    **dict.fromkeys(("token_id", "enrolment_token_id", "manufacturer_id", "webhook_id"), SHORT_ID),
    "delivery_id": 1,
    "at": "2026-01-01T00:00:00Z",
    "actor": "token:factory",
}


@pytest.mark.parametrize("command", [command for command in EMPTY_LISTS if "--" not in command])
def test_a_list_is_a_table_on_a_terminal_and_lines_in_a_pipe(session: Session, stub: PortalStub, command: str) -> None:
    path, name, _ = EMPTY_LISTS[command]
    stub.replies["GET", path] = Reply(body={name: [ROW, ROW], "next_cursor": None})
    with terminal(session, *command.split(), NO_COLOR="1") as seen:
        assert seen.end() == 0, seen.seen
    titles, *lines = seen.seen.splitlines()
    of_names = dict.fromkeys(("broker list", "profile list", "tenant list", "group list"), "name")
    first = {"audit list": "time", **of_names}.get(command, "id")
    first = "serial number" if name == "certificates" else first
    assert titles.lower().startswith(first)
    piped = session.run(*command.split()).stdout.splitlines()
    assert len(piped) == 2
    assert all(lines[0].startswith(line.split("\t")[0][:10]) for line in piped)


def test_columns_that_must_be_whole_become_a_record_if_they_do_not_fit(session: Session, stub: PortalStub) -> None:
    entry = {"at": "2026-01-01T00:00:00Z", "actor": "operator " * 9, "action": "device:register", "outcome": "refused"}
    stub.replies["GET", "/audit"] = Reply(body={"entries": [entry | {"object": f"device:{DEVICE_ID}"}]})
    with terminal(session, "audit", NO_COLOR="1", COLUMNS="80") as seen:
        assert seen.end() == 0, seen.seen
    lines = [line.rstrip() for line in seen.seen.splitlines()]
    assert lines[0] == "2026-01-01 00:00:00 UTC  device:register  refused"
    assert f"  OBJECT  device:{DEVICE_ID}" in lines
    assert "…" not in seen.seen
    assert max(map(len, lines)) <= 80


DONE = {"device_id": DEVICE_ID, "status": "active", "broker": "enforced"}
APPLICATION = {"application_id": DEVICE_ID, "status": "active", "broker": "enforced"}
MANUFACTURER = {"manufacturer_id": SHORT_ID, "name": "acme", "nonce": "n", "status": "pending"}
GROUP = {
    "name": "pilots",
    "description": "First",
    "members": 1,
    "topics": [{"filter": "devices/news", "access": "read"}],
}
PROFILE = {
    "name": "tls-server",
    "key_types": ["ec-p256"],
    "dns_names": ["{name}.example.com"],
    "max_days": 90,
    "updated_at": "2027-01-01T00:00:00Z",
}
TENANT = {"name": "acme", "status": "active", "topic_prefix": "acme", "est_label": "acme", "broker": "enforced"}
BROKER = {"name": "edge-1", "state": "pending", "generation": 412, "enforced_generation": 409, "told_by": "agent"}
COMMANDS: dict[
    str, tuple[str, str, dict[str, Any] | bytes] | None
] = {  # with the answer, where the small portal has none
    f"show {DEVICE_ID}": ("GET", f"/devices/{DEVICE_ID}", DONE),
    f"update {DEVICE_ID} --name x": ("PATCH", f"/devices/{DEVICE_ID}", DONE),
    f"suspend {DEVICE_ID}": ("POST", f"/devices/{DEVICE_ID}/suspend", DONE),
    f"resume {DEVICE_ID}": ("POST", f"/devices/{DEVICE_ID}/resume", DONE),
    f"revoke {DEVICE_ID} --yes": ("POST", f"/revoke/{DEVICE_ID}", DONE),
    f"renew {DEVICE_ID} --password-out {{new}}": (
        "POST",
        f"/devices/{DEVICE_ID}/renew",
        DONE | {"download_url": "https://example.com/download/x", "bundle_password": "p"},
    ),
    f"application show {DEVICE_ID}": ("GET", f"/applications/{DEVICE_ID}", APPLICATION),
    f"application update {DEVICE_ID} --topic devices/#:read": ("PATCH", f"/applications/{DEVICE_ID}", APPLICATION),
    f"application revoke {DEVICE_ID} --yes": ("DELETE", f"/applications/{DEVICE_ID}", APPLICATION),
    "application add x --topic devices/#:read --password-out {new}": (
        "POST",
        "/applications",
        APPLICATION | {"download_url": "https://example.com/download/x", "bundle_password": "p"},
    ),
    f"application renew {DEVICE_ID} --password-out {{new}}": (
        "POST",
        f"/applications/{DEVICE_ID}/renew",
        APPLICATION | {"download_url": "https://example.com/download/x", "bundle_password": "p"},
    ),
    "register x --type t --location l --firmware 1 --password-out {new}": None,
    "import {file} --dry-run": None,
    "export": None,
    "audit export --out {new}": ("GET", "/audit/export", b""),
    "audit checkpoint --out {new}": ("GET", "/audit/checkpoint", NOTE.encode()),
    "audit key": ("GET", "/audit/key", str(KEY.verifier).encode()),
    "audit verify empty --key audit.key --checkpoint checkpoint": None,
    "expect x --type t --location l --firmware 1": ("POST", "/devices", DONE),
    f"approve {DEVICE_ID} --key {'ab' * 32}": ("POST", f"/devices/{DEVICE_ID}/approve", DONE),
    f"reject {DEVICE_ID} --yes": ("POST", f"/devices/{DEVICE_ID}/reject", DONE),
    "enrolment create x --token-out {new}": (
        "POST",
        "/enrolment-tokens",
        {"enrolment_token_id": SHORT_ID, "token": "t", "count": 1},
    ),
    f"enrolment update {SHORT_ID} --attestation policy": ("PATCH", f"/enrolment-tokens/{SHORT_ID}", {"name": "x"}),
    f"enrolment revoke {SHORT_ID} --yes": ("DELETE", f"/enrolment-tokens/{SHORT_ID}", {"name": "x"}),
    f"manufacturer show {SHORT_ID}": ("GET", f"/manufacturers/{SHORT_ID}", MANUFACTURER),
    "manufacturer add acme --certificate ca.pem": ("POST", "/manufacturers", MANUFACTURER),
    f"manufacturer prove {SHORT_ID} --signature {{file}}": ("POST", f"/manufacturers/{SHORT_ID}/proof", MANUFACTURER),
    f"manufacturer update {SHORT_ID} --location x": ("PATCH", f"/manufacturers/{SHORT_ID}", MANUFACTURER),
    f"manufacturer remove {SHORT_ID} --yes": ("DELETE", f"/manufacturers/{SHORT_ID}", MANUFACTURER),
    "profile show tls-server": ("GET", "/profiles/tls-server", PROFILE),
    "profile add tls-server --server-auth --dns-name {{name}}.example.com": ("POST", "/profiles", PROFILE),
    "profile update tls-server --clear max_days": ("PATCH", "/profiles/tls-server", PROFILE),
    "profile remove tls-server --yes": ("DELETE", "/profiles/tls-server", PROFILE),
    "group show pilots": ("GET", "/groups/pilots", GROUP),
    "group add pilots --topic devices/news:read": ("POST", "/groups", GROUP),
    "group update pilots --no-topics": (
        "PATCH",
        "/groups/pilots",
        GROUP | {"broker": "pending", "broker_problem": "x"},
    ),
    f"group add-members pilots {DEVICE_ID}": ("POST", "/groups/pilots/members", GROUP | {"added": 1, "removed": 0}),
    f"group remove-members pilots {DEVICE_ID}": ("POST", "/groups/pilots/members", GROUP | {"added": 0, "removed": 1}),
    "group remove pilots --yes": ("DELETE", "/groups/pilots", GROUP),
    "broker show edge-1": ("GET", "/brokers/edge-1", BROKER),
    "broker add edge-1 --address edge-1:8883 --code-out {new}": (
        "POST",
        "/brokers",
        BROKER | {"code": "c", "url": "https://portal.example.com"},
    ),
    "broker update edge-1 --address edge-1:8883": ("PATCH", "/brokers/edge-1", BROKER),
    "broker away edge-1 --reason closed --yes": ("POST", "/brokers/edge-1/away", BROKER),
    "broker back edge-1": ("POST", "/brokers/edge-1/back", BROKER),
    "broker remove edge-1 --confirm edge-1": ("DELETE", "/brokers/edge-1", BROKER),
    "tenant show acme": ("GET", "/tenants/acme", TENANT),
    "tenant add acme --token-out {new}": ("POST", "/tenants", TENANT | {"token": "t"}),
    "tenant update acme --max-devices 5 --clear link_hours": ("PATCH", "/tenants/acme", TENANT),
    "tenant suspend acme --yes": ("POST", "/tenants/acme/suspend", TENANT),
    "tenant resume acme": ("POST", "/tenants/acme/resume", TENANT),
    "tenant remove acme --confirm acme": ("DELETE", "/tenants/acme", TENANT),
    "tenant export acme --out {new}": ("GET", "/tenants/acme/export", b""),
    "login": None,
    "logout": None,
    "token create x --role admin --token-out {new}": None,
    f"token revoke {DEVICE_ID} --yes": None,
    "status": None,
    "ca": None,
    "completion bash": None,
    "webhook add x --target https://example.com --secret-out {new}": (
        "POST",
        "/webhooks",
        {"webhook_id": SHORT_ID, "secret": "s"},
    ),
    f"webhook remove {SHORT_ID} --yes": ("DELETE", f"/webhooks/{SHORT_ID}", {"name": "x", "waiting": 1}),
    f"webhook redeliver {SHORT_ID}": ("POST", f"/webhooks/{SHORT_ID}/redeliver", {"redelivered": 1}),
    f"webhook test {SHORT_ID}": (
        "POST",
        f"/webhooks/{SHORT_ID}/test",
        {"delivered": True, "status": 200, "milliseconds": 31},
    ),
}
ELSEWHERE = {"download", "unpack"}  # on a terminal below, in a pipe in test_delivery.py


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works_on_a_terminal_in_a_pipe_and_as_json(session: Session, stub: PortalStub, command: str) -> None:
    answer = COMMANDS[command]
    if answer is not None:
        method, path, body = answer
        stub.replies[method, path] = Reply(body=body)
    (session.folder / "file.csv").write_text("name,type,location,firmware\na,b,c,d\n")
    ca = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    files = {"empty": "", "policy": "{}", "ca.pem": ca, "audit.key": str(KEY.verifier), "checkpoint": NOTE}
    for name, content in files.items():
        (session.folder / name).write_text(content)
    words = [command.format(file="file.csv", new=f"new-{number}").split() for number in range(3)]
    with terminal(session, *words[0], NO_COLOR="1") as seen:
        assert seen.end() == 0, seen.seen
    if command != "export":  # which is for programs, also on a terminal
        assert re.search(r"\dT\d\d:|\bNone\b", seen.seen) is None, "people read times in one form, and no None"
    assert session.run(*words[1]).exit_code == 0
    if command != "export":
        session.json(*words[2])


def test_the_command_for_the_other_machine_is_one_line_however_narrow_the_terminal_is(
    session: Session, stub: PortalStub
) -> None:
    answer = BROKER | {"code": "c0de", "url": "https://portal.example.com:8443", "fingerprint": "ab" * 32}
    stub.replies["POST", "/brokers"] = Reply(body=answer)
    with terminal(session, "broker", "add", "edge-1", "--address", "edge-1:8883", NO_COLOR="1", COLUMNS="60") as seen:
        assert seen.end() == 0, seen.seen
    command = f"portal-server agent join --url {answer['url']} --fingerprint {answer['fingerprint']} c0de"
    assert command in [line.strip() for line in seen.seen.splitlines()]


def test_every_command_is_tested_on_a_terminal() -> None:
    tested = {_name_of(command) for command in (*EMPTY_LISTS, *COMMANDS)} | ELSEWHERE
    named = {
        f"{name} {inner}" if inner else name
        for name, command in cli.commands.items()
        for inner in (command.commands if isinstance(command, click.Group) else ("",))
    }
    assert tested == named


def _name_of(command: str) -> str:
    first, *more = command.split()
    return f"{first} {more[0]}" if first in GROUPS else first


def test_a_registration_shows_the_password_and_what_to_pass_on(session: Session, stub: PortalStub) -> None:
    with terminal(session, *REGISTER, NO_COLOR="1", COLUMNS="40") as seen:
        assert seen.end() == 0, seen.seen
    (device_id,) = stub.devices
    assert f"✓ Registered sensor-7 as {device_id}\n" in seen.seen
    assert re.search(rf"Bundle password +{BUNDLE_PASSWORD}\n", seen.seen)
    assert re.search(rf"\n    portal download {stub.url}/download/\S+\n", seen.seen)  # on one line, to be copied
    assert BUNDLE_PASSWORD not in seen.seen.partition("Pass this on")[2]


@pytest.mark.parametrize(
    ("typed", "status", "said"),
    [
        *(("y\n", "revoked", "Revoked pump"), ("YES\n", "revoked", "Revoked pump")),
        *(("n\n", "active", "Nothing was changed"), ("\n", "active", "Nothing was changed")),
        ("ye\ny\n", "revoked", "Error: Answer y or yes, n or no; Enter alone is no."),
    ],
)
def test_a_revocation_asks_with_name_and_id(
    typed: str, status: str, said: str, session: Session, stub: PortalStub
) -> None:
    device_id = stub.add_device("pump")
    with terminal(session, "revoke", device_id, NO_COLOR="1", TERM="dumb") as seen:
        seen.expect("Revoke this device? This cannot be undone. [y/N]: ")
        assert re.search(rf"Name +pump\nId +{device_id}\n", seen.seen)
        seen.type(typed)
        seen.expect(said)
        assert seen.end() == (0 if status == "revoked" else 1)
    assert stub.devices[device_id]["status"] == status


def test_the_bundle_password_is_asked_for_without_echo_until_it_is_right(
    session: Session, stub: PortalStub, cli_pki: Pki
) -> None:
    link = stub.add_link(build_bundle(device_files(cli_pki, DEVICE_ID)))
    with terminal(session, "download", link, NO_COLOR="1") as seen:
        seen.expect("Bundle password: ")
        assert [request.method for request in stub.requests] == ["HEAD"]  # spent only once there is a password to try
        seen.type("wrong password\n")
        seen.expect("Wrong password; try again")
        seen.expect("Bundle password: ")
        seen.type(BUNDLE_PASSWORD + "\n")
        assert seen.end() == 0, seen.seen
    assert "wrong password" not in seen.seen
    assert BUNDLE_PASSWORD not in seen.seen
    assert {path.name for path in session.folder.iterdir()} == {DEVICE_ID}


def test_nobody_types_a_password_for_a_link_that_is_used(session: Session, stub: PortalStub) -> None:
    stub.replies["HEAD", "/download/a-used-link"] = Reply(410, b"")
    stub.replies["GET", "/download/a-used-link"] = problem(410, "link_used", "This link was used at noon.")
    with terminal(session, "download", f"{stub.url}/download/a-used-link", NO_COLOR="1") as seen:
        assert seen.end() == 1
    assert "This link was used at noon." in seen.seen
    assert "Bundle password" not in seen.seen
    assert "a-used-link" not in seen.seen.partition("download")[2]
    assert [request.method for request in stub.requests] == ["HEAD", "GET"]  # only the latter is told to operators


def test_a_list_on_a_very_narrow_terminal_shows_more_than_ids(session: Session, stub: PortalStub) -> None:
    stub.add_device("a name")
    with terminal(session, "list", COLUMNS="40", TERM="xterm", NO_COLOR="1") as seen:
        assert seen.end() == 0
    shown = seen.seen.splitlines()
    assert [line.split() for line in shown[1:3]] == [["NAME", "a", "name"], ["STATUS", "active"]]
    assert max(map(len, shown)) <= 40


def test_the_rate_of_a_few_steps_in_an_instant_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    with Terminal(shown).progress("Checking", 3) as advance:
        for _ in range(3):
            advance()
    assert "3/3" in shown.getvalue()
    assert "/s" not in shown.getvalue()


def test_a_bar_of_nothing_is_not_shown(session: Session, stub: PortalStub) -> None:
    (session.folder / "fleet.csv").write_text("name,type,location,firmware\na,b,c,1\n")
    for shows in (True, False):
        with terminal(session, "import", "fleet.csv", "--out", "fleet", TERM="xterm") as seen:
            assert seen.end() == 0
        assert ("Registering" in seen.seen) == shows


def test_ctrl_c_is_quiet_and_keeps_the_bundle(session: Session, stub: PortalStub, cli_pki: Pki) -> None:
    link = stub.add_link(build_bundle(device_files(cli_pki, DEVICE_ID)))
    with terminal(session, "download", link, NO_COLOR="1") as seen:
        seen.expect("Bundle password: ")
        seen.type("wrong password\n")
        seen.expect("try again")
        seen.expect("Bundle password: ")
        seen.interrupt()
        assert seen.end() == 130
    (kept,) = session.folder.iterdir()
    assert f"portal unpack {kept.name}" in seen.seen
    assert "Traceback" not in seen.seen
    assert session.run("unpack", kept.name, env={"PORTAL_BUNDLE_PASSWORD": BUNDLE_PASSWORD}).exit_code == 0


def test_login_asks_for_what_is_missing(session: Session, stub: PortalStub) -> None:
    session.environment |= {"PORTAL_URL": "", "PORTAL_TOKEN": ""}
    with terminal(session, "login", NO_COLOR="1") as seen:
        seen.expect("Portal [https://127.0.0.1:8443]: ")
        seen.type(stub.url + "\n")
        seen.expect("CA file")
        seen.type("\n")
        seen.expect("Token: ")
        seen.type(TOKEN + "\n")
        assert seen.end() == 0, seen.seen
    assert TOKEN not in seen.seen
    assert session.run("list").exit_code == 0


# --- A shell ------------------------------------------------------------------------------------------------------


def test_exit_statuses_as_a_shell_sees_them(session: Session, stub: PortalStub) -> None:
    stub.add_device()
    assert session.spawn("list").returncode == 0
    assert session.spawn("show", DEVICE_ID).returncode == 1
    assert session.spawn("show").returncode == 2
    assert session.spawn("list", "--url", "http://127.0.0.1:9").returncode == 3


def test_a_pipe_gets_no_escape_sequence_even_when_colour_is_forced(session: Session, stub: PortalStub) -> None:
    stub.add_device()
    session.environment |= {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm-256color", "TTY_COMPATIBLE": "1"}
    for args in (("list",), ("--help",), ("show", DEVICE_ID), ("ca",)):
        result = session.spawn(*args)
        assert "\x1b" not in result.stdout + result.stderr


def test_a_reader_that_ends_early_causes_no_message(session: Session, stub: PortalStub) -> None:
    for index in range(300):
        stub.add_device(f"sensor-{index}")
    command = [*session.command("list", "--all")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=session.full_environment(), cwd=session.folder
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_letters_that_the_terminal_lacks_are_escaped(session: Session, stub: PortalStub) -> None:
    stub.add_device("Größe 漢字")
    session.environment |= {"PYTHONIOENCODING": "ascii"}
    result = session.spawn("list")
    assert result.returncode == 0
    assert r"Gr\xf6\xdfe \u6f22\u5b57" in result.stdout


def test_an_unwritable_folder_is_one_sentence(session: Session, stub: PortalStub, cli_pki: Pki) -> None:
    # /proc refuses new files to everyone, root included.
    link = stub.add_link(build_bundle(device_files(cli_pki, DEVICE_ID)))
    result = session.run("download", link, "--out", "/proc/self", env={"PORTAL_BUNDLE_PASSWORD": BUNDLE_PASSWORD})
    assert (result.exit_code, stub.requests) == (1, [])
    assert "cannot be written to" in result.stderr
    assert result.stderr.count("\n") == 1


def test_bash_completes_commands(session: Session, tmp_path: Path) -> None:
    environment = {"_PORTAL_COMPLETE": "bash_complete", "COMP_WORDS": "portal reg", "COMP_CWORD": "1"}
    session.environment |= environment
    assert session.spawn().stdout.split() == ["plain,register"]
