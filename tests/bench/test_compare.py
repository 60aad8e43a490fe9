"""`bench/compare`, with few requests, and the file of results that it appends to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from bench import harness, results
from bench.results import Record

ROOT = Path(__file__).parents[2]
FEW = ["--rounds", "1", "--requests", "16", "--connections", "2", "--devices", "30", "--calls", "1"]
RECORD: dict[str, Any] = {
    "commit": "0" * 40,
    "changed": False,
    "before": None,
    "date": "2026-11-30T12:00:00Z",
    "python": {"version": "3.11.2", "build": "main", "compiler": "GCC 12.2.0"},
    "machine": {
        "processor": "Some processor",
        "processors": 2,
        "memory_mb": 4096,
        "system": "Linux 6.1 x86_64",
        "sync_ms": 0.1,
        "load": [0.0, 0.5],
    },
    "cfssl": "1.2.0",
    "settings": {"PORTAL_WORKERS": "2"},
    "options": {"rounds": 5},
    "figures": {"bundle": {"now": {"per_second": 500.0, "broker_cpu_ms": 0.0}}},
    "ratios": {"registration with bundle / cfssl newcert": {"median": 1.1, "least": 0.9, "most": 1.2}},
}


@pytest.fixture(scope="module")
def compare(program: Callable[[str], ModuleType]) -> ModuleType:
    return program("compare")


def run(*options: str, path: str = os.environ["PATH"]) -> tuple[str, dict[str, Any]]:
    """Run the program; return what it prints, and its record."""
    command = [sys.executable, str(ROOT / "bench" / "compare"), *FEW, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    return done.stdout, json.loads(last)


@pytest.fixture
def path_without_cfssl(tmp_path: Path) -> str:
    """A folder with links to all programs but this one."""
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in folder.iterdir() if folder.is_dir() else ():
            link = tmp_path / program.name
            if program.name != "cfssl" and not link.is_symlink():
                link.symlink_to(program)
    return str(tmp_path)


@pytest.mark.system
def test_a_round_has_figures_of_each_part_and_goes_on_without_cfssl(path_without_cfssl: str) -> None:
    printed, record = run("--only", "bundle", "csr", "broker", "start", path=path_without_cfssl)
    assert printed.startswith("cfssl is missing, so nothing is compared with it")
    Record.model_validate_json(json.dumps(record))
    expected = {
        "bundle": ("per_second", "database_bytes", "download_per_second", "both_cpu_ms"),
        "csr": ("per_second", "p99"),
        "broker": ("usable_ms", "enforced_ms"),
        "start": ("ready_cpu_s", "help_cpu_s", "list_cpu_s"),
    }
    for part, names in expected.items():
        assert set(record["figures"][part]) == {"now"}
        for name in names:
            assert record["figures"][part]["now"][name] > 0
            assert re.search(rf"^  {name} ", printed, re.MULTILINE)
    assert record["ratios"].keys() == {"p99 / median, with bundle", "p99 / median, with CSR"}


@pytest.mark.system
@pytest.mark.long
def test_another_version_cfssl_and_the_loop_take_turns_and_nothing_is_left() -> None:
    _, record = run("--before", "HEAD")
    contenders = {part: set(figures) for part, figures in record["figures"].items()}
    portals = {"now", "before"}
    assert contenders == {
        "bundle": portals | {"cfssl"},
        "csr": portals | {"cfssl"},
        "upload": portals | {"loop"},
        "broker": portals,
        "start": portals,
    }
    upload = record["figures"]["upload"]
    assert record["ratios"]["upload / before"]["median"] == pytest.approx(
        upload["now"]["per_second"] / upload["before"]["per_second"], rel=0.01
    )
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "/pb-" not in listed


SYNC = """
import os, sys, time
file, began = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), time.monotonic()
for sync in (os.fsync, os.fdatasync):
    sync(file)
