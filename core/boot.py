"""This boot of the machine: what tells it from others, and a clock that nobody moves."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Return what distinguishes this boot of the machine from others: the clocks since the boot restart with each."""
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    # Hidden from a sandboxed service; systemd gives each run of the service an id, which serves as well.
    return os.environ.get("INVOCATION_ID", "unknown")[:36]


def boot_seconds() -> float:
    """Return the time since the boot, in seconds, which goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
