"""The parts of `bench/profile` are found in the code, and each has a share of a registration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_of_a_registration_is_found_and_has_a_share(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "profile"), "--requests", "4", "--folder", str(tmp_path), "--csr"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {part for part, ms in figures["ms"].items() if not ms} == {"key", "bundle sealed, link signed"}
    assert figures["statements"] == 11
