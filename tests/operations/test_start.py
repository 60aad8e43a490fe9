"""What the start of the portal imports: each module takes processor time in it, so those that are seldom used wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
SELDOM = {"asn1crypto", "pkcs11", "requests", "rich", "segno"}


def test_the_start_imports_nothing_for_tokens_of_keys_nor_for_qr_codes() -> None:
    program = "import app, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True
    )
    imported = set(done.stdout.split())
    assert {"flask", "gunicorn", "sqlalchemy"} <= imported
    assert not SELDOM & imported
