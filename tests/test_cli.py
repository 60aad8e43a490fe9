"""What all commands have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from cli import cli
from onboarding_portal import VERSION
from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub

pytest_plugins = ("tests.support.cli_fixtures",)
UNKNOWN = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"


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


def test_an_update_has_no_defaults_since_what_is_left_out_stays(session: Session) -> None:
    updates = [words for words, _ in all_commands() if words[-1] == "update"]
    assert len(updates) >= 4
    assert [words for words in updates if "default:" in session.run(*words, "--help").output] == []


def test_the_version_is_that_of_the_project(session: Session) -> None:
    assert session.run("--version").output == f"portal, version {VERSION}\n"


@pytest.mark.parametrize("device_id", ["0f9d2c4e", "sensor-7", "../tokens", UNKNOWN + "0", ""])
def test_an_id_of_what_is_no_device_is_given_in_full(device_id: str, session: Session, stub: PortalStub) -> None:
    assert session.run("token", "revoke", "--yes", device_id).exit_code == 2
    assert stub.requests == []