print(time.monotonic() - began)
"""


def test_a_program_that_is_started_with_slower_syncs_waits_at_each(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SYNC, str(tmp_path / "file")]
    with harness.slower_syncs(tmp_path, 100):
        took = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert took >= 0.2
    assert "LD_PRELOAD" not in os.environ


def test_a_ratio_is_that_of_one_round_and_missing_where_a_contender_is(compare: ModuleType) -> None:
    ratio = compare.Ratio("upload / shell loop", "upload/now/per_second", "upload/loop/per_second")
    assert ratio.of({"upload": {"now": {"per_second": 90.0}, "loop": {"per_second": 30.0}}}) == 3
    assert ratio.of({"upload": {"now": {"per_second": 90.0}}}) is None
    assert ratio.of({"bundle": {"now": {"per_second": 90.0}}}) is None


def test_the_ratio_of_a_run_is_the_median_of_those_of_its_rounds(compare: ModuleType) -> None:
    rates = [(10.0, 10.0), (40.0, 10.0), (30.0, 15.0)]
    done = [{"upload": {"now": {"per_second": ours}, "before": {"per_second": theirs}}} for ours, theirs in rates]
    found = compare._ratios(done)
    assert set(found) == {"upload / before"}
    assert found["upload / before"].model_dump() == {"median": 2, "least": 1, "most": 4}


# --- The file -----------------------------------------------------------------------------------------------------


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    record = Record.model_validate_json(json.dumps(RECORD))
    results.append(record, file)
    results.append(record, file)
    assert results.read(file) == [record, record]


def test_a_second_run_that_is_recorded_is_of_the_same_files_and_a_changed_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "bench" / "results.jsonl")
    (tmp_path / "bench").mkdir()
    for path in (results.RESULTS, tmp_path / "app.py"):
        path.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    results.append(Record.model_validate_json(json.dumps(RECORD)), results.RESULTS)
    assert not results.has_changes()
    (tmp_path / "app.py").write_text("print()\n")
    assert results.has_changes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("commit", "58338"),
        ("before", "main"),
        ("date", "2026-11-30T12:00:00"),
        ("python", {"version": "3.11.2"}),
        ("options", {"rounds": 0}),
        ("figures", {"bundle": {"now": {"per_second": -1}}}),
        ("ratios", {"upload / before": {"median": 1}}),
        ("host", "a name"),
    ],
)
def test_a_record_of_another_form_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Record.model_validate_json(json.dumps({**RECORD, field: value}))


def test_the_results_by_version_are_of_this_form_in_order_of_time_and_name_ratios_that_there_are(
    compare: ModuleType,
) -> None:
    records = results.read()
    assert records == sorted(records, key=lambda record: record.date)
    known = {ratio.name for ratio in compare.RATIOS}
    for record in records:
        assert set(record.ratios) <= known
        assert set(record.figures) <= {*compare.PARTS, *compare.MORE_PARTS}
        assert all("now" in contenders for contenders in record.figures.values())
        assert all(spread.least <= spread.median <= spread.most for spread in record.ratios.values())


def test_the_results_in_the_documentation_are_those_of_a_run_that_is_on_record(compare: ModuleType) -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    match = re.search(r"commit `([0-9a-f]{7,40})`, beside `([0-9a-f]{7,40})`", text)
    assert match
    [record] = [
        one for one in results.read() if one.commit.startswith(match[1]) and (one.before or "").startswith(match[2])
    ]
    for rows in (compare._median_rows(record), compare._ratio_rows(record)):
        assert len(rows) > 10
        assert "\n".join(["", *rows, "\n"]) in text


def test_the_guides_give_no_figures_of_this_program_which_each_run_on_record_would_make_old() -> None:
    lines = [
        line
        for page in (ROOT / "docs" / "how-to").glob("*.md")
        for line in page.read_text().splitlines()
        if "`bench/compare`" in line
    ]
    assert lines
    assert not [line for line in lines if re.search(r"\d", line)]


def test_a_version_that_does_not_exist_is_said_to_be_none() -> None:
    command = [sys.executable, str(ROOT / "bench" / "compare"), "--before", "no-such-version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("There is no commit no-such-version in ")
