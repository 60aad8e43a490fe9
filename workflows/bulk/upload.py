"""Bulk registration: the batches of an upload, one being written while the processes work on the next ones."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from config import Settings
from core import metrics
from core.errors import LockUnavailable, PortalError, TooManyUploads, Unavailable, UploadsBusy
from core.files import FileLock
from store.audit import Actor
from store.locks import Locks
from workflows.bulk.batch import Batch, Batches, Candidate, RowAnswer, RowChecked, RowDone, RowFailed, failed
from workflows.bulk.processes import CredentialProcesses
from workflows.reconciliation import Reconciler
from workflows.tenants import TenantDirectory

BATCH = 256  # rows of a transaction, which keeps other writers waiting for some 15 ms
AHEAD = 3  # batches under way: one is written while the processes are at work on the others
UPLOADS_AGAIN_SECONDS = 10
_TOO_MANY = "The tenant may have {} uploads under way at a time; try again when one has ended."
WAKE_SECONDS = 1.0  # between two reconciliations during an upload


class Source(Protocol):
    """Where the rows of an upload come from."""

    @property
    def next_row(self) -> int:
        """Return the number of the next row to be taken."""

    def take(self, limit: int, *, wait: bool) -> Sequence[Candidate] | None:
        """Return at most ``limit`` rows; none at the end, ``None`` if none has come yet and ``wait`` is false.

        Raises ``PortalError`` if there can be no more, ``ConnectionError`` if the client is gone.
        """


@dataclass(eq=False, repr=False)
class Bulk:
    """Registers the rows of uploads."""

    _settings: Settings
    _tenants: TenantDirectory
    _reconciler: Reconciler
    _processes: CredentialProcesses
    _batches: Batches
    _locks: Locks

    def close(self) -> None:
        """End the processes that issue credentials."""
        self._processes.close()

    @contextlib.contextmanager
    def place(self, tenant_id: str) -> Iterator[None]:
        """Hold one of the places for uploads, which all processes of a node share.

        A tenant has as many of all nodes as its quota says, and of several places all but one where there are other
        tenants. Raises ``UploadsBusy``, and ``TooManyUploads`` if only this tenant has to wait.
        """
        with contextlib.ExitStack() as held:
            self._take_place(held, tenant_id)
            yield

    def _take_place(self, held: contextlib.ExitStack, tenant_id: str) -> None:
        folder, places, own = self._settings.data_dir, self._settings.bulk_uploads, 0
        paths = [folder / f".bulk-{number}.lock" for number in range(places)]
        # The file of a place that is held says by which tenant; nobody takes one while another looks at them.
        with FileLock(folder / ".bulk.lock").hold():
            free: Path | None = None
            for path in paths:
                with FileLock(path).try_hold() as is_free:
                    free = path if is_free and free is None else free
                    own += not is_free and path.read_text() == tenant_id
            most = self._places_of(tenant_id)
            if most is not None and own >= most:
                raise TooManyUploads(_TOO_MANY.format(most), UPLOADS_AGAIN_SECONDS)
            if free is None or not held.enter_context(FileLock(free).try_hold()):
                raise UploadsBusy(
                    "As many uploads as are allowed at a time are under way; try again when one has ended."
                )
            self._take_of_quota(held, tenant_id)
            free.write_text(tenant_id)

    def _take_of_quota(self, held: contextlib.ExitStack, tenant_id: str) -> None:
        """Hold one of the uploads that the quota allows a tenant at all nodes together."""
        quota = self._tenants.of(tenant_id).quotas.bulk_uploads
        for number in range(quota or 0):
            with contextlib.suppress(LockUnavailable):
                held.enter_context(self._locks.alone_among_nodes(f"upload {number} of {tenant_id}", 0))
                return
        if quota is not None:
            raise TooManyUploads(_TOO_MANY.format(quota), UPLOADS_AGAIN_SECONDS)

    def _places_of(self, tenant_id: str) -> int | None:
        """Return how many places a tenant may hold; a single one may hold all."""
        places, limits = self._settings.bulk_uploads, [self._tenants.of(tenant_id).quotas.bulk_uploads]
        if places > 1 and self._tenants.are_several:
            limits.append(places - 1)
        return min((limit for limit in limits if limit is not None), default=None)

    def register(self, actor: Actor, source: Source) -> Generator[Sequence[RowAnswer], None, None]:
        """Register the rows of ``source``; yields answers, in the rows' order, once what they say is durable.

        A row that fails hurts no other. What stops all (the source, the database) is said in a last answer. To be
        closed; what is under way then is not registered.
        """
        pending: deque[Batch] = deque()
        with self._processes.in_use():
            try:
                for answers in self._pipeline(actor, source, pending):
                    _count(answers)
                    yield answers
            finally:
                for batch in pending:
                    batch.issuing.cancel()

    def check(self, actor: Actor, source: Source) -> Generator[Sequence[RowChecked | RowFailed], None, None]:
        """Yield what ``register`` would say of the rows of ``source``; nothing is registered."""
        while True:
            first = source.next_row
            try:
                taken = source.take(BATCH, wait=True)
                answers = self._batches.check(actor, taken or ())
            except PortalError as error:
                yield [failed(first, error, stopped=True)]
                return
            if not taken:
                return
            yield answers

    def _pipeline(self, actor: Actor, source: Source, pending: deque[Batch]) -> Iterator[Sequence[RowAnswer]]:
        last: RowFailed | None = None
        ended = False
        waking = _Waking(self._reconciler)
        while pending or not ended:
            if not ended and len(pending) < AHEAD:
                try:
                    taken = source.take(BATCH, wait=not pending)
                except PortalError as error:
                    taken, last = (), failed(source.next_row, error, stopped=True)
                if taken is not None:
                    ended = not taken
                    pending.extend(self._batches.begin(actor, rows) for rows in _apart(taken))
                    continue
            if pending:
                batch = pending.popleft()
                try:
                    answers = self._batches.finish(actor, batch)
                except Unavailable as error:
                    yield [failed(batch.candidates[0].row, error, stopped=True)]
                    return
                waking.granted(batch.generation, soon=ended and not pending)
                yield answers
        if last is not None:
            yield [last]


class _Waking:
    """Asks for reconciliations during an upload, not too often."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._called = time.monotonic()
        self._pending = False

    def granted(self, generation: int, *, soon: bool) -> None:
        self._pending |= generation > 0
        now = time.monotonic()
        if self._pending and (soon or now - self._called >= WAKE_SECONDS):
            self._reconciler.wake()
            self._called, self._pending = now, False


def _apart(candidates: Sequence[Candidate]) -> Iterator[Sequence[Candidate]]:
    """Split rows before one whose external id occurs again, so that the first is registered when the second is read."""
    seen: set[str] = set()
    start = 0
    for position, candidate in enumerate(candidates):
        if candidate.external_id is not None:
            if candidate.external_id in seen:
                yield candidates[start:position]
                start = position
                seen.clear()
            seen.add(candidate.external_id)
    if start < len(candidates):
        yield candidates[start:]


def _count(answers: Sequence[RowAnswer]) -> None:
    failures = sum(isinstance(answer, RowFailed) for answer in answers)
    repeated = sum(isinstance(answer, RowDone) and answer.repeated for answer in answers)
    outcomes = {"registered": len(answers) - failures - repeated, "repeated": repeated, "refused": failures}
    for outcome, number in outcomes.items():
        if number:
            metrics.counts.bulk_rows.labels(outcome).inc(number)
