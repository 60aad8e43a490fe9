"""`bench/hostile`, with a few inputs of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_inputs_of_each_kind_are_answered_and_leave_no_trace() -> None:
    command = [sys.executable, str(ROOT / "bench" / "hostile"), "--inputs", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    kinds = ("csr", "est", "certificate", "json", "ocsp", "bundle", "journal", "attestation", "enroll")
    assert [sum(result[kind]["statuses"].values()) for kind in kinds] == [5] * len(kinds)
    assert result["failures"] == 0
