"""What every list, empty and full, and every help text looks like on a terminal of 60, 80, 100 and 200 columns.

The texts in ``golden/`` were looked at: a folder for each list, and ``golden/help/`` with all help texts at a width.
After a change have them written again, and look at the difference:

    PORTAL_GOLDEN=1 scripts/test tests/commands/test_widths.py
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import click
import pytest

from cli import cli
from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)

GOLDEN = Path(__file__).parent / "golden"
WIDTHS = (60, 80, 100, 200)
ID = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
SHORT_ID = "1e66977361d81fe2"
LONG = "a name that somebody made very long, with everything in it that there is to say"
TOPICS = [{"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/news", "access": "read"}]
FULL: dict[str, tuple[str, str, dict[str, Any]]] = {  # the path, the name and a row of each list
    "list": ("/devices", "devices", {"device_id": ID, "name": "pump-17"}),
    "expiring": ("/devices", "devices", {"device_id": ID, "name": "pump-17"}),
    "application list": ("/applications", "applications", {"application_id": ID, "name": "store"}),
    f"certificates {ID}": (f"/devices/{ID}/certificates", "certificates", {"serial_number": "0a" * 16}),
    "enrolment list": ("/enrolment-tokens", "enrolment_tokens", {"enrolment_token_id": SHORT_ID, "name": "line-4"}),
    "manufacturer list": ("/manufacturers", "manufacturers", {"manufacturer_id": SHORT_ID, "name": "acme"}),
    "group list": (
        "/groups",
        "groups",
        {"name": "gateways", "members": 12, "description": "At the doors", "validity_days": 90, "topics": TOPICS},
    ),
    "profile list": ("/profiles", "profiles", {"name": "tls-server"}),
    "broker list": (
        "/brokers",
        "brokers",
        {
            "name": "edge-1",
            "state": "pending",
            "generation": 412,
            "enforced_generation": 409,
            "reported_at": "2026-01-01T00:00:00.000000Z",
            "problem": "The broker does not answer.",
        },
    ),
    "tenant list": ("/tenants", "tenants", {"name": "acme", "topic_prefix": "sites/acme"}),
    "waiting": ("/enrolments", "enrolments", {"device_id": ID, "name": "pump-17"}),
    "token list": ("/tokens", "tokens", {"token_id": SHORT_ID, "name": "factory"}),
    "audit list": ("/audit", "entries", {"actor": "factory (1e66977361d81fe2)"}),
    "webhook list": ("/webhooks", "webhooks", {"webhook_id": SHORT_ID, "name": "alarm"}),
    f"webhook deliveries {SHORT_ID}": (
        f"/webhooks/{SHORT_ID}/deliveries",
        "deliveries",
        {"delivery_id": 17, "device_id": ID},
    ),
}
ANY = {  # fields of rows of any kind
    "type": "thermometer",
    "location": "Hall 2, north wing",
    "firmware": "1.4.2",
    "status": "active",
    "role": "operator",
    "profile": "tls-server",
    "created_at": "2026-01-01T00:00:00.000000Z",
    "issued_at": "2026-01-01T00:00:00.000000Z",
    "asked_at": "2026-01-01T00:00:00.000000Z",
    "expires_at": "2036-01-01T00:00:00.000000Z",
    "not_after": "2036-01-01T00:00:00.000000Z",
    "renewable_from": "2035-01-01T00:00:00.000000Z",
    "connection": {"connected": True, "since": "2026-01-02T00:00:00Z", "last_seen": "2026-01-02T00:00:00Z"},
    "at": "2026-01-01T00:00:00.000000Z",
    "action": "device:register",
    "object": f"device:{ID}",
    "outcome": "done",
    "address": "192.0.2.1",
    "request_id": "4f1b2c3d4e5f60718293a4b5c6d7e8f9",
    "detail": {"name": "pump-17"},
    "fingerprint": "ab" * 32,
    "key_fingerprint": "ab" * 32,
    "target": "https://alarm.example.com/in",
    "event": "revoked",
    "attempts": 2,
}


class TheDay(datetime):
    """The day on which the texts were written: some say how long ago something was."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> TheDay:
        return cls(2026, 12, 1, 12, tzinfo=tz)


@pytest.fixture(autouse=True)
def the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commands.output.datetime", TheDay)


