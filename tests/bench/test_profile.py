"""`bench/profile`, with few requests: each part has its time, and the shares add up."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
OF_A_BUNDLE = {"key", "bundle sealed, link signed"}
OF_A_CSR = {"the CSR read and verified"}


@pytest.mark.parametrize(
    ("options", "absent"), [((), OF_A_CSR), (("--csr",), OF_A_BUNDLE)], ids=["key and bundle", "csr"]
)
def test_its_shares_add_up_and_no_part_is_without_time(options: tuple[str, ...], absent: set[str]) -> None:
    command = [sys.executable, str(ROOT / "bench" / "profile"), "--requests", "6", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {part for part, ms in figures["ms"].items() if ms == 0} == absent
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \| ([\d.]+) \|$", done.stdout, re.MULTILINE)
    *parts, (name, total, share) = rows
    assert (name, share) == ("all", "100")
    assert {part for part, _, _ in parts} == set(figures["ms"]) - absent
    assert sum(float(ms) for _, ms, _ in parts) == pytest.approx(float(total), abs=0.001 * len(parts))
    assert sum(float(share) for _, _, share in parts) == pytest.approx(100, abs=0.1 * len(parts))
    assert figures["statements"] > 5
    assert figures["function_calls"] > 1000
    assert figures["unmeasured_ms"] > 0


def test_a_part_has_no_time_of_those_that_are_called_in_it(
    program: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = program("profile")
    ticks = itertools.count(step=1_000_000)  # a millisecond at each look at the clock
    monkeypatch.setattr(profile.time, "thread_time_ns", lambda: next(ticks))
    times = profile.Times()
    inner = times.measured("key", lambda: next(ticks))
    outer = times.measured("commit", lambda: (inner(), inner()))
    times.request(outer)
    parts = {part: ms for part, ms in times.medians().items() if ms}
    # The clock is looked at when a part begins and ends; the two inner calls take one tick more each.
    assert parts == {profile.REST: 2, "commit": 3, "key": 4}
    assert sum(parts.values()) == next(ticks) / 1e6 - 1


def test_the_shares_in_the_documentation_are_those_of_its_parts_and_add_up(
    program: Callable[[str], ModuleType],
) -> None:
    profile = program("profile")
    text = (ROOT / "docs" / "performance.md").read_text()
    table = re.search(r"^\| of a registration \|.*\n\|[ -|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table
    *parts, whole = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[1].splitlines()]
    assert [name for name, *_ in parts] == list(dict.fromkeys([*(name for name, _, _ in profile.PARTS), profile.REST]))
    assert (len(whole), whole[0]) == (9, "all")
    for column in range(1, len(whole), 2):
        figures = [(float(row[column]), float(row[column + 1])) for row in parts if row[column]]
        total = float(whole[column])
        assert whole[column + 1] == "100"
        assert sum(ms for ms, _ in figures) == pytest.approx(total, abs=0.005 * (len(figures) + 1))
        assert sum(share for _, share in figures) == pytest.approx(100, abs=0.05 * len(figures))
        for ms, share in figures:
            assert share == pytest.approx(100 * ms / total, abs=100 * 0.005 / total + 0.2)
