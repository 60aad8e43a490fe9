"""Has the credentials of many devices made by processes of their own, because threads slow the cryptography down."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing.connection import Pipe
from pathlib import Path

from config import Settings
from core.errors import PortalError, Unavailable
from core.topics import Topic
from workflows.credentials import CredentialIssuer, DeviceRequest, IssuedCredentials

PIECE = 32  # devices that a process is given at once: some 40 ms of work
MOST_PROCESSES = 4  # unless the settings say how many; what writes to the database is one, and busy with so many
ANSWER_SECONDS = 120.0  # a process that takes longer hangs
STOP_SECONDS = 5.0

log = logging.getLogger("portal.bulk")


@dataclass(frozen=True, slots=True)
class Job:
    """A device that needs credentials; ``topics`` are its own, ``None`` the default ones."""

    device_id: str
    request: DeviceRequest
    topics: tuple[Topic, ...] | None
    now: datetime


Result = IssuedCredentials | PortalError


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process is told first, through its pipe; secrets are nowhere else on the way to it."""

    settings: Settings
    tenant_id: str
    link_keys: Sequence[str] = field(repr=False)


def make_all(maker: CredentialIssuer, jobs: Sequence[Job]) -> list[Result]:
    """Make the credentials of each, or say why not; one that fails hurts no other."""
    return [_make(maker, job) for job in jobs]


def _make(maker: CredentialIssuer, job: Job) -> Result:
    try:
        return maker.issue(job.device_id, job.request, job.topics, now=job.now)
    except PortalError as error:
        return error
    except Exception:
        log.exception("credentials could not be made", extra={"device_id": job.device_id})
        return PortalError("The portal failed at this row; its log has the cause.")


class Makers:
    """The processes of one upload, started when they are first needed.

    They hold nothing of this process but one end of a pipe, whose closing, by this process's death at the latest, ends
    them. Each loads the CA's key by itself.
    """

    def __init__(self, setup: Setup, here: CredentialIssuer) -> None:
        self._setup = setup
        self._here = here
        self._count = setup.settings.bulk_processes or min(MOST_PROCESSES, os.cpu_count() or 1)
        self._threads: ThreadPoolExecutor | None = None
        self._processes: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def make(self, jobs: Sequence[Job], *, few: bool) -> list[Future[list[Result]]]:
        """Begin to make the credentials of each, in their order; ``few`` are not worth starting processes for."""
        if few and self._threads is None:
            made: Future[list[Result]] = Future()
            made.set_result(make_all(self._here, jobs))
            return [made]
        threads = self._threads or self._start()
        return [threads.submit(self._piece, jobs[start : start + PIECE]) for start in range(0, len(jobs), PIECE)]

    def _start(self) -> ThreadPoolExecutor:
        for _ in range(self._count):
            process = _Process(self._setup)
            self._processes.append(process)
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="bulk")
        return self._threads

    def _piece(self, jobs: Sequence[Job]) -> list[Result]:
        process = self._idle.get()
        try:
            return process.make(jobs)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()


class _Process:
    """One of them, seen from here."""

    def __init__(self, setup: Setup) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "workflows.bulk.worker", str(theirs.fileno())]
        # Else it would take part in this process's counts.
        environment = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                cwd=Path(__file__).parents[2],  # where the module is found
                pass_fds=[theirs.fileno()],
            )
        self._setup: Setup | None = setup

    def make(self, jobs: Sequence[Job]) -> list[Result]:
        """Have it make credentials; raises ``Unavailable`` where it is gone, or cannot."""
        with _translated():
            if self._setup is not None:
                self._pipe.send(self._setup)
                self._setup = None
            self._pipe.send(jobs)
            if not self._pipe.poll(ANSWER_SECONDS):
                self._process.kill()
                raise EOFError
            answer: list[Result] | PortalError = self._pipe.recv()
        if isinstance(answer, PortalError):
            raise answer
        return answer

    def close(self) -> None:
        """Close the pipe, which ends it, and see that it does."""
        self._pipe.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise Unavailable("A process that makes credentials has ended; send what is not done yet again.") from error