@contextmanager
def columns(number: int) -> Iterator[list[str]]:
    """Let this process have a terminal; the list has what was shown at the end."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, number, 0, 0))
    shown: list[str] = []
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(mine, 65536):
                parts.append(part)
        except OSError:  # how Linux ends a terminal that nobody has open
            pass

    reader = threading.Thread(target=read)
    reader.start()
    before = sys.stdout, sys.stderr
    stream = io.TextIOWrapper(io.FileIO(theirs, "w"), write_through=True)
    sys.stdout = sys.stderr = stream
    try:
        yield shown
    finally:
        sys.stdout, sys.stderr = before
        stream.close()
        reader.join()
        os.close(mine)
        shown.append(b"".join(parts).decode().replace("\r\n", "\n"))


def seen(session: Session, monkeypatch: pytest.MonkeyPatch, width: int, *args: str) -> str:
    """What a command shows on a terminal of that width."""
    for name, value in {**session.environment, "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    with columns(width) as shown, pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    assert ended.value.code == 0, shown
    return shown[0]


def check(name: str, width: int, text: str) -> None:
    """Compare a text with the golden one, and see that no line is longer than the terminal is wide."""
    lines = [line.rstrip() for line in text.splitlines()]
    # A command is not broken: it has to be copied whole.
    assert not [line for line in lines if len(line) > width and not line.startswith("Next: ")], text
    compare(name, width, lines)


def compare(name: str, width: int, lines: list[str]) -> None:
    file = GOLDEN / name.replace(" ", "-") / f"{width}.txt"
    content = "\n".join(lines) + "\n"
    if os.environ.get("PORTAL_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert content == file.read_text()


def commands() -> Iterator[str]:
    """The names of all commands and groups."""
    yield ""
    for name, command in cli.commands.items():
        yield name
        if isinstance(command, click.Group):
            yield from (f"{name} {inner}" for inner in command.commands)


def name_of(command: str) -> str:
    return " ".join(word for word in command.split() if word not in (ID, SHORT_ID))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", FULL)
def test_a_list(session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch, command: str, width: int) -> None:
    path, key, row = FULL[command]
    longest = LONG[:63] if command in ("profile list", "tenant list") else LONG  # a DNS label
    long = {name: longest if name in ("name", "actor") else value for name, value in row.items()}
    for kind, rows in (("empty", []), ("full", [ANY | row, ANY | long | {"location": LONG, "status": "revoked"}])):
        stub.replies["GET", path] = Reply(body={key: rows, "next_cursor": None})
        args = (*command.split(), *(("--within", "2036-02-01") if command == "expiring" else ()))
        check(f"{name_of(command)} {kind}", width, seen(session, monkeypatch, width, *args))


@pytest.mark.parametrize("width", WIDTHS)
def test_help(session: Session, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    golden: list[str] = []
    connection: set[str] = set()
    for command in commands():
        text = seen(session, monkeypatch, width, *command.split(), "--help")
        parts = re.split(r"(?<=\n\n)(?=\w[^\n]*:\n)", text)
        connection |= {part for part in parts if part.startswith("Connection:")}
        golden += [f"$ portal {command} --help".replace("  ", " "), ""]
        shown = "".join(part for part in parts if not part.startswith("Connection:"))
        golden += [*shown.rstrip().splitlines(), ""]
        described, _, examples = text.partition("\nExamples:\n")
        assert not [line for line in described.splitlines() if len(line) > width], command
        assert all(line.startswith("  ") for line in examples.splitlines()), command
        widest = seen(session, monkeypatch, 200, *command.split(), "--help")
        cut = "..." in described.replace("[ARGS]...", "")  # click shortens what it says of the commands of a group
        assert cut or "".join(text.split()) == "".join(widest.split()), command
    assert len(connection) == 1  # the same for each command, so it is there once
    lines = [line.rstrip() for line in (*golden, *connection.pop().rstrip().splitlines())]
    compare("help", min(width, 100), lines)  # wider lines would be hard to read


def test_every_list_is_looked_at() -> None:
    lists = {name for name in commands() if name.endswith("list") or name in ("expiring", "waiting", "certificates")}
    assert lists | {"webhook deliveries"} == {name_of(command) for command in FULL}
