"""The commands of docs/hsm.md, by which somebody tries a token in software."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tokens import MODULE

pytestmark = [pytest.mark.system, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]


def test_the_documented_commands_make_a_portal_whose_keys_are_born_in_a_token(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "hsm.md").read_text(), re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-euc", block],
        cwd=tmp_path,
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SOFTHSM_MODULE": str(MODULE),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listed = done.stdout.splitlines()[-2:]
    assert [line.split()[0] for line in listed] == ["root", "issuing-1"]
    assert all("born in the token" in line and "pkcs11:token=portal" in line for line in listed)
    assert not list((tmp_path / "data-hsm" / "ca").glob("*.key.pem"))
