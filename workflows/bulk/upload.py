"""Registers devices by the hundred, each hundred in one transaction."""

from __future__ import annotations

import contextlib
import dataclasses
import ssl
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.exc import IntegrityError

from config import Settings
from core import metrics
from core.device_status import DeviceStatus
from core.errors import ExternalIdTaken, LockUnavailable, PortalError, StateConflict, Unavailable, UploadsBusy
from core.failpoints import failpoint
from core.files import FileLock
from core.topics import new_device_id
from pki.csr import is_for_key_of
from store import bulk
from store.bulk import KnownDevice
from store.database import Database
from workflows.audit import Actor
from workflows.authority.issuers import Authority
from workflows.bulk.recording import Task, write_batch
from workflows.bulk.terms import Candidate, RowDone, RowFailed, Source, failed
from workflows.bulk.workers import Credentials, Job, Makers, Result, Setup
from workflows.credentials import CredentialMaker, Wanted
from workflows.enforcement import Enforcement
from workflows.registration import Onboarding
from workflows.terms import Registration

BATCH = 256  # rows of a transaction, which keeps other writers waiting for some 15 ms
AHEAD = 3  # batches under way: one is written while the processes are at work on the others
FEW = 16  # rows that are not worth starting processes for
ATTEMPTS = 3  # at a row whose external id others are at work on, too
GRANT_SECONDS = 1.0  # between two calls for a broker pass

Answer = RowDone | RowFailed


@dataclass(slots=True)
class _Batch:
    """Rows under way, with the answers that are known already."""

    candidates: Sequence[Candidate]
    answers: dict[int, Answer]
    tasks: Sequence[Task]
    results: Sequence[Future[list[Result]]]
    generation: int = 0  # that the broker must know before a certificate goes out


