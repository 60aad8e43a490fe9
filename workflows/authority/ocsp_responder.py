"""Answers OCSP requests from what the database says at that moment."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from config import Settings
from core import metrics
from core.errors import RequestMalformed, Unavailable
from core.states import IssuerKind
from pki import ocsp
from pki.issuers import Reason
from pki.ocsp import GOOD, UNKNOWN, CertStatus, Failure, IssuerId, Request, Signer, Status
from store import certificates as store_certificates
from store.certificates import RevocationState
from store.database import Database
from workflows.authority.issuers import Authority, RecordedIssuer
from workflows.authority.ocsp_certificates import ResponderCertificates

KEPT_ANSWERS = 5000  # some 2 KB each, in each worker process
KEPT_REQUEST_BYTES = 512


@dataclass(frozen=True, slots=True)
class Answer:
    """An OCSPResponse in DER; the times are ``None`` where it is a failure, which is not signed.

    ``for_anyone`` says that whoever asks the same may be given it: it holds no nonce, and nothing unknown.
    """

    der: bytes
    this_update: datetime | None = None
    next_update: datetime | None = None
    for_anyone: bool = False


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer with all that it was made from; it is good for as long as nothing of that has changed."""

    issuers: tuple[RecordedIssuer, ...]
    recorded: RecordedIssuer
    request: Request
    signer: Signer
    statuses: tuple[Status, ...]
    answer: Answer
    since: datetime
    until: datetime

    def holds(self, signer: Signer, statuses: tuple[Status, ...], now: datetime) -> bool:
        """Whether it would be signed again with nothing in it but another time."""
        return signer is self.signer and statuses == self.statuses and self.since <= now < self.until


class Responder:
    """Answers for every CA whose responder certificate is here, as RFC 6960 has it in the profile of RFC 5019.

    An answer that is kept saves a signature, never a look at the database: what a certificate's row says is read for
    each request, so that a revocation shows in every process with the first request after its commit.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        certificates: ResponderCertificates,
        clock: Callable[[], datetime],
    ) -> None:
        self.certificates = certificates
        self._life = timedelta(hours=settings.ocsp_hours)
        self._database = database
        self._authority = authority
        self._clock = clock
        self._kept = KeptAnswers(KEPT_ANSWERS)
        self._directory: tuple[tuple[RecordedIssuer, ...], dict[IssuerId, RecordedIssuer]] = ((), {})

    def answer(self, der: bytes) -> Answer:
        """Answer an OCSPRequest; whatever is wrong with it, there is an answer that says so.

        All certificates in a request are answered by the responder of the first one's CA that is known here; one of
        another CA is unknown to that responder.
        """
        try:
            return self._answer(der)
        except RequestMalformed:
            return self.fail(Failure.MALFORMED_REQUEST)
        except Unavailable:
            return self.fail(Failure.TRY_LATER)

    @staticmethod
    def fail(reason: Failure) -> Answer:
        """Say why there is no answer."""
        metrics.ocsp_answered(reason.name.lower(), kept=False)
        return Answer(ocsp.failure(reason))

    def _answer(self, der: bytes) -> Answer:
        now = self._clock()
        issuers = self._authority.issuers
        kept = self._kept.get(der)
        if kept is not None and kept.issuers is issuers:
            request, recorded = kept.request, kept.recorded
        else:
            kept, request = None, ocsp.read_request(der)
            known = self._known(issuers)
            answering = [known[question.issuer] for question in request.questions if question.issuer in known]
            if not answering:
                return self.fail(Failure.UNAUTHORIZED)
            recorded = answering[0]
        signer = self.certificates.signer(recorded.issuer)
        if signer is None:
            # The root's key is away as a rule; where that of an issuing CA is here, the jobs make one within a minute.
            soon = recorded.kind == IssuerKind.ISSUING and recorded.issuer.key is not None
            return self.fail(Failure.TRY_LATER if soon else Failure.UNAUTHORIZED)
        statuses = self._statuses(recorded, request, issuers)
        if kept is not None and kept.holds(signer, statuses, now):
            answer = kept.answer
        else:
            kept = None
            next_update = min(now + self._life, signer.not_after)
            content = ocsp.sign_response(
                signer,
                list(zip(request.questions, statuses, strict=True)),
                nonce=request.nonce,
                now=now,
                next_update=next_update,
            )
            for_anyone = request.nonce is None and UNKNOWN not in statuses
            answer = Answer(content, now, next_update, for_anyone)
            if for_anyone and len(der) <= KEPT_REQUEST_BYTES:
                until = now + (next_update - now) / 2
                self._kept.put(der, _Kept(issuers, recorded, request, signer, statuses, answer, now, until))
        for status in statuses:
            metrics.ocsp_answered(status.cert_status, kept=kept is not None)
        return answer

    def _known(self, issuers: tuple[RecordedIssuer, ...]) -> dict[IssuerId, RecordedIssuer]:
        """The CAs by the names that requests may have for them, made again when there are others."""
        seen, known = self._directory
        if seen is not issuers:
            known = {name: recorded for recorded in issuers for name in ocsp.issuer_ids(recorded.issuer)}
            self._directory = issuers, known
        return known

    def _statuses(
        self, recorded: RecordedIssuer, request: Request, issuers: tuple[RecordedIssuer, ...]
    ) -> tuple[Status, ...]:
        known = self._known(issuers)
        asked = [question for question in request.questions if known.get(question.issuer) is recorded]
        with self._database.snapshot() as tx:
            found = store_certificates.revocation_states(
                tx, recorded.id, [question.serial_number for question in asked]
            )
        cas = _serial_numbers_of_cas(recorded, issuers) if recorded.kind == IssuerKind.ROOT else frozenset()
        return tuple(
            _status(found.get(question.serial_number), is_ca=question.serial_number in cas)
            if known.get(question.issuer) is recorded
            else UNKNOWN
            for question in request.questions
        )


def _serial_numbers_of_cas(recorded: RecordedIssuer, issuers: tuple[RecordedIssuer, ...]) -> frozenset[str]:
    """What the root has issued stands with the issuers, not with the certificates."""
    name = recorded.issuer.certificate.subject
    certificates = (other.issuer.certificate for other in issuers)
    return frozenset(f"{each.serial_number:x}" for each in certificates if each.issuer == name)


def _status(found: RevocationState | None, *, is_ca: bool) -> Status:
    if found is None:
        return GOOD if is_ca else UNKNOWN
    if found.revoked_at is None:
        return GOOD
    return Status(CertStatus.REVOKED, found.revoked_at, Reason(found.reason or Reason.UNSPECIFIED))


class KeptAnswers:
    """The answers used last, by the bytes of their requests."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, _Kept] = OrderedDict()

    def get(self, request: bytes) -> _Kept | None:
        """What is kept for a request."""
        with self._lock:
            kept = self._answers.get(request)
            if kept is not None:
                self._answers.move_to_end(request)
            return kept

    def put(self, request: bytes, kept: _Kept) -> None:
        """Keep an answer; the one that was not used for longest makes room."""
        with self._lock:
            self._answers[request] = kept
            self._answers.move_to_end(request)
            if len(self._answers) > self._most:
                self._answers.popitem(last=False)
