"""Finds out which ACL style the files have that stand in the broker's folder already."""

from __future__ import annotations

import re
from pathlib import Path

from core.setting_values import AclStyle

ACL_FILE, RECORD_FILE = "acl", "projection.json"
_STATED_IN = {
    ACL_FILE: re.compile(rb"^# style ([a-z-]+)$", re.MULTILINE),
    RECORD_FILE: re.compile(rb'"style": "([a-z-]+)"'),
}
_MOST_BYTES = 4096  # both say it near their beginning


def installed_style(broker_dir: Path) -> AclStyle | None:
    """The style of what the portal has written there, which the ACL states, else the record beside it; None if new.

    Where there are files, but none says it, it is the allow-list: a file that was damaged must open nothing.
    """
    there = False
    for name, stated in _STATED_IN.items():
        try:
            with (broker_dir / name).open("rb") as file:
                beginning = file.read(_MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            beginning = b""
        there = True
        match = stated.search(beginning)
        if match is not None and match[1].decode() in set(AclStyle):
            return AclStyle(match[1].decode())
    return AclStyle.PER_DEVICE if there else None
