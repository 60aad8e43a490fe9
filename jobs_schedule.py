"""When the jobs run, and in which process."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from errors import PortalError
from files import FileLock
from installation import Portal

log = logging.getLogger("portal.jobs")

LEADER_LOCK = ".jobs.lock"
SILENT_SECONDS = 60.0  # a job may take long, so that is not counted as silence before this
CLOCK_MOVED_SECONDS = 60.0
CLOCK_TRUSTED_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do every so many seconds; ``final`` where it cannot be undone."""

    name: str
    seconds: float
    run: Callable[[Portal], None]
    final: bool = False


def run(portal: Portal, stopping: threading.Event, jobs: tuple[Job, ...]) -> None:
    """Run the jobs until ``stopping`` is set, in one process among all on the data folder; the body of a thread.

    When the process that runs them dies, another takes over within a few seconds; where it only gives no sign of life
    (it is stopped, or hangs), another runs them beside it.
    """
    folder = portal.settings.data_dir
    leader, stand_in = FileLock(folder / LEADER_LOCK), FileLock(folder / ".jobs.stand-in.lock")
    while not stopping.is_set():
        try:
            with leader.try_hold() as leading:
                if leading:
                    _lead(portal, stopping, jobs, functools.partial(_sign_of_life, folder))
            # Twice, because a clock that was moved makes the last sign of life look old.
            if not leading and _is_silent(folder) and not stopping.wait(2.5) and _is_silent(folder):
                with stand_in.try_hold() as standing_in:
                    if standing_in:
                        log.error("the process that runs the jobs gives no sign of life; they are run in another")
                        _lead(portal, stopping, jobs, lambda: _is_silent(folder))
        except (PortalError, OSError) as error:
            log.error("no job can run", extra={"problem": str(error)})
        stopping.wait(2.0)


def _sign_of_life(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        os.utime(folder / LEADER_LOCK, (time.time(), time.time()))
    return True


def _is_silent(folder: Path) -> bool:
    return abs(time.time() - (folder / LEADER_LOCK).stat().st_mtime) > SILENT_SECONDS


def _lead(portal: Portal, stopping: threading.Event, jobs: tuple[Job, ...], goes_on: Callable[[], bool]) -> None:
    next_at = {job.name: time.monotonic() for job in jobs}
    behind = _clock_behind(portal)
    leading = goes_on()
    while leading and not stopping.is_set():
        if abs(_clock_behind(portal) - behind) > CLOCK_MOVED_SECONDS:
            behind = _clock_behind(portal)
            log.warning("the clock was moved; everything that has a date is looked at now")
            next_at = dict.fromkeys(next_at, time.monotonic())
            for job in jobs:
                if job.final:  # what would be destroyed by a clock that may be wrong can wait
                    next_at[job.name] += CLOCK_TRUSTED_SECONDS
        for job in jobs:
            if time.monotonic() < next_at[job.name] or stopping.is_set():
                continue
            try:
                job.run(portal)
            except PortalError as error:
                log.error("a job failed", extra={"job": job.name, "problem": error.detail})
            except Exception:
                log.exception("a job failed", extra={"job": job.name})
            next_at[job.name] = time.monotonic() + job.seconds
        stopping.wait(max(0.0, min(next_at.values()) - time.monotonic()))
        leading = goes_on()


def _clock_behind(portal: Portal) -> float:
    """A number that changes when somebody moves the clock, by as many seconds."""
    return time.monotonic() - portal.clock().timestamp()