class Bulk:
    """Many registrations in one request."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        enforcement: Enforcement,
        onboarding: Onboarding,
        credentials: CredentialMaker,
        *,
        link_keys: Sequence[str],
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._database = database
        self._authority = authority
        self._enforcement = enforcement
        self._onboarding = onboarding
        self._credentials = credentials
        self._link_keys = link_keys
        self._clock = clock

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places that there are for uploads, among all processes; raises ``UploadsBusy``."""
        with contextlib.ExitStack() as stack:
            for number in range(self._settings.bulk_uploads):
                lock = FileLock(self._settings.data_dir / f".bulk-{number}.lock")
                if stack.enter_context(lock.try_hold()):
                    yield
                    return
        raise UploadsBusy("As many uploads as are allowed at a time are under way; try again when one has ended.")

    def register(self, actor: Actor, source: Source) -> Generator[Sequence[Answer], None, None]:
        """Register what ``source`` gives; yields answers, in the rows' order, as soon as what they say is durable.

        A row that fails hurts no other. What stops all (the source, the database) is said in a last answer. To be
        closed; what is under way then is not registered.
        """
        setup = Setup(self._settings, actor.tenant_id, self._link_keys)
        makers = Makers(setup, self._credentials)
        try:
            for answers in self._batches(actor, source, makers):
                _count(answers)
                yield answers
        finally:
            makers.close()

    def _batches(self, actor: Actor, source: Source, makers: Makers) -> Iterator[Sequence[Answer]]:
        pending: deque[_Batch] = deque()
        last: RowFailed | None = None
        ended = False
        waking = _Waking(self._enforcement)
        while pending or not ended:
            if not ended and len(pending) < AHEAD:
                try:
                    taken = source.take(BATCH, wait=not pending)
                except PortalError as error:
                    taken, last = (), failed(source.next_row, error, stopped=True)
                if taken is not None:
                    ended = not taken
                    pending.extend(self._begin(actor, rows, makers) for rows in _apart(taken))
                    continue
            if pending:
                batch = pending.popleft()
                try:
                    answers = self._finish(actor, batch, makers, ATTEMPTS)
                except Unavailable as error:
                    yield [failed(batch.candidates[0].row, error, stopped=True)]
                    return
                waking.granted(batch.generation, soon=ended and not pending)
                yield answers
        if last is not None:
            yield [last]

    # --- A batch, from its rows to its answers

    def _begin(self, actor: Actor, candidates: Sequence[Candidate], makers: Makers) -> _Batch:
        external_ids = [row.external_id for row in candidates if row.wanted is not None and row.external_id is not None]
        known: dict[str, KnownDevice] = {}
        if external_ids:
            with self._database.snapshot() as tx:
                known = bulk.find_known(tx, actor.tenant_id, external_ids)
        batch = _Batch(candidates, {}, [], [])
        tasks: list[Task] = []
        for candidate in candidates:
            try:
                if candidate.wanted is None:
                    raise candidate.problem or PortalError("The row could not be read.")
                found = known.get(candidate.external_id or "")
                if found is None:
                    tasks.append(self._new(candidate, candidate.wanted))
                else:
                    self._check_same(candidate.wanted, found)
                    answer = self._repeated(candidate, candidate.wanted, found)
                    if isinstance(answer, Task):
                        tasks.append(answer)
                    else:
                        batch.answers[candidate.row] = answer
                        batch.generation = max(batch.generation, found.device.generation if answer.certificate else 0)
            except PortalError as error:
                batch.answers[candidate.row] = failed(candidate.row, error, external_id=candidate.external_id)
        batch.tasks = tasks
        if tasks:
            batch.results = makers.make([task.job for task in tasks], few=len(tasks) <= FEW)
        return batch

    def _new(self, candidate: Candidate, wanted: Registration) -> Task:
        now = self._clock()
        device_id = new_device_id(now)
        topics = self._onboarding.check_topics(wanted.topics, device_id)
        return Task(candidate, wanted, Job(device_id, _credentials(wanted), topics, now), None)

    def _check_same(self, wanted: Registration, known: KnownDevice) -> None:
        """Raise unless the row says of the device what is known of it: else it may well be meant for another."""
        device = known.device
        if device.status is DeviceStatus.REVOKED:
            raise StateConflict(
                f"The external_id is that of device {device.id}, which is revoked; give the row another external_id."
            )
        topics = self._onboarding.check_topics(wanted.topics, device.id)
        same = {
            name: getattr(wanted, name) == getattr(device, name) for name in ("name", "type", "location", "firmware")
        }
        same["metadata"] = dict(wanted.metadata) == device.metadata
        same["topics"] = known.topics == (
            None if topics is None else tuple((topic.filter, topic.access) for topic in topics)
        )
        other = [name for name, is_same in same.items() if not is_same]
        if other:
            raise ExternalIdTaken(
                f"The external_id is that of device {device.id}, whose {' and '.join(other)} is another; change the"
                " device with PATCH, or give the row another external_id."
            )

    def _repeated(self, candidate: Candidate, wanted: Registration, known: KnownDevice) -> Task | RowDone:
        """What a row gets whose device was there already."""
        device = known.device
        answer = RowDone(
            row=candidate.row,
            device_id=device.id,
            fingerprint=known.fingerprint,
            serial_number=known.serial_number,
            expires_at=known.not_after,
            external_id=candidate.external_id,
            repeated=True,
        )
        if wanted.csr is not None:
            return self._same_certificate(wanted.csr, known, answer)
        if not known.waits or device.status is not DeviceStatus.ACTIVE:
            return answer
        topics = self._onboarding.check_topics(known.topics, device.id)
        return Task(candidate, wanted, Job(device.id, _credentials(wanted), topics, self._clock()), known)

    def _same_certificate(self, csr: str, known: KnownDevice, answer: RowDone) -> RowDone:
        if known.der is None:
            return answer
        if not is_for_key_of(known.der, csr):
            raise ExternalIdTaken(
                f"The external_id is that of device {answer.device_id}, which has a certificate for another key; renew"
                " it with this csr, or give the row another external_id."
            )
        issuer = next(recorded for recorded in self._authority.issuers if recorded.id == known.issuer_id)
        pem = ssl.DER_cert_to_PEM_cert(known.der)
        return dataclasses.replace(answer, certificate=pem, chain=issuer.chain_pem(pem))

    def _finish(self, actor: Actor, batch: _Batch, makers: Makers, attempts: int) -> Sequence[Answer]:
        results = [result for piece in batch.results for result in piece.result()]
        made: list[tuple[Task, Credentials]] = []
        for task, result in zip(batch.tasks, results, strict=True):
            row = task.candidate
            if isinstance(result, PortalError):
                batch.answers[row.row] = failed(row.row, result, external_id=row.external_id)
            else:
                made.append((task, result))
        again = self._record(actor, batch, made) if made else ()
        if again and attempts > 1:
            rest = self._begin(actor, again, makers)
            for answer in self._finish(actor, rest, makers, attempts - 1):
                batch.answers[answer.row] = answer
            batch.generation = max(batch.generation, rest.generation)
        for row in again:
            if row.row not in batch.answers:
                error = LockUnavailable("Others are at work on a device with this external_id; send the row again.")
                batch.answers[row.row] = failed(row.row, error, external_id=row.external_id)
        self._wait_for_certificates(batch)
        return [batch.answers[row.row] for row in batch.candidates]

    def _wait_for_certificates(self, batch: _Batch) -> None:
        """Let certificates, which open a door at once, out only when the broker knows their devices."""
        answers = [answer for answer in batch.answers.values() if isinstance(answer, RowDone) and answer.certificate]
        if not answers:
            return
        try:
            self._onboarding.wait_until_granted(batch.generation)
        except Unavailable as error:
            for answer in answers:
                batch.answers[answer.row] = failed(answer.row, error, external_id=answer.external_id)

    # --- Into the database

    def _record(self, actor: Actor, batch: _Batch, made: Sequence[tuple[Task, Credentials]]) -> Sequence[Candidate]:
        """Record what was made, and answer it; returns the rows that others were faster with."""
        try:
            with self._database.transaction() as tx:
                again, done, generation = write_batch(
                    tx, actor, made, style=self._settings.acl_style, now=self._clock()
                )
                failpoint("bulk.before_commit")
        except IntegrityError:  # somebody else has just registered one of the external ids
            return [task.candidate for task, _ in made]
        failpoint("bulk.after_commit")
        batch.generation = max(batch.generation, generation)
        for with_csr in (False, True):
            new = [task for task, _ in done if task.known is None and (task.wanted.csr is not None) is with_csr]
            metrics.registered(with_csr=with_csr, devices=len(new))
        for task, credentials in done:
            batch.answers[task.candidate.row] = RowDone(
                row=task.candidate.row,
                device_id=task.job.device_id,
                fingerprint=credentials.fingerprint,
                serial_number=credentials.serial_number,
                expires_at=credentials.not_after,
                external_id=task.candidate.external_id,
                repeated=task.known is not None,
                download_url=credentials.download_url,
                download_expires_at=credentials.download_expires_at,
                bundle_password=credentials.bundle_password,
                certificate=credentials.certificate,
                chain=credentials.chain,
            )
        return again


class _Waking:
    """Calls for broker passes while an upload goes on, not too often."""

    def __init__(self, enforcement: Enforcement) -> None:
        self._enforcement = enforcement
        self._called = time.monotonic()
        self._wanted = False

    def granted(self, generation: int, *, soon: bool) -> None:
        self._wanted |= generation > 0
        now = time.monotonic()
        if self._wanted and (soon or now - self._called >= GRANT_SECONDS):
            self._enforcement.wake()
            self._called, self._wanted = now, False


def _apart(candidates: Sequence[Candidate]) -> Iterator[Sequence[Candidate]]:
    """Cut before a row whose external id stands before it, so that the first is there when the second comes."""
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


def _count(answers: Sequence[Answer]) -> None:
    failures = sum(isinstance(answer, RowFailed) for answer in answers)
    repeated = sum(isinstance(answer, RowDone) and answer.repeated for answer in answers)
    metrics.bulk_rows(registered=len(answers) - failures - repeated, repeated=repeated, refused=failures)


def _credentials(wanted: Registration) -> Wanted:
    return Wanted(wanted.csr, wanted.key_type, wanted.validity_days, wanted.bundle_password, wanted.bundle_format)
