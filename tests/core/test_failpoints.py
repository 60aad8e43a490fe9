"""Failpoints: each is in the code once, does what the variable says, costs nothing without it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.failpoints import NAMES

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from core import failpoints
for name in sys.argv[1:]:
    try:
        failpoints.failpoint(name)
    except OSError as error:
        print("error at", name)
print("through")
"""


def run(plan: str, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        cwd=ROOT,
        env={**os.environ, "PORTAL_FAILPOINT": plan},
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )


def test_each_name_is_at_one_place_in_the_code_and_every_place_has_a_name() -> None:
    modules = [path for path in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(path.relative_to(ROOT).parts)]
    used = [
        name
        for module in modules
        for name in re.findall(r'^\s+failpoint\("([^"]+)"\)$', module.read_text(), re.MULTILINE)
    ]
    assert sorted(used) == sorted(NAMES)


@pytest.mark.parametrize(
    ("plan", "names", "status"),
    [
        ("", NAMES, 0),
        ("apply.begin", ["apply.begin"], -signal.SIGKILL),
        ("apply.begin=kill", ["apply.after_cut", "apply.begin"], -signal.SIGKILL),
        ("apply.begin=killgroup", ["apply.begin"], -signal.SIGKILL),
        ("apply.begin", ["apply.after_cut"], 0),
        ("apply.begin:3", ["apply.begin", "apply.begin"], 0),
        ("apply.begin:3", ["apply.begin", "apply.begin", "apply.begin"], -signal.SIGKILL),
        ("revoke.after_commit>apply.begin", ["apply.begin", "apply.begin"], 0),
        ("revoke.after_commit>apply.begin", ["apply.begin", "revoke.after_commit", "apply.begin"], -signal.SIGKILL),
        ("apply.begin=sleep:0.001", ["apply.begin"], 0),
    ],
)
def test_a_process_is_killed_where_the_variable_says(plan: str, names: list[str], status: int) -> None:
    assert run(plan, *names).returncode == status


def test_an_error_is_raised_once() -> None:
    assert run("apply.begin=error", "apply.begin", "apply.begin").stdout == "error at apply.begin\nthrough\n"


@pytest.mark.parametrize("plan", ["apply.begun", "apply.begin:x", "apply.begin=explode", "x>apply.begin"])
def test_a_plan_that_cannot_be_read_stops_the_start(plan: str) -> None:
    done = run(plan)
    assert done.returncode == 1
    assert "PORTAL_FAILPOINT must be" in done.stderr
