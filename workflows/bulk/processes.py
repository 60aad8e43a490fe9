"""Issues the credentials of an upload in processes of their own, because threads slow the cryptography down.

Nothing that is imported here may import ``core.metrics``: the processes would take part in the server's counts.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing.connection import Connection

from config import Settings
from core.errors import PortalError, TokenUnavailable, Unavailable
from core.processors import on_any
from core.topics import Topic
from pki.profiles import CertificateTerms
from store.database import Database
from workflows.authority.issuers import Authority
from workflows.authority.keys import open_keys
from workflows.bundles import Bundles
from workflows.credentials import CredentialIssuer, DeviceRequest, IssuedCredentials
from workflows.tenants import TenantTerms

FEW = 16  # devices that are not worth starting processes for
PIECE = 32  # devices that a process is given at once: some 40 ms of work
MAX_PROCESSES = 4  # unless the settings say how many: these keep the one process busy that writes to the database
ANSWER_SECONDS = 120.0  # a process that takes longer hangs
TOKEN_PATIENCE_SECONDS = 30.0  # for which an upload waits for a token that fails
TOKEN_PAUSE_SECONDS = 0.5
IDLE_SECONDS = 60.0  # for which the processes stay after an upload, since the next one may be a part of the same file
NICENESS = 5  # single requests go first

log = logging.getLogger("portal.bulk")


@dataclass(frozen=True, slots=True)
class CredentialJob:
    """A device that needs credentials; ``topics`` are its own, ``None`` the default ones.

    ``terms`` are those of its certificate profile, ``None`` for the default one.
    """

    tenant: TenantTerms
    device_id: str
    request: DeviceRequest
    topics: tuple[Topic, ...] | None
    now: datetime
    terms: CertificateTerms | None = None


Result = IssuedCredentials | PortalError


@dataclass(frozen=True, slots=True)
class _Setup:
    settings: Settings
    link_keys: Sequence[str] = field(repr=False)


def issue_all(credentials: CredentialIssuer, jobs: Sequence[CredentialJob]) -> list[Result]:
    """Issue the credentials of each device, or say why not; one that fails does not stop the others."""
    return [_issue(credentials, job) for job in jobs]


def _issue(credentials: CredentialIssuer, job: CredentialJob) -> Result:
    try:
        return credentials.issue(job.tenant, job.device_id, job.request, job.topics, now=job.now, terms=job.terms)
    except PortalError as error:
        return error
    except Exception:
        log.exception("credentials could not be issued", extra={"device_id": job.device_id})
        return PortalError("Unexpected error at this row; the portal's log has the cause.")


# --- In the server ------------------------------------------------------------------------------------------------


class _Pool:
    """Processes that end when they are closed, or when this process does, however that happens."""

    def __init__(self, setup: _Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self._watched, self._lifeline = context.Pipe(duplex=False)
        self.executor = ProcessPoolExecutor(
            setup.settings.bulk_processes or min(MAX_PROCESSES, os.cpu_count() or 1),
            mp_context=context,
            initializer=_start,
            initargs=(self._watched, setup),
        )

    def submit(self, jobs: Sequence[CredentialJob]) -> list[Future[list[Result]]]:
        pieces = (jobs[start : start + PIECE] for start in range(0, len(jobs), PIECE))
        with on_any():  # here the processes are started
            return [self.executor.submit(_issue_here, piece) for piece in pieces]

    def close(self, *, wait: bool = True) -> None:
        """End the processes: with ``wait`` once they have done what they are at, else at once."""
        if not wait:
            self._lifeline.close()
        self.executor.shutdown(wait=wait, cancel_futures=True)
        self._lifeline.close()
        self._watched.close()


@dataclass(frozen=True, slots=True)
class Issuing:
    """Credentials that are being issued, in the order of their jobs."""

    pieces: Sequence[Future[list[Result]]] = ()
    pool: _Pool | None = None

    def cancel(self) -> None:
        """Begin no more of them."""
        for piece in self.pieces:
            piece.cancel()


class CredentialProcesses:
    """The processes for all uploads of this server process, started when they are first needed."""

    def __init__(self, settings: Settings, link_keys: Sequence[str], credentials: CredentialIssuer) -> None:
        """``credentials`` issues those of a few devices here."""
        self._setup = _Setup(settings, link_keys)
        self._credentials = credentials
        self._lock = threading.Lock()
        self._pool: _Pool | None = None
        self._uploads = 0
        self._idle: threading.Timer | None = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the processes that there are for the ``with`` block, and for ``IDLE_SECONDS`` after it."""
        with self._lock:
            self._uploads += 1
            if self._idle is not None:
                self._idle.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._uploads -= 1
                if not self._uploads and self._pool is not None:
                    self._idle = threading.Timer(IDLE_SECONDS, self._close_if_idle)
                    self._idle.daemon = True
                    self._idle.start()

    def check(self, job: CredentialJob) -> tuple[str, ...]:
        """Return the names that no other device may have; raises ``InputInvalid`` if nothing would be issued."""
        return self._credentials.check(job.tenant, job.request, job.terms)[1].names

    def issue(self, jobs: Sequence[CredentialJob]) -> Issuing:
        """Begin to issue credentials; raises ``Unavailable`` if no process can be started."""
        if len(jobs) <= FEW and self._pool is None:
            done: Future[list[Result]] = Future()
            done.set_result(issue_all(self._credentials, jobs))
            return Issuing([done])
        for _ in range(2):
            pool = self._running()
            try:
                return Issuing(pool.submit(jobs), pool)
            except (BrokenExecutor, OSError, RuntimeError):  # a process of it was killed: others take their place
                self._discard(pool)
        raise Unavailable("No process that issues credentials can be started; try again later.")

    def results(self, issuing: Issuing) -> list[Result]:
        """Wait for credentials; raises ``Unavailable`` if the process that issues them has ended or hangs."""
        try:
            return [result for piece in issuing.pieces for result in piece.result(ANSWER_SECONDS)]
        except (BrokenExecutor, TimeoutError) as error:
            if issuing.pool is not None:
                self._discard(issuing.pool)
            raise Unavailable("A process that issues credentials has ended; send the remaining rows again.") from error

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            pool, self._pool = self._pool, None
            if self._idle is not None:
                self._idle.cancel()
        if pool is not None:
            pool.close()

    def _running(self) -> _Pool:
        with self._lock:
            if self._pool is None:
                self._pool = _Pool(self._setup)
            return self._pool

    def _discard(self, pool: _Pool) -> None:
        with self._lock:
            if self._pool is pool:
                self._pool = None
        pool.close(wait=False)

    def _close_if_idle(self) -> None:
        with self._lock:
            if self._uploads or self._pool is None:
                return
            pool, self._pool = self._pool, None
        pool.close()


