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

from core.errors import PortalError
from core.files import FileLock
from operations.wiring import Portal

log = logging.getLogger("portal.jobs")

LEADER_LOCK = ".jobs.lock"
CLOCK_SEEN = ".jobs.clock"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
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
                    lead(portal, stopping, jobs, functools.partial(_sign_of_life, folder))
            # Twice, because a clock that was moved makes the last sign of life look old.
            if not leading and _is_silent(folder) and not stopping.wait(2.5) and _is_silent(folder):
                with stand_in.try_hold() as standing_in:
                    if standing_in:
                        log.error("the process that runs the jobs gives no sign of life; they are run in another")
                        lead(portal, stopping, jobs, lambda: _is_silent(folder))
        except (PortalError, OSError) as error:
            log.error("no job can run", extra={"problem": str(error)})
        stopping.wait(2.0)


def _sign_of_life(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        os.utime(folder / LEADER_LOCK, (time.time(), time.time()))
    return True


def _is_silent(folder: Path) -> bool:
    return abs(time.time() - (folder / LEADER_LOCK).stat().st_mtime) > SILENT_SECONDS


def lead(portal: Portal, stopping: threading.Event, jobs: tuple[Job, ...], goes_on: Callable[[], bool]) -> None:
    """Run the jobs until ``stopping`` is set or ``goes_on()``, which is asked between them, is false."""
    next_at = {job.name: time.monotonic() for job in jobs}
    seen = _ClockSeen(portal)
    leading = goes_on()
    while leading and not stopping.is_set():
        if seen.was_moved():
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


class _ClockSeen:
    """What the clock was when the jobs last ran by it, in this process or in one that stood in for it.

    A process that slept while the clock was moved and moved back, and another ran the jobs in between, would not know
    that all that has a date was made anew by the other clock. So it is kept in a file, of one length: writing in its
    place needs no room on the disk.
    """

    def __init__(self, portal: Portal) -> None:
        self._portal = portal
        self._file = portal.settings.data_dir / CLOCK_SEEN
        self._behind = self._now()

    def was_moved(self) -> bool:
        """Whether the clock is another than the jobs last ran by; from then on, they are taken to run by this one."""
        behind, kept = self._now(), self._kept()
        moved = any(abs(behind - last) > CLOCK_MOVED_SECONDS for last in (self._behind, kept) if last is not None)
        if moved or kept is None:
            self._behind = behind
            self._keep(behind)
        return moved

    def _now(self) -> float:
        """A number that changes when somebody moves the clock, by as many seconds."""
        return time.monotonic() - self._portal.clock().timestamp()

    def _kept(self) -> float | None:
        """The number as it was kept since this machine was started; ``None`` where there is none."""
        with contextlib.suppress(OSError, ValueError):
            boot, behind = self._file.read_text(encoding="ascii").split()
            return float(behind) if boot == _boot_id() else None
        return None

    def _keep(self, behind: float) -> None:
        with contextlib.suppress(OSError):
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, f"{_boot_id():36} {behind:24.3f}\n".encode(), 0)
            finally:
                os.close(descriptor)


def _boot_id() -> str:
    """What tells this run of the machine from others: the monotonic clock begins anew with each."""
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    # Hidden from a service that is confined; systemd gives each run of the service an id, which tells as much.
    return os.environ.get("INVOCATION_ID", "unknown")[:36]
