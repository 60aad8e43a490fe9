"""Answers OCSP requests from what the database says at that moment, and renews the certificates that sign answers."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

import ca
import db
from config import Settings
from core import metrics
from core.errors import IssuerUnusable, PortalError, RequestMalformed, TokenUnavailable, Unavailable
from core.files import FileLock, replace_file
from core.states import IssuerKind
from pki import ocsp
from pki.algorithms import KeyType, private_key_pem
from pki.issuers import CLOCK_SKEW, Issuer, Reason
from pki.ocsp import GOOD, UNKNOWN, CertStatus, Failure, IssuerId, Request, Signer, Status
from store import audit
from store import certificates as store_certificates
from store.certificates import RevocationState
from store.database import Database
from workflows.authority.issuers import Authority, RecordedIssuer

log = logging.getLogger("portal.responder")

MAX_ANSWERS = 5000  # some 2 KB each, in each worker process
MAX_REQUEST_BYTES = 512  # of a request whose answer is kept
# Nobody checks whether a responder's certificate is revoked, so that its life is short. It is renewed at two thirds of
# that; what is left then is longer than the longest life of an answer (PORTAL_OCSP_HOURS).
RESPONDER_DAYS = 14
LOCK_SECONDS = 5.0  # that a request waits for another one's responder certificate
AGAIN_SECONDS = 60.0  # after a CA could not sign one


@dataclass(frozen=True, slots=True)
class OcspAnswer:
    """An OCSPResponse in DER; the times are ``None`` for a failure, which is not signed.

    ``made_at`` is later than its thisUpdate, which leaves room for slow clocks.

    ``for_anyone``: another client that asks the same may be given it, since it holds no nonce and nothing unknown.
    """

    der: bytes
    made_at: datetime | None = None
    next_update: datetime | None = None
    for_anyone: bool = False


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer with everything it was made from; it may be used as long as nothing of that has changed."""

    issuers: tuple[RecordedIssuer, ...]
    recorded: RecordedIssuer
    request: Request
    signer: Signer
    statuses: tuple[Status, ...]
    answer: OcspAnswer
    since: datetime
    until: datetime

    def holds(self, signer: Signer, statuses: tuple[Status, ...], now: datetime) -> bool:
        """Return whether a new answer would differ in its times only."""
        return signer is self.signer and statuses == self.statuses and self.since <= now < self.until


@dataclass(frozen=True, slots=True)
class _Directory:
    """The issuers, those by the names that requests may have for them, and serial numbers of CAs by their issuer."""

    issuers: tuple[RecordedIssuer, ...]
    known: dict[IssuerId, RecordedIssuer]
    cas: Mapping[x509.Name, Set[str]]


