"""How the broker is controlled: by which means, in which style, and where an installation states what it has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from core.states import BrokerEngine

ACL_FILE, JOURNAL_FILE, RECORD_FILE = "acl", "guard.journal", "projection.json"
# Where mosquitto/guard/Makefile installs the plugin, with its own PREFIX and with that of a package.
PLUGINS = tuple(Path(prefix, "lib/onboarding-portal/portal_guard.so") for prefix in ("/usr/local", "/usr"))


class AclStyle(StrEnum):
    """How devices get their topics in the broker's ACL: a block for each device, or one pattern for all."""

    PER_DEVICE = "per-device"
    PATTERN = "pattern"


class ControlKind(StrEnum):
    """What makes the broker enforce the portal's decisions: a plugin in it, files that it reads, or answers to it.

    ``none`` if no broker runs beside the portal: those that there are have agents, or other nodes, and the guard.
    """

    GUARD = "guard"
    FILES = "files"
    RABBITMQ = "rabbitmq"
    NONE = "none"

    @property
    def by_journal(self) -> bool:
        """Whether each client may do what the journal says of it, which holds applications and tenants to theirs, too.

        Otherwise an ACL says that, and cannot.
        """
        return self is not ControlKind.FILES

    @property
    def engine(self) -> BrokerEngine:
        """What program the broker is under it."""
        return BrokerEngine.RABBITMQ if self is ControlKind.RABBITMQ else BrokerEngine.MOSQUITTO


# The second line of the portal's comment at the beginning of the ACL.
STYLE_LINE = re.compile(rb"^# style ([a-z-]{1,20})$", re.MULTILINE)
_STATED_IN = {ACL_FILE: STYLE_LINE, RECORD_FILE: re.compile(rb'"style": "([a-z-]{1,20})"')}
_CONTROL = re.compile(rb'"control": "(guard|rabbitmq)"')
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


def default_control(broker_dir: Path, plugins: Iterable[Path] = PLUGINS) -> ControlKind:
    """Return the control of an installation that names none: the guard, wherever its plugin is installed.

    Else the one that the broker's folder states: by its record, or if that is missing by a journal; files if neither.
    """
    if any(path.exists() for path in plugins):
        return ControlKind.GUARD
    try:
        with (broker_dir / RECORD_FILE).open("rb") as file:
            stated = _CONTROL.search(file.read(_MAX_BYTES))
            return ControlKind.FILES if stated is None else ControlKind(stated[1].decode())
    except OSError:
        return ControlKind.GUARD if (broker_dir / JOURNAL_FILE).exists() else ControlKind.FILES
