"""Completion of ids and names: what the portal lists, within two seconds, and never an error in the prompt."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from app import ROUTES
from cli import cli
from commands import completing
from commands.completing import Listed
from commands.logins import Login, login_path, save_login
from scripts.manual import command_files
from tests.support.cli_session import PROJECT, Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)
FIRST, SECOND = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060", "1a9d2c4e-5b1a-4c7d-9e8f-102030405060"


def completed(session: Session, *words: str, **environment: str) -> list[str]:
    """What bash is told for the last of these words."""
    variables = {"_PORTAL_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(("portal", *words[:-1], words[-1]))}
    result = session.run(env=variables | {"COMP_CWORD": str(len(words))} | environment)
    assert result.stderr == ""
    return [line.removeprefix("plain,") for line in result.stdout.splitlines() if line]


@pytest.fixture
def two_devices(stub: PortalStub) -> PortalStub:
    rows = [{"device_id": FIRST, "name": "pump-1"}, {"device_id": SECOND, "name": "a\nplain,rm\x1b"}]
    stub.replies["GET", "/devices"] = Reply(200, {"devices": rows, "next_cursor": None})
    return stub


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize(
    "words", [("show",), ("revoke", "--yes"), ("renew", "--days", "3"), ("enrolment", "create", "--device")]
)
def test_device_ids_complete_wherever_one_is_named(words: tuple[str, ...], session: Session) -> None:
    assert completed(session, *words, "") == [FIRST, SECOND]
    assert completed(session, *words, "1A9d") == [SECOND]
    assert completed(session, *words, "f") == []
    assert completed(session, *words, "pu") == ["pump-1"]


def test_a_name_of_several_devices_is_completed_once(session: Session, stub: PortalStub) -> None:
    stub.add_device("pump-1", status="revoked")
    stub.add_device("pump-1")
    assert completed(session, "show", "pump") == ["pump-1"]


def test_tenants_of_saved_logins_are_completed_without_the_portal(session: Session, stub: PortalStub) -> None:
    path = login_path(session.environment)
    assert completed(session, "--tenant", "") == []
    for tenant in ("acme", "globex"):
        save_login(path, Login(stub.url, None, "token", tenant))
    assert completed(session, "--tenant", "a") == ["acme"]
    assert completed(session, "--tenant", "") == ["globex", "acme"]
    path.write_text("no JSON")
    assert completed(session, "--tenant", "") == []
    assert stub.requests == []


@pytest.mark.usefixtures("two_devices")
def test_the_shells_that_show_it_say_which_device_an_id_is(session: Session) -> None:
    variables = {"_PORTAL_COMPLETE": "zsh_complete", "COMP_WORDS": "portal show ", "COMP_CWORD": "2"}
    lines = session.run(env=variables).stdout.splitlines()
    assert lines == ["plain", FIRST, "pump-1", "plain", SECOND, "a plain,rm"]


def listed() -> Iterator[Listed]:
    waiting: list[click.Command] = [cli]
    while waiting:
        command = waiting.pop()
        waiting += command.commands.values() if isinstance(command, click.Group) else []
        yield from (param.type.listed for param in command.params if hasattr(param.type, "listed"))


def test_what_completes_is_what_the_interface_answers() -> None:
    found = {each.path: each for each in listed()}
    assert len(found) >= 7
    for path, each in found.items():
        [route] = [route for route in ROUTES if (route.method, route.path) == ("GET", path)]
        assert route.answers.model is not None
        (row,) = typing.get_args(route.answers.model.model_fields[each.key].annotation)
        assert {each.value, each.about} <= set(row.model_fields)
        assert route.query is None or set(each.query) <= set(route.query.model_fields)


def test_no_complaint_disturbs_the_prompt(stub: PortalStub, session: Session) -> None:
    for reply in (Reply(401, {}), Reply(200, b"no json"), Reply(200, {"devices": 7}), Reply(200, {"devices": [3, {}]})):
        stub.replies["GET", "/devices"] = reply
        assert completed(session, "show", "") == []
    assert completed(session, "show", "", PORTAL_URL="no url") == []
    assert completed(session, "--ca-file", "no-file", "show", "") == []
    stub.requests.clear()
    assert completed(session, "--token-file", "-", "show", "") == []  # nothing is read from the terminal
    assert stub.requests == []


@pytest.mark.usefixtures("two_devices")
def test_options_that_were_typed_are_used(session: Session, stub: PortalStub) -> None:
    assert completed(session, "--url", stub.url, "show", "0", PORTAL_URL="https://127.0.0.1:1") == [FIRST]
    assert completed(session, "show", "--url", stub.url, "0", PORTAL_URL="https://127.0.0.1:1") == [FIRST]


def test_a_portal_that_does_not_answer_is_not_waited_for(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completing, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert completed(session, "show", "", PORTAL_URL=f"https://127.0.0.1:{silent.getsockname()[1]}") == []
        assert time.monotonic() - began < 2


@pytest.mark.usefixtures("two_devices")
def test_bash_itself_completes(session: Session, tmp_path: Path) -> None:
    (tmp_path / "portal").symlink_to(PROJECT / "portal")
    script = command_files()["share/bash-completion/completions/portal"]
    typed = 'COMP_WORDS=(portal show 1) COMP_CWORD=2; _portal_completion portal; printf "%s\\n" "${COMPREPLY[@]}"'
    environment = session.full_environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PORTAL_VENV": sys.prefix}
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{typed}"], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (f"{SECOND}\n", "")
