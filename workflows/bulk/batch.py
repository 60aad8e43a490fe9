"""Bulk registration: a batch of rows from request to answer, written in one transaction."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import db
from config import Settings
from core import metrics
from core.errors import (
    ExternalIdTaken,
    FieldProblem,
    InputInvalid,
    LockUnavailable,
    PortalError,
    ProfileRefused,
    Unavailable,
)
from core.failpoints import failpoint
from core.states import DeviceStatus
from pki.csr import Csr
from store import bulk, keys, names
from store.audit import Actor
from store.bulk import KnownDevice
from store.certificates import CertificateRecord
from store.database import Database
from store.groups import GroupRecord
from store.keys import KeyClaim
from store.names import NameClaim
from store.profiles import hold_profile
from store.quotas import quota_reached, room_for_clients
from workflows import memberships
from workflows.admission import (
    Admission,
    Issuance,
    admit,
    broker_must_learn,
    checked_topics,
    key_claim,
    name_claim,
    record_issuances,
)
from workflows.authority.issuers import Authority
from workflows.bulk.known import Known, check_same, find_known
from workflows.bulk.processes import CredentialJob, CredentialProcesses, Issuing
from workflows.credentials import CredentialAnswer, DeviceRequest, IssuedCredentials
from workflows.events import EventType
from workflows.memberships import groups_of_new, life_among, topics_of_new, with_life
from workflows.profiles import terms_of
from workflows.reconciliation import Reconciler
from workflows.tenants import TenantDirectory, TenantRates, TenantTerms, too_many_registrations

ATTEMPTS = 3  # at a row whose external id another request is registering, too


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that asks for a device, or what is wrong with it; ``external_id`` as far as it could be read."""

    row: int
    request: DeviceRequest | None
    problem: PortalError | None = None
    external_id: str | None = None


