"""Which processors the threads of a process run on."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field


@dataclass(slots=True)
class Processors:
    """Those that this process may use, and the one that it was told to keep to."""

    _given_up: set[int] = field(default_factory=set)

    def keep_to_one(self, number: int, *, of: int) -> None:
        """Have this thread, and those that it starts, run on one processor; for process ``number`` of so many alike.

        Threads that hand Python's lock to each other from one processor to another work a fifth slower. Where there
        are more processors than processes, one might be idle while two processes share another: then nothing is done.
        Nor is it where the system does not let processes choose.
        """
        allowed = sorted(os.sched_getaffinity(0))
        if not 1 < len(allowed) <= of:
            return
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {allowed[number % len(allowed)]})
            self._given_up = set(allowed)

    def let_use_all(self, pid: int) -> None:
        """Let another process, just started by this one, use all that this one could before it kept to one."""
        if self._given_up:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(pid, self._given_up)


of_this_process = Processors()