# --- In each of the processes -------------------------------------------------------------------------------------

_opened: CredentialIssuer | PortalError = PortalError("The process was not set up.")


def _start(lifeline: Connection, setup: _Setup) -> None:
    """Prepare a process: it loads the CA's key by itself, and ends when the other end of ``lifeline`` is closed."""
    global _opened
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the group; the server decides
    with contextlib.suppress(OSError):  # where the system does not let a process choose
        os.nice(NICENESS)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    settings = setup.settings
    try:
        database = Database(settings.database_url, folder=settings.data_dir, threads=1)
        authority = Authority(database, open_keys(settings, make=False))
        _opened = CredentialIssuer(settings, authority, Bundles(settings, authority, setup.link_keys))
    except PortalError as error:
        _opened = error  # the answer to every job


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(OSError):
        lifeline.poll(None)  # nothing is ever sent: it returns when the other end is closed
    os._exit(0)


def _issue_here(jobs: Sequence[CredentialJob]) -> list[Result]:
    if isinstance(_opened, PortalError):
        raise _opened
    return [_issue_patiently(_opened, job) for job in jobs]


_token_fails_since: float | None = None


def _issue_patiently(credentials: CredentialIssuer, job: CredentialJob) -> Result:
    """Wait for a token that fails, as long as it may just have been restarted: else thousands of rows would fail."""
    global _token_fails_since
    while isinstance(result := _issue(credentials, job), TokenUnavailable):
        now = time.monotonic()
        _token_fails_since = now if _token_fails_since is None else _token_fails_since
        if now - _token_fails_since >= TOKEN_PATIENCE_SECONDS:
            return result
        time.sleep(TOKEN_PAUSE_SECONDS)
    if not isinstance(result, PortalError):
        _token_fails_since = None
    return result
