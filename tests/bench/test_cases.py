"""`bench/cases`, on folders made for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.foreign import FILES

ROOT = Path(__file__).parents[2]


def cases(folder: Path) -> tuple[int, list[str], dict[str, Any]]:
    """Run the cases; returns the exit status, a line for each case, and the summary."""
    command = [sys.executable, str(ROOT / "bench" / "cases"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    *lines, summary = done.stdout.splitlines()
    return done.returncode, lines, json.loads(summary)


def test_each_case_has_a_line_and_one_that_fails_makes_the_exit_status_1(tmp_path: Path) -> None:
    for name in ("01-good", "02-told", "03-cut"):
        (tmp_path / "pki" / name).mkdir(parents=True)
        (tmp_path / "pki" / name / "README.md").write_text("A case.\n")
    good = FILES[0].read_bytes()
    (tmp_path / "pki" / "01-good" / "request.csr").write_bytes(good)
    status, lines, summary = cases(tmp_path)
    assert [line.split()[:2] for line in lines] == [["pki/01-good", "ok"], ["pki/02-told", "no"], ["pki/03-cut", "no"]]
    assert (status, summary["ok"], summary["no check"]) == (0, 1, 2)

    (tmp_path / "pki" / "03-cut" / "request.csr").write_bytes(good.replace(b"\nM", b"\n!"))
    status, lines, summary = cases(tmp_path)
    assert lines[2].split()[:2] == ["pki/03-cut", "FAILED"]
    assert "request.csr by est" in lines[2]
    assert (status, summary["FAILED"]) == (1, 1)
