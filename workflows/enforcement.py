"""Brings the broker to the newest generation of the database, one pass for all who wait."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

from broker.acl import Acl
from broker.files import Projection
from broker.probe import ProbeCertificates
from broker_provisioning import BrokerProvisioning
from config import AclStyle, Settings
from core import metrics
from core.errors import LockUnavailable, PortalError
from core.failpoints import failpoint
from core.files import FileLock
from pki.encoding import PemOfSuccessors
from store import generations
from store import issuers as store_issuers
from store.database import Database
from store.generations import BrokerStateRecord
from store.issuers import CrlHead, CrlRecord
from workflows import events
from workflows.authority.crls import RevokedEntries, crl_is_due, next_crl
from workflows.authority.issuers import Authority, Issuers
from workflows.enforcement_acl import DENIALS_KEPT, DENIED_FOR, denials, put_into_acl
from workflows.events import EventType

log = logging.getLogger("portal.enforcement")

# Grants come in bursts, and each reload costs the broker a pause: passes that only grant keep this distance, whichever
# process runs them, and where a pass takes longer, as long as it took. Whoever waits for a grant has a pass at once.
GRANT_INTERVAL_SECONDS = 0.4
PROBLEM_REPEATED_SECONDS = 60.0
PASS_AFTER_FAILURE_SECONDS = 1.0
PASSES_AHEAD = 3  # whoever waits for a pass waits for so many of others', at their longest, before its own


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a pass ended: which generation stands in the files, which one the broker was seen to enforce."""

    installed: int
    enforced: int
    problem: str | None = None

    def covers(self, generation: int) -> bool:
        """Whether the broker enforces ``generation``."""
        return self.enforced >= generation


@dataclass(frozen=True, slots=True)
class _Work:
    """What one snapshot of the database says that the broker must know."""

    state: BrokerStateRecord
    put_out: Sequence[str]
    crls: Sequence[CrlRecord]
    issuers: Issuers


