"""`--help` of the scripts: a few lines, and nothing else happens; what they do not take is refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").iterdir() if not path.suffix and path.is_file())


def run(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it where each beginning of a set-up fails: there is no virtual environment, and none can be made."""
    (folder / "not-a-venv").touch()
    return subprocess.run(
        [ROOT / "scripts" / script, *arguments],
        env=os.environ | {"PORTAL_VENV": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_these_are_all_scripts() -> None:
    assert SCRIPTS == ["check", "demo", "run", "screenshots", "site", "test"]


@pytest.mark.parametrize("asked", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_usage_in_a_few_lines_and_nothing_else_happens(tmp_path: Path, script: str, asked: str) -> None:
    done = run(script, asked, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, empty, *usage = done.stdout.splitlines()
    assert first.endswith(".")
    assert empty == ""
    assert usage[0].startswith(f"  scripts/{script}")
    assert len(usage) <= 8
    assert [path.name for path in tmp_path.iterdir()] == ["not-a-venv"]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "test"])
def test_a_script_that_takes_no_arguments_says_so_before_it_begins(tmp_path: Path, script: str) -> None:
    done = run(script, "--portal", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{script} takes no arguments; with --help it says what it does.\n"


def test_the_help_of_the_tests_comes_after_their_other_options_too_and_names_them(tmp_path: Path) -> None:
    done = run("test", "--all", "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "  scripts/test --all " in done.stdout
    assert "  scripts/test --setup " in done.stdout


def test_setting_up_for_tests_and_running_some_exclude_each_other(tmp_path: Path) -> None:
    done = run("test", "--setup", "tests/scripts", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "--setup runs no tests, so tests/scripts cannot follow it.\n"