def _requests(candidates: Sequence[Candidate]) -> Sequence[DeviceRequest]:
    return [candidate.request for candidate in candidates if candidate.request is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDone(CredentialAnswer):
    """A device is registered, durably, now or by an earlier row; link and password if there are new ones."""

    row: int
    external_id: str | None = None
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class RowFailed:
    """A row was refused; ``stopped``: no row after it was looked at, and there are no answers for them."""

    row: int
    code: str
    detail: str
    errors: Sequence[FieldProblem] = ()
    external_id: str | None = None
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class RowChecked:
    """A row of a dry run would be registered; ``repeated``: its device is there already."""

    row: int
    external_id: str | None = None
    repeated: bool = False


RowAnswer = RowDone | RowFailed


def failed(row: int, error: PortalError, *, external_id: str | None = None, stopped: bool = False) -> RowFailed:
    """Return the answer to a row that fails for ``error``."""
    problems = error.errors if isinstance(error, InputInvalid) else ()
    return RowFailed(row, error.code, error.detail, problems, external_id, stopped)


@dataclass(frozen=True, slots=True)
class _Task:
    """A row that needs credentials: for a new device, or for one that is ``known`` and has not fetched its own.

    A new one is put into ``groups``; ``topics_group_id`` is the one that its topics are those of.
    """

    candidate: Candidate
    job: CredentialJob
    known: KnownDevice | None
    groups: Sequence[GroupRecord] = ()
    topics_group_id: str | None = None


@dataclass(frozen=True, slots=True)
class _Claims:
    """What a row that is only checked would have for its device alone."""

    device_id: str
    key: KeyClaim | None
    names: NameClaim | None

    @classmethod
    def of(cls, job: CredentialJob, own_names: tuple[str, ...]) -> Self:
        csr, device_id = job.request.csr, job.device_id
        key = None if csr is None else KeyClaim(csr.key_fingerprint, device_id)
        return cls(device_id, key, NameClaim(device_id, own_names) if own_names else None)


_Issued = tuple[_Task, IssuedCredentials]


@dataclass(frozen=True, slots=True)
class _Written:
    """What a transaction has made of rows.

    ``again`` are those of which something has changed meanwhile, so that nothing was written of them; ``generation`` is
    what the broker must reach, 0 if it need not learn of it.
    """

    again: Sequence[Candidate]
    refused: Sequence[tuple[Candidate, PortalError]]
    done: Sequence[_Issued]
    generation: int


@dataclass(slots=True)
class Batch:
    """Rows under way, with the answers that are known already.

    ``generation`` is what the broker must have reached before a certificate of the batch is released.
    """

    candidates: Sequence[Candidate]
    answers: dict[int, RowAnswer]
    tasks: Sequence[_Task]
    issuing: Issuing
    generation: int = 0


@dataclass(eq=False, repr=False)
class Batches:
    """Registers batches of rows: ``begin`` has the credentials made, ``finish`` writes and answers."""

    _settings: Settings
    _database: Database
    _tenants: TenantDirectory
    _authority: Authority
    _reconciler: Reconciler
    _processes: CredentialProcesses
    _rates: TenantRates
    _clock: Callable[[], datetime]

    # --- Before the transaction

    def check(self, actor: Actor, candidates: Sequence[Candidate]) -> Sequence[RowChecked | RowFailed]:
        """Return what would become of the rows, by the same rules; makes and writes nothing."""
        known = find_known(self._database, self._tenants.of(actor.tenant_id), actor, _requests(candidates))
        answers: list[RowChecked | RowFailed] = []
        claims: dict[int, _Claims] = {}
        for position, candidate in enumerate(candidates):
            row, external_id = candidate.row, candidate.external_id
            found = known.devices.get(external_id or "")
            try:
                begun = self._begin_row(candidate, known)
                if isinstance(begun, _Task):
                    claims[position] = _Claims.of(begun.job, self._processes.check(begun.job))
            except PortalError as error:
                answers.append(failed(row, error, external_id=external_id))
            else:
                answers.append(RowChecked(row, external_id, repeated=found is not None))
        return self._without_taken(actor.tenant_id, candidates, answers, claims)

    def _without_taken(
        self,
        tenant_id: str,
        candidates: Sequence[Candidate],
        answers: list[RowChecked | RowFailed],
        claims: Mapping[int, _Claims],
    ) -> Sequence[RowChecked | RowFailed]:
        """Return the answers to checked rows, with refusals of those that claim another device's key or names."""
        of_keys = [claim.key for claim in claims.values() if claim.key is not None]
        of_names = [claim.names for claim in claims.values() if claim.names is not None]
        if not (of_keys or of_names):
            return answers
        with self._database.snapshot() as tx:
            refused: dict[str, PortalError] = keys.refusals(tx, tenant_id, of_keys)
            refused |= names.refusals(tx, tenant_id, of_names, now=self._clock())
        for position, claim in claims.items():
            if claim.device_id in refused:
                row = candidates[position]
                answers[position] = failed(row.row, refused[claim.device_id], external_id=row.external_id)
        return answers

    def begin(self, actor: Actor, candidates: Sequence[Candidate]) -> Batch:
        """Look up which rows' devices are there already, and begin to make the credentials of the others."""
        known = find_known(self._database, self._tenants.of(actor.tenant_id), actor, _requests(candidates))
        batch = Batch(candidates, {}, [], Issuing())
        tasks: list[_Task] = []
        for candidate in candidates:
            found = known.devices.get(candidate.external_id or "")
            try:
                answer = self._begin_row(candidate, known)
            except PortalError as error:
                answer = failed(candidate.row, error, external_id=candidate.external_id)
            if isinstance(answer, _Task):
                tasks.append(answer)
                continue
            batch.answers[candidate.row] = answer
            if found is not None and isinstance(answer, RowDone) and answer.certificate:
                batch.generation = max(batch.generation, found.device.generation)
        batch.tasks = self._within_rate(known.tenant, batch, tasks)
        if batch.tasks:
            batch.issuing = self._processes.issue([task.job for task in batch.tasks])
        return batch

    def _within_rate(self, tenant: TenantTerms, batch: Batch, tasks: Sequence[_Task]) -> Sequence[_Task]:
        """Return the tasks without those for which there are no more registrations in this minute; answer these."""
        new = [task for task in tasks if task.known is None]
        taken = self._rates.take_registrations(tenant, len(new))
        for task in new[taken.number :]:
            row, error = task.candidate, too_many_registrations(tenant, taken.wait)
            batch.answers[row.row] = failed(row.row, error, external_id=row.external_id)
        return [task for task in tasks if task.candidate.row not in batch.answers]

    def _begin_row(self, candidate: Candidate, known: Known) -> _Task | RowAnswer:
        request, device = candidate.request, known.devices.get(candidate.external_id or "")
        known.tenant.check_served()  # it may have been suspended since the upload began
        if request is None:
            raise candidate.problem or PortalError("The row could not be read.")
        if device is not None:
            check_same(self._settings, known, request, device)
            return self._repeated(candidate, request, device, known)
        now = self._clock()
        device_id = db.new_device_id(now)
        of_device = groups_of_new(known.actor, request.groups, known.groups)
        own = checked_topics(self._settings, known.tenant, request.topics, device_id)
        topics, group_id = topics_of_new(own, of_device)
        terms = terms_of(known.profiles, request.profile, device_id, request)
        request = with_life(request, life_among(of_device), terms)
        job = CredentialJob(known.tenant, device_id, request, topics, now, terms)
        return _Task(candidate, job, None, of_device, group_id)

    def _repeated(
        self, candidate: Candidate, request: DeviceRequest, found: KnownDevice, known: Known
    ) -> _Task | RowDone:
        """Return what a row gets whose device was there already."""
        device, certificate = found.device, found.certificate
        answer = RowDone(
            row=candidate.row,
            device_id=device.id,
            fingerprint=certificate.fingerprint if certificate else "",
            serial_number=certificate.serial_number if certificate else "",
            expires_at=certificate.not_after if certificate else None,
            external_id=candidate.external_id,
            repeated=True,
        )
        if request.csr is not None:
            return answer if certificate is None else self._same_certificate(request.csr, certificate, answer)
        if not found.waits or device.status is not DeviceStatus.ACTIVE:
            return answer
        topics = checked_topics(self._settings, known.tenant, found.topics, device.id)
        terms = terms_of(known.profiles, request.profile, device.id, request)
        request = with_life(request, life_among(known.groups_of.get(device.id, ())), terms)
        job = CredentialJob(known.tenant, device.id, request, topics, self._clock(), terms)
        return _Task(candidate, job, found)

    def _same_certificate(self, csr: Csr, certificate: CertificateRecord, answer: RowDone) -> RowDone:
        if not csr.is_for_key_of(certificate.der):
            raise ExternalIdTaken(
                f"The external_id is that of device {answer.device_id}, which has a certificate for another key; renew"
                " it with this csr, or give the row another external_id."
            )
        issuer = self._authority.current.by_id[certificate.issuer_id]
        pem = ssl.DER_cert_to_PEM_cert(certificate.der)
        return dataclasses.replace(answer, certificate=pem, chain=issuer.chain_pem(pem))

    # --- The transaction, and the answers

    def finish(self, actor: Actor, batch: Batch, attempts: int = ATTEMPTS) -> Sequence[RowAnswer]:
        """Write what was made, and return the answers in the rows' order, once they are durable.

        Raises ``Unavailable`` where nothing of the batch was registered.
        """
        results = self._processes.results(batch.issuing)
        issued: list[_Issued] = []
        for task, result in zip(batch.tasks, results, strict=True):
            row = task.candidate
            if isinstance(result, PortalError):
                batch.answers[row.row] = failed(row.row, result, external_id=row.external_id)
            else:
                issued.append((task, result))
        again = self._record(actor, batch, issued) if issued else ()
        if again and attempts > 1:
            rest = self.begin(actor, again)
            for answer in self.finish(actor, rest, attempts - 1):
                batch.answers[answer.row] = answer
            batch.generation = max(batch.generation, rest.generation)
        for row in again:
            if row.row not in batch.answers:
                error = LockUnavailable("Another request is registering this external_id; send the row again.")
                batch.answers[row.row] = failed(row.row, error, external_id=row.external_id)
        self._wait_for_certificates(batch)
        return [batch.answers[row.row] for row in batch.candidates]

    def _wait_for_certificates(self, batch: Batch) -> None:
        """Release certificates, which can be used at once, only when the broker knows their devices."""
        answers = [answer for answer in batch.answers.values() if isinstance(answer, RowDone) and answer.certificate]
        if not answers:
            return
        try:
            self._reconciler.wait_until_granted(batch.generation)
        except Unavailable as error:
            for answer in answers:
                batch.answers[answer.row] = failed(answer.row, error, external_id=answer.external_id)

    def _record(self, actor: Actor, batch: Batch, issued: Sequence[_Issued]) -> Sequence[Candidate]:
        """Write credentials, and add the answers; returns the rows whose external id was registered meanwhile."""
        try:
            with self._database.transaction() as tx:
                written = self._write(tx, actor, issued, self._clock())
                failpoint("bulk.before_commit")
        except IntegrityError:  # another request has just registered one of the external ids
            return [task.candidate for task, _ in issued]
        failpoint("bulk.after_commit")
        batch.generation = max(batch.generation, written.generation)
        for candidate, error in written.refused:
            batch.answers[candidate.row] = failed(candidate.row, error, external_id=candidate.external_id)
        for task, credentials in written.done:
            row = task.candidate
            if task.known is None:
                metrics.counts.registrations.labels("device" if credentials.bundle is None else "portal").inc()
            batch.answers[row.row] = RowDone.of(
                credentials, row=row.row, external_id=row.external_id, repeated=task.known is not None
            )
        return written.again

    def _write(self, tx: Connection, actor: Actor, issued: Sequence[_Issued], now: datetime) -> _Written:
        """Admit the new devices, and give the known ones new credentials in place of those nobody has fetched.

        A row whose key, name or profile is refused does not keep the others from being written.
        """
        tenant_id, style = actor.tenant_id, self._settings.granting_style
        changes = [task.known is not None or broker_must_learn(task.job.topics, style) for task, _ in issued]
        new_ids = [task.candidate.external_id for task, _ in issued if task.known is None]
        taken = bulk.find_known(tx, tenant_id, [external_id for external_id in new_ids if external_id is not None])
        members = {task.job.device_id: task.groups for task, _ in issued if task.groups}
        of_groups = memberships.refusals(tx, tenant_id, members)
        # Before the locks of the refusals, as in an admission: else the two could wait for each other.
        generation = db.next_generation(tx, at=now) if any(changes) else 0
        refusals, superseded = of_groups | _refusals(tx, tenant_id, issued, now), set[str]()
        replaced = [task.known for task, _ in issued if task.known is not None and task.job.device_id not in refusals]
        if replaced:
            superseded = bulk.supersede_unfetched(tx, tenant_id, replaced, at=now, generation=generation)
        admissions: list[Admission] = []
        reissues: list[Issuance] = []
        again, refused, done = list[Candidate](), list[tuple[Candidate, PortalError]](), list[_Issued]()
        for task, credentials in issued:
            if task.job.device_id in refusals and task.candidate.external_id not in taken:
                refused.append((task.candidate, refusals[task.job.device_id]))
                continue
            if task.known is None and task.candidate.external_id not in taken:
                admissions.append(_admission(actor, task, credentials))
            elif task.known is not None and task.job.device_id in superseded:
                reissues.append(_reissue(actor, task, task.known, credentials))
            else:
                again.append(task.candidate)
                continue
            done.append((task, credentials))
        most = issued[0][0].job.tenant.quotas.devices
        if admissions and most is not None:
            admissions, surplus = _within(admissions, room_for_clients(tx, tenant_id, most))
            refused += [(task.candidate, quota_reached(most)) for task, _ in done if task.job.device_id in surplus]
            done = [(task, credentials) for task, credentials in done if task.job.device_id not in surplus]
        if admissions:
            admitted = admit(tx, admissions, style=style, most=most, now=now, advanced_to=generation)
            generation = max(generation, admitted.generation)
        if reissues:
            record_issuances(tx, reissues, now=now)
        return _Written(again, refused, done, generation)


def _within(admissions: list[Admission], room: int) -> tuple[list[Admission], set[str]]:
    """Return the admissions that a quota has room for, and the devices of the others."""
    return admissions[:room], {admission.credentials.device_id for admission in admissions[room:]}


def _refusals(tx: Connection, tenant_id: str, issued: Sequence[_Issued], now: datetime) -> dict[str, PortalError]:
    """Return why credentials cannot be recorded, by the ids of their devices."""
    refused: dict[str, PortalError] = {}
    # First, as in an admission: whoever removes a profile locks it before the audit head.
    for profile in {task.job.request.profile for task, _ in issued}:
        try:
            hold_profile(tx, tenant_id, profile)
        except ProfileRefused as error:  # it was removed meanwhile
            refused |= {task.job.device_id: error for task, _ in issued if task.job.request.profile == profile}
    if with_csr := [key_claim(credentials) for _, credentials in issued if credentials.is_for_csr]:
        keys.lock(tx, tenant_id)
        refused |= keys.refusals(tx, tenant_id, with_csr)
    if with_names := [name_claim(credentials) for _, credentials in issued if credentials.names]:
        names.lock(tx, tenant_id)
        refused |= names.refusals(tx, tenant_id, with_names, now=now)
    return refused


def _admission(actor: Actor, task: _Task, credentials: IssuedCredentials) -> Admission:
    return Admission(
        actor=actor,
        credentials=credentials,
        name=task.job.request.name,
        event=EventType.REGISTERED,
        action="device:register",
        detail={"key": "csr" if credentials.bundle is None else "made here", "row": task.candidate.row},
        request=task.job.request,
        topics=task.job.topics,
        groups=task.groups,
        topics_group_id=task.topics_group_id,
    )


def _reissue(actor: Actor, task: _Task, known: KnownDevice, credentials: IssuedCredentials) -> Issuance:
    superseded = None if known.certificate is None else known.certificate.serial_number
    return Issuance(
        actor=actor,
        credentials=credentials,
        name=known.device.name,
        event=EventType.RENEWED,
        action="device:reissue",
        detail={"key": "made here", "row": task.candidate.row, "superseded": superseded},
    )