class Enforcement:
    """Runs the passes: snapshot, ACL and CRLs, files, reload, cut sessions, probe, record."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        broker: BrokerProvisioning,
        probe_certificates: ProbeCertificates,
        clock: Callable[[], datetime],
        tenant_id: str,
    ) -> None:
        self._settings = settings
        self._database = database
        self._authority = authority
        self._broker = broker
        self._probe_certificates = probe_certificates
        self._clock = clock
        self._tenant_id = tenant_id
        self._pass_lock = FileLock(settings.data_dir / ".pass.lock")
        self._counter = threading.Lock()
        self._passes_begun = 0
        self._last_pass: tuple[int, Outcome] = (0, Outcome(0, 0))
        self._acl = Acl(settings.acl_style, settings.topic_prefix)
        self._acl_generation = 0
        self._revoked = RevokedEntries()
        self._crl_pem: dict[CrlHead, bytes] = {}  # of each issuer's newest CRL
        self._crl_writers: dict[int, PemOfSuccessors] = {}  # by issuer
        self._wanted = threading.Event()
        self._last_problem = ("", 0.0)
        self._said_pending: set[str] = set()

    # --- What others ask for

    def apply(self, generation: int, *, timeout: float | None = None) -> Outcome:
        """Return once the broker enforces ``generation``, or once a pass begun after this call has failed to.

        All who wait share a pass, whichever thread or process runs it. Never raises for the broker's sake: the
        outcome says what is wrong.
        """
        if self._last_pass[1].covers(generation):
            return self._last_pass[1]
        with self._counter:
            begun_before = self._passes_begun
        applied = self.applied_generation()
        if applied >= generation:
            return Outcome(applied, applied)
        if timeout is None:
            timeout = self._settings.enforce_timeout
            if self._last_pass[1].problem is not None:
                # The jobs go on trying with all patience. Requests that did would take up every thread meanwhile.
                timeout = min(timeout, PASS_AFTER_FAILURE_SECONDS)
        try:
            with self._pass_lock.hold(PASSES_AHEAD * timeout):
                number, outcome = self._last_pass
                if outcome.covers(generation) or number > begun_before:
                    return outcome
                state = self._state()
                if state.applied_generation >= generation:
                    return Outcome(state.applied_generation, state.applied_generation)
                with self._counter:
                    self._passes_begun += 1
                    number = self._passes_begun
                outcome = self._pass(timeout)
                self._last_pass = (number, outcome)
                return outcome
        except LockUnavailable as error:
            self._log_problem(error.detail, applied, applied)
            return Outcome(applied, applied, error.detail)

    def install(self) -> Outcome:
        """Write the files of the newest generation with no word to the broker, which may not run yet."""
        with self._pass_lock.hold():
            work = self._prepare()
            self._install(work)
            return Outcome(work.state.generation, work.state.applied_generation)

    def applied_generation(self) -> int:
        """The newest generation that the broker was seen to enforce, in any process."""
        return self._state().applied_generation

    def damage(self) -> list[str]:
        """What is wrong with the broker's files, a sentence each; looked at again where a pass may be writing."""
        if not self._broker.damage():
            return []
        try:
            with self._pass_lock.hold(self._settings.enforce_timeout):
                return self._broker.damage()
        except LockUnavailable as error:
            return [error.detail]

    def broker_answers(self) -> bool:
        """Whether the broker runs and answers on its internal listener."""
        return self._broker.reachable()

    def wake(self) -> None:
        """Ask for a pass soon, without waiting: what was granted is to be known to the broker within a second."""
        self._wanted.set()

    def run_grants(self, stopping: threading.Event) -> None:
        """Run the passes asked for by ``wake`` until ``stopping`` is set; the body of a thread."""
        self._read_ahead()
        interval, ended = 0.0, time.monotonic()
        while not stopping.is_set():
            if not self._wanted.wait(timeout=1.0):
                continue
            self._wanted.clear()
            started = time.monotonic()
            try:
                quiet = min(started - ended, self._seconds_since_pass())
                if stopping.wait(interval - quiet):
                    return
                started = time.monotonic()
                state = self._state()
                if state.applied_generation < state.generation:
                    self.apply(state.generation, timeout=self._settings.enforce_timeout)
            except PortalError as error:
                log.warning("granting pass failed", extra={"problem": error.detail})
            except Exception:
                log.exception("granting pass failed")
            ended = time.monotonic()
            interval = max(GRANT_INTERVAL_SECONDS, ended - started)

    def _read_ahead(self) -> None:
        """Read what the CRLs list before the first revocation has to: for 100,000 entries that takes a second."""
        entries = RevokedEntries()
        try:
            with self._database.snapshot() as tx:
                generation, now = generations.get_broker_state(tx, self._tenant_id).generation, self._clock()
                for recorded in self._authority.seen_by(tx).with_crl():
                    entries.listed(tx, recorded.id, generation=generation, now=now)
        except PortalError as error:
            log.warning("the CRLs' entries were not read ahead", extra={"problem": error.detail})
            return
        if self._revoked.are_unread:  # else a pass was quicker; one that runs now goes on with those that it has
            self._revoked = entries

    # --- A pass

    def _seconds_since_pass(self) -> float:
        """How long ago the broker was last seen to obey, to any process."""
        applied_at = self._state().applied_at
        return math.inf if applied_at is None else max(0.0, (self._clock() - applied_at).total_seconds())

    def _state(self) -> BrokerStateRecord:
        with self._database.snapshot() as tx:
            return generations.get_broker_state(tx, self._tenant_id)

    def _pass(self, timeout: float) -> Outcome:
        started = time.monotonic()
        deadline = started + timeout
        installed = enforced = 0
        work: _Work | None = None
        try:
            failpoint("apply.begin")
            work = self._prepare()
            generation, enforced = work.state.generation, work.state.applied_generation
            self._install(work)
            installed = generation
            failpoint("apply.after_install")
            self._broker.enforce(generation, deadline)
            failpoint("apply.after_reload")
            if work.put_out:
                self._broker.cut_sessions(work.put_out, deadline)
            failpoint("apply.after_cut")
            if work.put_out or work.crls:
                self._broker.probe(self._probe_certificates, deadline)
            failpoint("apply.after_probe")
            with self._database.transaction() as tx:
                now = self._clock()
                generations.set_applied_generation(tx, self._tenant_id, generation, applied_at=now)
                for device_id in work.put_out:
                    events.record(
                        tx, self._tenant_id, EventType.BROKER_ENFORCED, device_id, at=now, generation=generation
                    )
                failpoint("apply.before_recorded")
            failpoint("apply.after_recorded")
        except PortalError as error:
            metrics.broker_pass(ended_well=False)
            self._log_problem(error.detail, installed, enforced)
            if work is not None:
                self._say_pending(work, error.detail)
            return Outcome(installed, enforced, error.detail)
        except Exception:
            metrics.broker_pass(ended_well=False)
            log.exception("a pass failed unexpectedly")
            return Outcome(installed, enforced, "The pass failed unexpectedly; the portal's log has the cause.")
        self._last_problem = ("", 0.0)
        self._said_pending.clear()
        metrics.broker_pass(ended_well=True)
        log.info(
            "broker enforces",
            extra={
                "generation": generation,
                "cut": len(work.put_out),
                "crl": bool(work.crls),
                "ms": round((time.monotonic() - started) * 1000, 1),
            },
        )
        return Outcome(generation, generation)

    def _log_problem(self, problem: str, installed: int, enforced: int) -> None:
        """Say it when it is new, and then once a minute: the repair job tries every two seconds."""
        said, when = self._last_problem
        now = time.monotonic()
        if problem == said and now - when < PROBLEM_REPEATED_SECONDS:
            return
        self._last_problem = (problem, now)
        log.error(
            "the broker does not enforce the newest generation yet",
            extra={"generation": installed, "enforced": enforced, "problem": problem},
        )

    def _say_pending(self, work: _Work, problem: str) -> None:
        """Record once of each device that is to be put out that the broker was not seen to do so yet."""
        new = [device_id for device_id in work.put_out if device_id not in self._said_pending]
        if not new or not events.has_subscribers(self._database.engine):
            return
        since = f"since {work.state.applied_generation}"  # the same in every process while this lasts
        try:
            with self._database.transaction() as tx:
                for device_id in new:
                    events.record(
                        tx,
                        self._tenant_id,
                        EventType.BROKER_PENDING,
                        device_id,
                        at=self._clock(),
                        once=since,
                        problem=problem,
                    )
        except PortalError as error:
            log.warning("a pending revocation was not announced", extra={"problem": error.detail})
        else:
            self._said_pending.update(new)

    def _prepare(self) -> _Work:
        """Read one snapshot, bring the ACL in memory to it, sign the CRLs that are due, and record them."""
        now = self._clock()
        signed: list[CrlRecord] = []
        with self._database.snapshot() as tx:
            state = generations.get_broker_state(tx, self._tenant_id)
            self._update_acl(tx, state, now)
            failpoint("apply.after_snapshot")
            put_out = generations.devices_to_disconnect(tx, self._tenant_id, since=state.applied_generation)
            changed_at = {record.id: record.revoked_generation for record in store_issuers.list_issuers(tx)}
            issuers = self._authority.seen_by(tx)
            for recorded in issuers.with_crl():
                previous = store_issuers.get_crl_head(tx, recorded.id)
                if crl_is_due(previous, changed_at=changed_at[recorded.id], now=now):
                    signed.append(
                        next_crl(
                            tx,
                            recorded.id,
                            recorded.issuer,
                            previous,
                            self._revoked,
                            days=self._settings.crl_days,
                            generation=state.generation,
                            now=now,
                        )
                    )
        self._acl_generation = state.generation
        if signed:
            failpoint("apply.after_crl_signed")
            with self._database.transaction() as tx:
                for crl in signed:
                    store_issuers.put_crl(tx, self._tenant_id, crl)
            failpoint("apply.after_crl_committed")
        return _Work(state, put_out, signed, issuers)

    def _update_acl(self, tx: Connection, state: BrokerStateRecord, now: datetime) -> None:
        """Bring the ACL in memory from the generation of the last pass of this process to the newest."""
        since, per_device = self._acl_generation, self._settings.acl_style is AclStyle.PER_DEVICE
        for change in generations.acl_changes(tx, self._tenant_id, since=since, defaults=per_device):
            put_into_acl(self._acl, change, now)
        if not per_device:
            if since == 0:
                applied = state.applied_generation
                for change in denials(tx, self._tenant_id, applied=applied, now=now):
                    put_into_acl(self._acl, change, now)
            self._acl.thin(newest=DENIALS_KEPT, since=now - DENIED_FOR)

    def _install(self, work: _Work) -> None:
        if self._acl.closed:
            log.error(
                "devices are denied everything because their topics do not fit the settings",
                extra={"devices": len(self._acl.closed), "first": next(iter(self._acl.closed.items()))},
            )
        pem: dict[CrlHead, bytes] = {}
        with self._database.snapshot() as tx:
            for recorded in work.issuers.with_crl():
                head = store_issuers.get_crl_head(tx, recorded.id)
                if head is not None and head not in self._crl_pem:
                    crl = store_issuers.get_crl(tx, recorded.id)
                    writer = self._crl_writers.setdefault(recorded.id, PemOfSuccessors("X509 CRL"))
                    self._crl_pem[head] = b"" if crl is None else writer.pem(crl.der)
                if head is not None:
                    pem[head] = self._crl_pem[head]
        self._crl_pem = pem
        self._broker.install(
            Projection(
                generation=work.state.generation,
                acl=self._acl.render(work.state.generation),
                crl=b"".join(pem.values()),
                ca=work.issuers.ca_pem.encode(),
            )
        )
