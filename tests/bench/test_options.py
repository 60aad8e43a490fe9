"""How the benchmarks are started: with a Python that lacks what they need, and with options that are wrong."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from bench import options

BENCH = Path(__file__).parents[2] / "bench"
PROGRAMS = [path.name for path in sorted(BENCH.iterdir()) if path.is_file() and not path.suffix]
WITHOUT_PACKAGES = [os.path.realpath(sys.executable), "-S"]


def started(command: list[str], venv: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | {"PORTAL_VENV": str(venv)}, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "mutation"])  # that makes its own environment
def test_a_python_without_the_packages_says_in_one_sentence_what_to_run(name: str, tmp_path: Path) -> None:
    done = started([*WITHOUT_PACKAGES, str(BENCH / name), "--help"], tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        rf"bench/{name} needs packages that this Python lacks \([\w-]+, for one\);"
        r" scripts/test --setup installs them, and runs no test\.\n",
        done.stderr,
    )


@pytest.mark.parametrize(("given", "status"), [(["--help"], 0), ([], 1), (["5"], 1)])
def test_the_shell_loop_says_how_it_is_called(given: list[str], status: int, tmp_path: Path) -> None:
    done = started([str(BENCH / "shell_loop.sh"), *given], tmp_path)
    assert done.returncode == status
    assert ("  bench/shell_loop.sh SECONDS FOLDER\n" in done.stdout) == (status == 0)
    assert done.stderr == ("It takes SECONDS and FOLDER; with --help it says what it does.\n" if status else "")


def test_it_goes_on_with_the_python_of_the_virtual_environment_if_there_is_one(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    done = started([*WITHOUT_PACKAGES, str(BENCH / "compare"), "--quick", "--only", "start"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(BENCH / "compare"), "--quick", "--only", "start"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rounds", "0"], "argument --rounds: '0' is no whole number from 1 on"),
        (["--requests", "many"], "argument --requests: 'many' is no whole number from 1 on"),
        (["--folder", "/no/such/folder"], "argument --folder: there is no folder /no/such/folder"),
        (["--slower-sync", "-1"], "argument --slower-sync: '-1' is no number from 0 on"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(
    given: list[str],
    said: str,
    program: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *given])
    with pytest.raises(SystemExit, match="2"):
        program("compare")._arguments()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == f"compare: error: {said}"


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_option_of_any_benchmark_takes_numbers_or_folders_unseen(name: str) -> None:
    source = (BENCH / name).read_text()
    assert "options.Parser(description=__doc__)" in source
    assert set(re.findall(r"type=([\w.]+)", source)) <= {
        "options.at_least",
        "options.count",
        "options.folder",
        "options.not_negative",
        "options.seconds",
        "options.writable_folder",
        "_setting",  # of bench/compare
        "Path",  # a program, or a file
    }
    assert not re.search(r'folder"?, type=Path', source)


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (options.count, {"1": 1, "20": 20}, ["0", "-1", "1.5", ""]),
        (options.at_least(0), {"0": 0}, ["-1", "x"]),
        (options.seconds, {"0.5": 0.5}, ["0", "-1", "nan", "inf", "x"]),
        (options.not_negative, {"0": 0.0, "2.5": 2.5}, ["-0.1", "nan", "inf", ""]),
    ],
)
def test_a_number_is_in_its_range(read: Callable[[str], float], good: dict[str, float], bad: list[str]) -> None:
    assert {text: read(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


def test_a_folder_is_there_and_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path.parent)
    assert options.writable_folder(tmp_path.name) == tmp_path.resolve()
    for text in ("none", str(tmp_path / "file")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"there is no folder {text}"):
            options.folder(text)


def test_the_help_shows_the_default_of_each_option_that_has_one() -> None:
    parser = options.Parser(prog="bench")
    parser.add_argument("--rounds", type=options.count, default=5, help="how often")
    parser.add_argument("--seed", type=options.at_least(0), default=0)
    parser.add_argument("--parts", nargs="+", default=["one", "two"], help="which")
    parser.add_argument("--before", help="a commit")
    parser.add_argument("--quick", action="store_true", help="less")
    shown = " ".join(parser.format_help().split())
    assert "--rounds ROUNDS how often (default: 5) --seed SEED (default: 0)" in shown
    assert "which (default: one two) --before BEFORE a commit --quick less" in shown