@dataclass(eq=False, repr=False)
class ResponderCertificates:
    """The certificates with which the portal signs OCSP answers, one for each CA.

    Each is a file ``<name of the CA>.pem``, 0600, of a key in the clear with its certificate, replaced as one. Those of
    the first tenant are renewed in time by a job, those of others when somebody asks: there may be a thousand CAs.
    """

    _settings: Settings
    _database: Database
    _authority: Authority
    _clock: Callable[[], datetime]
    _first_tenant: str
    # What was read last of each file, by inode, time and size: another process may have renewed it.
    _read: dict[str, tuple[tuple[int, int, int], Signer | None]] = field(init=False, default_factory=dict)
    _failed: dict[str, float] = field(init=False, default_factory=dict)  # when, by the monotonic clock

    def path(self, issuer_name: str) -> Path:
        """Return the file of key and certificate for a CA."""
        return self._settings.ocsp_dir / f"{issuer_name}.pem"

    def signer(self, recorded: RecordedIssuer) -> Signer | None:
        """Return what signs answers for a CA now, ``None`` if nothing can; a changed file is read again.

        Raises ``TokenUnavailable`` or ``LockUnavailable`` if that of a tenant's CA cannot be issued now.
        """
        now = self._clock()
        if recorded.tenant_id != self._first_tenant:
            self._renew_on_demand(recorded, now)
        signer = self._current(recorded.issuer)
        return signer if signer is not None and signer.not_before <= now < signer.not_after else None

    def renew(self) -> list[str]:
        """Renew what is missing, unusable, or past two thirds of its life, of the first tenant; return the CAs' names.

        A CA whose key is not here, or that is out of date, is skipped. One that fails does not stop the others.
        """
        now = self._clock()
        renewed = []
        for recorded in self._authority.current.of_tenant(self._first_tenant):
            if not self._is_due(recorded, now):
                continue
            try:
                # The root's key comes and goes while the portal runs.
                able = self._authority.with_root_key(recorded) if recorded.kind == IssuerKind.ROOT else recorded
                if able is None or able.issuer.key is None:
                    continue
                self._issue(able, now)
            except TokenUnavailable as error:  # logged where it is noticed; the root's is kept elsewhere
                log.debug("an OCSP responder is not renewed", extra={"problem": error.detail})
            except PortalError as error:
                log.error("an OCSP responder is not renewed", extra={"problem": error.detail})
            else:
                log.info("issued", extra={"what": f"OCSP responder of {recorded.issuer.name}"})
                renewed.append(recorded.issuer.name)
        return renewed

    def _renew_on_demand(self, recorded: RecordedIssuer, now: datetime) -> None:
        """Issue the certificate of a tenant's CA if it is due, once whoever asks."""
        failed_at = self._failed.get(recorded.issuer.name, -math.inf)
        if (
            recorded.issuer.key is None
            or time.monotonic() - failed_at < AGAIN_SECONDS
            or not self._is_due(recorded, now)
        ):
            return
        with FileLock(self._settings.data_dir / ".responders.lock").hold(LOCK_SECONDS):
            if not self._is_due(recorded, now):
                return
            try:
                self._issue(recorded, now)
            except IssuerUnusable as error:
                self._failed[recorded.issuer.name] = time.monotonic()
                log.error("an OCSP responder is not renewed", extra={"problem": error.detail})
            else:
                log.info("issued", extra={"what": f"OCSP responder of {recorded.issuer.name}"})

    def _is_due(self, recorded: RecordedIssuer, now: datetime) -> bool:
        if not recorded.issuer.not_before <= now < recorded.issuer.not_after:
            return False
        signer = self._current(recorded.issuer)
        if signer is None:
            return True
        renewed_at = signer.not_before + (signer.not_after - signer.not_before) * 2 / 3
        return not signer.not_before <= now < renewed_at

    def _current(self, issuer: Issuer) -> Signer | None:
        path = self.path(issuer.name)
        try:
            status = path.stat()
            seen = status.st_ino, status.st_mtime_ns, status.st_size
            known = self._read.get(issuer.name)
            if known is not None and known[0] == seen:
                return known[1]
            content = path.read_bytes()
        except OSError:
            return None
        signer = None
        try:
            signer = ocsp.open_signer(content, issuer)
        except IssuerUnusable as error:
            log.error("an OCSP responder's file is unusable", extra={"problem": error.detail, "path": str(path)})
        self._read[issuer.name] = seen, signer
        return signer

    def _issue(self, recorded: RecordedIssuer, now: datetime) -> None:
        key = ca.generate_keypair(KeyType.EC_P256)
        issued = ca.sign_responder_certificate(recorded.issuer, key.public_key(), now=now, days=RESPONDER_DAYS)
        with self._database.transaction(sees=recorded.tenant_id) as tx:
            db.add_certificate(
                tx,
                tenant_id=recorded.tenant_id,
                issuer_id=recorded.id,
                purpose="server",
                serial_number=issued.serial_number,
                fingerprint=issued.fingerprint,
                der=issued.der,
                not_before=issued.not_before,
                not_after=issued.not_after,
                issued_at=now,
            )
            audit.record(
                tx,
                audit.system_actor(recorded.tenant_id),
                "certificate:issue",
                f"certificate:{issued.serial_number}",
                at=now,
                purpose="ocsp",
                issuer=recorded.issuer.name,
            )
        replace_file(self.path(recorded.issuer.name), private_key_pem(key) + issued.pem.encode())


