"""What a person at a terminal sees, with what a shell gets back."""

from __future__ import annotations

import ast
import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cli_session import PROJECT, Session
from tests.support.pki import Pki
from tests.support.portal_stub import BUNDLE_PASSWORD, TOKEN, PortalStub, Reply, build_bundle, device_files

pytest_plugins = ("tests.support.cli_fixtures",)

DEVICE_ID = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
REGISTER = ("register", "sensor-7", "--type", "thermometer", "--location", "Hall 2", "--firmware", "1.4.2")
GROUPS = ("enrolment", "manufacturer", "token", "webhook")  # commands that are named by two words
DEADLINE = 20.0  # seconds; only a test that fails takes so long


class Terminal:
    """The command line on a terminal of its own: ``expect`` reads until a text has come, ``end`` until its end."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self._process = process
        self._descriptor = descriptor
        self.seen = ""

    def _read(self) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], DEADLINE)
        assert ready, f"nothing more came after: {self.seen}"
        try:
            content = os.read(self._descriptor, 65536)
        except OSError:  # how Linux ends a terminal that nobody has open
            return False
        self.seen += content.decode().replace("\r\n", "\n")
        return bool(content)

    def expect(self, text: str) -> None:
        start = getattr(self, "_from", 0)
        while text not in self.seen[start:]:
            assert self._read(), f"{text!r} is not in: {self.seen}"
        self._from = self.seen.index(text, start) + len(text)

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> int:
        while self._read():
            pass
        return self._process.wait(DEADLINE)


@contextmanager
def terminal(session: Session, *args: str, **environment: str) -> Iterator[Terminal]:
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        session.command(*args),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=session.folder,
        env={**session.full_environment(), "TERM": "xterm-256color", "COLUMNS": "120", **environment},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, mine)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(mine)


def test_people_get_a_table_in_colour(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device("sensor \x1b[2J[red]x")
    with terminal(session, "list") as seen:
        assert seen.end() == 0
    assert "\x1b[" in seen.seen
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen.seen)
    assert re.match(r"ID +NAME +TYPE +LOCATION +STATUS +EXPIRES *\n", plain)
    assert device_id in plain
    assert r"sensor \x1b[2J[red]x" in plain
    assert "\x1b[2J" not in seen.seen


def test_no_color_means_no_escape_sequence(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    with terminal(session, "list", NO_COLOR="1", COLUMNS="72") as seen:
        assert seen.end() == 0
    assert "\x1b" not in seen.seen
    # What does not fit is left out; the id is never cut.
    assert re.search(rf"^{device_id}  sensor-7  active  2036-01-01 *$", seen.seen, re.MULTILINE)


EMPTY_LISTS = {  # what each command that prints a table asks for, and says where there is nothing
    "list": ("/devices", "devices", "No devices yet."),
    "list --type pump": ("/devices", "devices", "No matching devices."),
    "expiring": ("/devices", "devices", "expires that soon."),
    f"certificates {DEVICE_ID}": (f"/devices/{DEVICE_ID}/certificates", "certificates", "has no certificates."),
    "enrolment list": ("/enrolment-tokens", "enrolment_tokens", "No enrolment tokens yet."),
    "manufacturer list": ("/manufacturers", "manufacturers", "No manufacturers yet."),
    "waiting": ("/enrolments", "enrolments", "No devices wait for approval."),
    "token list": ("/tokens", "tokens", "No operator tokens."),
    "audit": ("/audit", "entries", "No entries yet."),
    "audit --actor nobody": ("/audit", "entries", "No matching entries."),
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
    assert session.spawn(*command.split()).stdout == ""
    assert session.json(*command.split())[name] == []


def test_every_command_that_prints_a_table_is_tried_with_an_empty_list() -> None:
    tabular = {
        f"{module.stem}.{function.name}"
        for module in sorted((PROJECT / "commands").glob("*.py"))
        if module.stem != "output"
        for function in ast.walk(ast.parse(module.read_text()))
        if isinstance(function, ast.FunctionDef) and ".table(" in ast.unparse(function)
    }
    tried = {
        " ".join(command.split()[:2]) if command.split()[0] in GROUPS else command.split()[0] for command in EMPTY_LISTS
    }
    assert len(tabular) == len(tried), tabular


def test_a_registration_shows_password_and_next_step(session: Session, stub: PortalStub) -> None:
    with terminal(session, *REGISTER, NO_COLOR="1", COLUMNS="40") as seen:
        assert seen.end() == 0
    (device_id,) = stub.devices
    assert f"✓ Registered sensor-7 as {device_id}\n" in seen.seen
    assert re.search(rf"Bundle password +{BUNDLE_PASSWORD}\n", seen.seen)
    assert re.search(rf"\nNext: portal download {stub.url}/download/\S+\n$", seen.seen)  # on one line, to be copied


@pytest.mark.parametrize(
    ("typed", "status", "said"), [("y\n", "revoked", "Revoked pump"), ("n\n", "active", "Nothing was changed")]
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


def test_the_bundle_password_is_asked_for_hidden_until_it_fits(
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
        assert seen.end() == 0
    assert "wrong password" not in seen.seen
    assert BUNDLE_PASSWORD not in seen.seen
    assert {path.name for path in session.folder.iterdir()} == {DEVICE_ID}


def test_nobody_types_a_password_for_a_link_that_is_used(session: Session, stub: PortalStub) -> None:
    with terminal(session, "download", f"{stub.url}/download/a-used-link", NO_COLOR="1") as seen:
        assert seen.end() == 1
    assert "This link was used or has expired" in seen.seen
    assert "Bundle password" not in seen.seen
    assert "a-used-link" not in seen.seen.partition("download")[2]
    assert [request.method for request in stub.requests] == ["HEAD"]


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
        assert seen.end() == 0
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


def test_a_reader_that_goes_away_is_no_failure_to_speak_of(session: Session, stub: PortalStub) -> None:
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


def test_names_that_the_terminal_has_no_letters_for_are_escaped(session: Session, stub: PortalStub) -> None:
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
