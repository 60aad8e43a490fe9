"""What a call of ``portal`` imports: most of the time that it takes is that of imports, so they are counted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cli import COMMANDS, cli
from tests.support.cli_session import PROJECT, Session
from tests.support.portal_stub import PortalStub

pytest_plugins = ("tests.support.cli_fixtures",)

RUN = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
before = set(sys.modules)
from cli import cli
try:
    cli(sys.argv[1:])
finally:
    sys.stderr.write("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""
HELP = {"commands", "commands.completing", "commands.connection", "commands.context", "commands.errors"} | {
    "commands.files",
    "commands.lazy",
    "commands.logins",
    "commands.names",
    "commands.output",
}
HEAVY = {"Cryptodome", "cffi", "cryptography", "pydantic", "pygments", "pyzipper", "rich"}
MAX_HELP = 150  # modules with those of the standard library; with all commands there were 400


def imported_by(session: Session, *args: str) -> set[str]:
    """The modules that one call imports, in a process of its own and without a terminal."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(PROJECT), *args],
        capture_output=True,
        text=True,
        cwd=session.folder,
        env=session.full_environment(),
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    """The packages among them that are neither the standard library's nor the command line's own."""
    names = {name.partition(".")[0] for name in modules}
    return {name for name in names - sys.stdlib_module_names if not name.startswith("_")} - {
        "cli",
        "commands",
        "onboarding_portal",
    }


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_imports_click_and_no_command(session: Session, option: str) -> None:
    modules = imported_by(session, option)
    assert packages(modules) == {"click"}
    assert {name for name in modules if name.partition(".")[0] == "commands"} == HELP
    assert "ssl" not in modules
    assert len(modules) <= MAX_HELP


@pytest.mark.parametrize(
    ("args", "module"),
    [
        (("list",), "devices"),
        (("status",), "operation"),
        (("revoke", "{id}", "--yes"), "lifecycle"),
        (("register", "pump", "--type", "pump", "--location", "hall", "--firmware", "1", "--json"), "registration"),
    ],
)
def test_a_call_imports_its_command_and_http_but_nothing_that_it_does_not_use(
    session: Session, stub: PortalStub, args: tuple[str, ...], module: str
) -> None:
    device_id = stub.add_device()
    modules = imported_by(session, *(arg.format(id=device_id) for arg in args))
    assert {"click", "requests"} <= packages(modules)
    assert not HEAVY & packages(modules)
    assert f"commands.{module}" in modules
    others = {"commands.audit", "commands.bundle", "commands.csr", "commands.imports", "commands.terminal"}
    assert not others & modules


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_of_a_command_is_the_beginning_of_its_help(name: str) -> None:
    command = cli.commands[name]
    assert command.name == name
    assert COMMANDS[name].summary == command.get_short_help_str(200)


def test_the_names_of_commands_are_completed_without_importing_them(session: Session) -> None:
    completes = {"_PORTAL_COMPLETE": "zsh_complete", "COMP_WORDS": "portal re", "COMP_CWORD": "1"}
    session.environment.update(completes)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(PROJECT / "cli.py")],
        capture_output=True,
        text=True,
        env=session.full_environment(),
        timeout=30,
        check=True,
    )
    lines = done.stdout.splitlines()
    shown = dict(zip(lines[1::3], lines[2::3], strict=True))
    expected = {name: one.summary for name, one in COMMANDS.items() if name.startswith("re")}
    assert shown == expected
    assert "commands.registration" not in done.stderr
