"""How the broker is controlled: by which means, in which style, and where an installation states what it has."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

ACL_FILE, RECORD_FILE = "acl", "projection.json"


class AclStyle(StrEnum):
    """How devices get their topics in the broker's ACL: a block for each device, or one pattern for all."""

    PER_DEVICE = "per-device"
    PATTERN = "pattern"


class ControlKind(StrEnum):
    """What makes the broker enforce the portal's decisions: a plugin in it, or files that it reads."""

    GUARD = "guard"
    FILES = "files"


# The second line of the portal's comment at the beginning of the ACL.
STYLE_LINE = re.compile(rb"^# style ([a-z-]{1,20})$", re.MULTILINE)
_STATED_IN = {ACL_FILE: STYLE_LINE, RECORD_FILE: re.compile(rb'"style": "([a-z-]{1,20})"')}
_GUARD = re.compile(rb'"control": "guard"')
_MAX_BYTES = 4096  # both files state it near their beginning


def installed_style(broker_dir: Path) -> AclStyle | None:
    """Return the style that the ACL states, else the record beside it; ``None`` if neither file exists.

    If a file exists but none states the style, it is the allow-list: a damaged file must not grant anything.
    """
    exists = False
    for name, line in _STATED_IN.items():
        try:
            with (broker_dir / name).open("rb") as file:
                beginning = file.read(_MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            beginning = b""
        exists = True
        match = line.search(beginning)
        if match is not None and match[1].decode() in set(AclStyle):
            return AclStyle(match[1].decode())
    return AclStyle.PER_DEVICE if exists else None


def installed_control(broker_dir: Path) -> ControlKind:
    """Return the control that the record in the broker's folder states; files if it states none."""
    try:
        with (broker_dir / RECORD_FILE).open("rb") as file:
            return ControlKind.GUARD if _GUARD.search(file.read(_MAX_BYTES)) else ControlKind.FILES
    except OSError:
        return ControlKind.FILES
