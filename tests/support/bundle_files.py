"""What the tests of bundles share: a device with its password, and looks at the files that a command wrote."""

from __future__ import annotations

import stat
from pathlib import Path

from tests.support.portal_stub import BUNDLE_PASSWORD

DEVICE_ID = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
PASSWORD = {"PORTAL_BUNDLE_PASSWORD": BUNDLE_PASSWORD}
WRONG = {"PORTAL_BUNDLE_PASSWORD": "not the password"}
Files = dict[str, bytes]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