@dataclass(eq=False, repr=False)
class Responder:
    """Answers for every CA whose responder certificate is here (RFC 6960 in the profile of RFC 5019).

    A cached answer saves a signature, never a query: a certificate's row is read for each request, so that every
    process answers a revocation from the first request after its commit.
    """

    certificates: ResponderCertificates
    _settings: Settings
    _database: Database
    _authority: Authority
    _clock: Callable[[], datetime]
    _kept: AnswerCache = field(init=False, default_factory=lambda: AnswerCache(MAX_ANSWERS))
    _directory: _Directory = field(init=False, default_factory=lambda: _Directory((), {}, {}))

    def answer(self, der: bytes) -> OcspAnswer:
        """Answer an OCSPRequest, DER; one that is malformed is answered with a failure.

        The responder of the first known CA in the request answers for all its certificates; those of other CAs are
        unknown to it.
        """
        try:
            return self._answer(der)
        except RequestMalformed:
            return self.fail(Failure.MALFORMED_REQUEST)
        except Unavailable:
            return self.fail(Failure.TRY_LATER)

    @staticmethod
    def fail(reason: Failure) -> OcspAnswer:
        """Return an unsigned answer that says why there is no other."""
        metrics.counts.ocsp.labels(reason.name.lower(), "no").inc()
        return OcspAnswer(ocsp.failure(reason))

    def _answer(self, der: bytes) -> OcspAnswer:
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
        signer = self.certificates.signer(recorded)
        if signer is None:
            # The root's key is usually kept elsewhere; for an issuing CA the jobs issue a certificate within a minute.
            soon = recorded.kind == IssuerKind.ISSUING and recorded.issuer.key is not None
            return self.fail(Failure.TRY_LATER if soon else Failure.UNAUTHORIZED)
        statuses = self._statuses(recorded, request, issuers)
        if kept is not None and kept.holds(signer, statuses, now):
            answer = kept.answer
        else:
            kept = None
            this_update = max(now - CLOCK_SKEW, signer.not_before)
            next_update = min(now + timedelta(hours=self._settings.ocsp_hours), signer.not_after)
            content = ocsp.sign_response(
                signer,
                list(zip(request.questions, statuses, strict=True)),
                nonce=request.nonce,
                now=this_update,
                next_update=next_update,
            )
            for_anyone = request.nonce is None and UNKNOWN not in statuses
            answer = OcspAnswer(content, now, next_update, for_anyone)
            if for_anyone and len(der) <= MAX_REQUEST_BYTES:
                until = now + (next_update - now) / 2
                self._kept.put(der, _Kept(issuers, recorded, request, signer, statuses, answer, now, until))
        for status in statuses:
            metrics.counts.ocsp.labels(status.cert_status, "no" if kept is None else "yes").inc()
        return answer

    def _known(self, issuers: tuple[RecordedIssuer, ...]) -> dict[IssuerId, RecordedIssuer]:
        """Return the CAs by the names that requests may have for them; made again when the CAs have changed."""
        if self._directory.issuers is not issuers:
            known = {name: recorded for recorded in issuers for name in ocsp.issuer_ids(recorded.issuer)}
            self._directory = _Directory(issuers, known, _serial_numbers_of_cas(issuers))
        return self._directory.known

    def _statuses(
        self, recorded: RecordedIssuer, request: Request, issuers: tuple[RecordedIssuer, ...]
    ) -> tuple[Status, ...]:
        known = self._known(issuers)
        asked = [question for question in request.questions if known.get(question.issuer) is recorded]
        with self._database.snapshot(sees=recorded.tenant_id) as tx:
            found = store_certificates.revocation_states(
                tx, recorded.id, [question.serial_number for question in asked]
            )
        cas = self._directory.cas.get(recorded.issuer.certificate.subject, frozenset())
        return tuple(
            _status(found.get(question.serial_number), is_ca=question.serial_number in cas)
            if known.get(question.issuer) is recorded
            else UNKNOWN
            for question in request.questions
        )


def _serial_numbers_of_cas(issuers: tuple[RecordedIssuer, ...]) -> dict[x509.Name, set[str]]:
    """Return those of the certificates that each root has issued: they are in no table of certificates."""
    found: dict[x509.Name, set[str]] = {}
    for certificate in (recorded.issuer.certificate for recorded in issuers):
        found.setdefault(certificate.issuer, set()).add(f"{certificate.serial_number:x}")
    return found


def _status(found: RevocationState | None, *, is_ca: bool) -> Status:
    if found is None:
        return GOOD if is_ca else UNKNOWN
    if found.revoked_at is None:
        return GOOD
    return Status(CertStatus.REVOKED, found.revoked_at - CLOCK_SKEW, Reason(found.reason or Reason.UNSPECIFIED))


class AnswerCache:
    """The answers used last, by the bytes of their requests."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, _Kept] = OrderedDict()

    def get(self, request: bytes) -> _Kept | None:
        """Return what is kept for a request."""
        with self._lock:
            kept = self._answers.get(request)
            if kept is not None:
                self._answers.move_to_end(request)
            return kept

    def put(self, request: bytes, kept: _Kept) -> None:
        """Keep an answer in place of the one that was not used for longest."""
        with self._lock:
            self._answers[request] = kept
            self._answers.move_to_end(request)
            if len(self._answers) > self._limit:
                self._answers.popitem(last=False)
