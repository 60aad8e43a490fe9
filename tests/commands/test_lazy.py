"""What a call of ``portal`` imports: most of the time that it takes is that of imports, so they are counted."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

from cli import COMMANDS, cli
from tests.support.cli_session import PROJECT, Session
from tests.support.portal_stub import BUNDLE_PASSWORD, PortalStub, build_bundle, device_files

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
# The help of all commands of a module, in a process of its own that is forked off one that has imported no command.
HELP_OF_EACH = """
import contextlib, json, os, sys
sys.path.insert(0, sys.argv.pop(1))
before = set(sys.modules)
from cli import COMMANDS, cli
for module in sys.argv[1:]:
    if os.fork() == 0:
        for name in (name for name, one in COMMANDS.items() if one.place.startswith(module + ":")):
            with contextlib.suppress(SystemExit):
                cli([name, "--help"])
        sys.stderr.write(json.dumps([module, sorted(set(sys.modules) - before)]) + "\\n")
        sys.stderr.flush()
        os._exit(0)
    os.wait()
"""
HELP = {"commands", "commands.completing", "commands.connection", "commands.context", "commands.errors"} | {
    "commands.files",
    "commands.lazy",
    "commands.logins",
    "commands.names",
    "commands.output",
}
HEAVY = {"Cryptodome", "cffi", "cryptography", "pydantic", "pygments", "pyzipper", "rich"}
MAX_HELP = 150  # modules with those of the standard library; with all commands there were 400, with requests 280
MAX_CALL = 300  # of a call whose answer is shown
MAX_UNPACKING = 410  # of one that opens a bundle, with cryptography and pyzipper


def imported_by(session: Session, *args: str) -> set[str]:
    """The modules that one call imports, in a process of its own and without a terminal."""
    return set(json.loads(run(session, RUN, *args)[-1]))


def run(session: Session, program: str, *args: str) -> list[str]:
    """The lines that a program writes to standard error."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(PROJECT), *args],
        capture_output=True,
        text=True,
        cwd=session.folder,
        env=session.full_environment(),
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


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


def test_the_help_of_each_command_imports_click_and_nothing_that_speaks_http(session: Session) -> None:
    names = {one.place.partition(":")[0] for one in COMMANDS.values()}
    imported = dict(map(json.loads, run(session, HELP_OF_EACH, *names)))
    assert imported.keys() == names
    for name, modules in imported.items():
        assert packages(set(modules)) == {"click"}, name
        assert "ssl" not in modules, name
        assert f"commands.{name}" in modules
        assert len(modules) <= MAX_HELP, name


@pytest.mark.parametrize(
    ("args", "module"),
    [
        (("list",), "devices"),
        (("show", "{id}"), "devices"),
        (("certificates", "{id}"), "devices"),
        (("update", "{id}", "--firmware", "2"), "updates"),
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
    assert len(modules) <= MAX_CALL


def test_a_download_imports_what_opens_its_bundle_and_nothing_that_others_use(
    session: Session, stub: PortalStub
) -> None:
    session.environment["PORTAL_BUNDLE_PASSWORD"] = BUNDLE_PASSWORD
    link = stub.add_link(build_bundle(device_files(stub.pki, stub.add_device())))
    modules = imported_by(session, "download", link, "--out", "sensor")
    assert {"click", "cryptography", "pyzipper", "requests"} <= packages(modules)
    assert not {"pydantic", "pygments", "rich"} & packages(modules)
    assert not {"commands.audit", "commands.devices", "commands.imports", "commands.terminal"} & modules
    assert len(modules) <= MAX_UNPACKING


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_of_a_command_is_the_beginning_of_its_help(name: str) -> None:
    command = cli.commands[name]
    assert command.name == name
    assert COMMANDS[name].summary == command.get_short_help_str(200)


@pytest.mark.parametrize("name", sorted(name for name in COMMANDS if isinstance(cli.commands[name], click.Group)))
def test_the_commands_that_the_summary_of_a_group_names_exist(name: str) -> None:
    group = cli.commands[name]
    assert isinstance(group, click.Group)
    named = [word.strip(" .") for word in COMMANDS[name].summary.rpartition(":")[2].split(",")]
    assert [word for word in named if " " not in word and word not in group.commands] == []


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
