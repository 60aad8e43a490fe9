"""Ctrl-C while a program starts, and in its command: an exit status, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onboarding_portal.interrupts import INTERRUPTED

PROJECT = Path(__file__).parents[1]
SERVER = ("-c", "from onboarding_portal import portal_server; portal_server()")
PROGRAMS = {
    "cli": (str(PROJECT / "cli.py"), "list"),
    "portal": ("-c", "from onboarding_portal import portal; portal()", "list"),
    "help": (*SERVER, "--help"),
    "doctor": (*SERVER, "doctor"),
    "agent": (*SERVER, "agent", "status"),
}
# What each imports: click with the first things, the other after that.
INTERRUPTED_IN = [
    *[(program, "click") for program in PROGRAMS],
    ("cli", "requests"),
    ("doctor", "flask"),
    ("doctor", "sqlalchemy"),
    ("agent", "pydantic"),
]
MAX_HELP = 150  # modules with those of the standard library; with all commands there are 1,170
INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(1000): pass\nprint('went on')\n"


def run(folder: Path, *arguments: str, ignored: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program that takes modules from the folder first, as if it was started in it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}:{PROJECT}", "PORTAL_DATA_DIR": str(folder / "data")},
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(("program", "module"), INTERRUPTED_IN)
def test_ctrl_c_during_the_imports_is_a_status_without_a_traceback(program: str, module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(INTERRUPT)
    done = run(tmp_path, *PROGRAMS[program])
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_nor_has_it_a_traceback_before_it_is_known_what_ctrl_c_does(program: str, tmp_path: Path) -> None:
    (tmp_path / "contextlib.py").write_text("raise KeyboardInterrupt")
    done = run(tmp_path, *PROGRAMS[program])
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


@pytest.mark.parametrize(
    ("program", "module"),
    [("doctor", "operations.doctor.doctor.examine"), ("agent", "operations.agent.commands._opened")],
)
def test_a_command_of_the_server_that_is_interrupted_ends_likewise(program: str, module: str, tmp_path: Path) -> None:
    place, _, function = module.rpartition(".")
    begin = (
        f"import {place} as place\ndef interrupted(*_, **__): raise KeyboardInterrupt\nplace.{function} = interrupted\n"
        "from onboarding_portal import portal_server; portal_server()"
    )
    done = run(tmp_path, "-c", begin, *PROGRAMS[program][2:])
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "\n")


def test_a_program_that_was_told_to_ignore_ctrl_c_goes_on_ignoring_it(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(INTERRUPT)
    done = run(tmp_path, *PROGRAMS["cli"], ignored=True)
    assert done.stdout == "went on\n"


def test_the_help_of_the_server_imports_click_and_nothing_of_the_portal(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom onboarding_portal import portal_server\ntry:\n    portal_server()\n"
        "finally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = run(tmp_path, "-c", program, "--help")
    modules = set(done.stderr.split())
    assert "Serve the portal over HTTPS" in done.stdout
    packages = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert {"app", "config", "flask", "pydantic", "sqlalchemy", "workflows"} & packages == set()
    assert {name for name in modules if name.startswith("operations.")} == {"operations.server_program"}
    assert len(modules) <= MAX_HELP
