"""The commands that messages suggest are those that work where the portal runs."""

from __future__ import annotations

import re

import pytest

from core.server_command import VARIABLE, client_command, server_command
from tests.support.programs import ROOT


@pytest.mark.parametrize(
    ("program", "suggested"),
    [(None, "flask --app app ca list"), ("", "flask --app app ca list"), ("portal-admin", "portal-admin ca list")],
)
def test_a_suggested_command_is_called_as_this_one_was(
    program: str | None, suggested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if program is not None:
        monkeypatch.setenv(VARIABLE, program)
    assert server_command("ca list") == suggested


@pytest.mark.parametrize(
    ("program", "suggested"),
    [("./portal-server", "./portal list"), ("portal-server", "portal list"), ("portal-admin", "portal list")],
)
def test_an_operators_command_is_called_as_where_the_servers_own_come_from(
    program: str, suggested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, program)
    assert client_command("list") == suggested
    monkeypatch.delenv(VARIABLE)
    assert client_command("list") == "./portal list"


@pytest.mark.parametrize(
    ("path", "program"),
    [
        ("scripts/run", "./portal-server"),
        ("deploy/onboarding-portal.service", "portal-admin"),
        ("deploy/portal-admin", "portal-admin"),
    ],
)
def test_what_starts_the_portal_says_how_its_commands_are_called(path: str, program: str) -> None:
    assert f"{VARIABLE}={program}" in (ROOT / path).read_text()


def test_no_message_names_a_command_by_itself() -> None:
    for folder in ("broker", "operations", "pki", "store", "web", "workflows"):
        for module in (ROOT / folder).rglob("*.py"):
            assert "./portal" not in module.read_text()
            assert "flask --app app" not in re.sub(r"``[^`]*``", "", module.read_text()), module
