"""Brings this node's broker to the newest generation: one reconciliation for all requests that wait.

A node without a broker of its own waits for those that agents and other nodes tell.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from broker.control import Changes, Draft, RestartReason
from broker.probe import ProbeCertificates
from broker.restarts import LEAST_SPACING, BrokerRestarts
from broker_provisioning import BrokerProvisioning
from config import Settings
from core import metrics
from core.errors import BrokerUnavailable, LockUnavailable, PortalError, TokenUnavailable, Unavailable
from core.failpoints import failpoint
from core.fair_share import give_up_share
from core.files import FileLock
from store import brokers, devices, generations
from store.database import Database
from store.generations import BrokerStateRecord
from store.issuers import CrlRecord
from store.scope import ALL_TENANTS
from workflows import events
from workflows.access import BrokerTenants
from workflows.authority.crl_publication import CrlPublication
from workflows.authority.issuers import Authority, Issuers
from workflows.enforcement import Progress, SharedAnswer, note_applied
from workflows.events import EventType
from workflows.granting import Granting, log_closed
from workflows.other_brokers import OtherBrokers
from workflows.prompt import Outcome, PromptAnswers

log = logging.getLogger("portal.reconciliation")

# Admissions come in bursts, and each reload costs the broker a pause: reconciliations that nobody waits for keep this
# distance, whichever process runs them, or as long as one takes. A request that waits for one has it at once.
INTERVAL_SECONDS = 0.4
PROBLEM_REPEATED_SECONDS = 60.0
AFTER_FAILURE_SECONDS = 1.0
MAX_AHEAD = 3  # reconciliations of others, at their longest, that a request waits for before its own


@dataclass(frozen=True, slots=True)
class _Target:
    """What one snapshot of the database says that the broker must enforce.

    ``disconnected`` are ids of devices, ``revoked`` those of them that were revoked for good, each with the
    prefix of its topics, ``narrowed`` those that have lost topics. ``in_doubt`` if the broker may accept anybody:
    others may have reloaded it with damaged files.
    """

    state: BrokerStateRecord
    draft: Draft
    disconnected: Sequence[str]
    revoked: Mapping[str, str]
    narrowed: Sequence[str]
    crls: Sequence[CrlRecord]
    issuers: Issuers
    puts_off_crls: bool
    in_doubt: bool


@dataclass(slots=True)
class _Progress:
    """How far a reconciliation has come."""

    target: _Target | None = None
    steps: Progress | None = None
    installed: int = 0
    enforced: int = 0


class Reconciler:
    """Makes the broker enforce what the database says: files, proof, disconnections, probe, record, restart."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        broker: BrokerProvisioning,
        probe_certificates: ProbeCertificates,
        clock: Callable[[], datetime],
        first_tenant: str,
        broker_id: int,
    ) -> None:
        """Take the id of this node's broker, 0 if it has none."""
        self._settings = settings
        self._database = database
        self._broker_id, self._has_broker = broker_id, broker_id != 0
        self._authority = authority
        self._broker = broker
        self._probe_certificates = probe_certificates
        self._clock = clock
        self._first_tenant = first_tenant
        self.restarts = BrokerRestarts(
            settings, lambda deadline: broker.waits(probe_certificates, deadline), self._active_devices
        )
        self._lock = FileLock(settings.data_dir / ".pass.lock")
        self._granting = Granting(settings, database, authority, broker, clock, broker_id)
        self.crls = CrlPublication(settings, database, authority, broker, probe_certificates, clock, first_tenant)
        self._counting = threading.Lock()
        self._begun = 0
        self._last: tuple[int, Outcome] = (0, Outcome(0, 0))
        self._woken = threading.Event()
        self._hurried = threading.Event()
        self._last_problem = ("", 0.0)
        self._announced: set[str] = set()
        self._answers = SharedAnswer(self.broker_answers)
        self._others = OtherBrokers(database)
        self.heard_of_another = self._others.heard_of
        self._prompt = PromptAnswers(lambda generation: self.apply_everywhere(generation))

    # --- What others ask for

    def apply(self, generation: int, *, timeout: float | None = None) -> Outcome:
        """Return once the broker enforces ``generation``, or once a reconciliation begun after this call has failed to.

        All requests that wait share one, whichever thread or process runs it. Never raises because of the broker: the
        outcome says what is wrong. If this node has no broker, it is about the first one elsewhere.
        """
        if self._last[1].covers(generation):
            return self._last[1]
        give_up_share()
        with self._counting:
            begun_before = self._begun
        if timeout is None:
            timeout = self._settings.enforce_timeout
            if self.is_failing():
                timeout = min(timeout, AFTER_FAILURE_SECONDS)
        if not self._has_broker:
            return self._first_elsewhere(generation, time.monotonic() + timeout)
        try:
            with self._lock.hold_unless(lambda: self._has_tried(generation, begun_before), MAX_AHEAD * timeout) as held:
                if not held:
                    return self._last[1]
                applied = self.applied_generation()
                if applied >= generation:  # as another process has seen
                    self._last = (0, Outcome(applied, applied))
                    return self._last[1]
                with self._counting:
                    self._begun += 1
                    number = self._begun
                outcome = self._reconcile(timeout, applied)
                self._last = (number, outcome)
                return outcome
        except LockUnavailable as error:
            applied = self.applied_generation()
            if applied >= generation:
                return Outcome(applied, applied)
            self._log_problem(error.detail, applied, applied)
            return Outcome(applied, applied, error.detail)

    def _has_tried(self, generation: int, begun_before: int) -> bool:
        """Return whether this process has seen that the broker enforces a generation, or tried since a call for it."""
        number, outcome = self._last
        return outcome.covers(generation) or number > begun_before

    def apply_everywhere(self, generation: int, *, timeout: float | None = None) -> Outcome:
        """Return once every broker that counts enforces ``generation``, or once that has failed or takes too long.

        As ``apply``; then the outcome names those that were not seen to enforce it.
        """
        deadline = time.monotonic() + (self._settings.enforce_timeout if timeout is None else timeout)
        if not self._has_broker:
            give_up_share()
            outcome = Outcome(generation, generation)
        else:
            outcome = self.apply(generation, timeout=timeout)
        if outcome.covers(generation) and (problem := self._others.wait_for_all(generation, deadline)) is not None:
            return self._pending_elsewhere(outcome, problem)
        return outcome

    def _first_elsewhere(self, generation: int, deadline: float) -> Outcome:
        """Return once the first broker elsewhere enforces a generation: this node has none."""
        problem = self._others.wait_for_one(generation, deadline)
        outcome = Outcome(generation, generation if problem is None else self._others.newest_enforced(), problem)
        self._last = (0, outcome)
        return outcome

    def _pending_elsewhere(self, outcome: Outcome, problem: str) -> Outcome:
        """Return what is true of all brokers, after an event for each device that not all keep out yet."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            applied = generations.get_broker_state(tx).applied_generation
            is_heard = events.has_subscribers(tx)
            denied = generations.devices_to_disconnect(tx, since=applied) if is_heard else ()
        self._announce_pending(applied, denied, problem)
        return replace(outcome, enforced=min(applied, outcome.enforced), problem=problem)

    def apply_soon(self, generation: int) -> Outcome:
        """Have the brokers obey as ``apply_everywhere`` does, and return before that if it takes longer than it should.

        The outcome has no ``problem`` while it is not known whether they obey.
        """
        return self._prompt.apply(generation)

    def is_failing(self) -> bool:
        """Return whether the last reconciliation failed, and none has succeeded since, in any process.

        Meanwhile the jobs keep trying with the whole timeout. Requests that did would take up every thread.
        """
        last = self._last[1]
        return last.problem is not None and self.applied_generation() <= last.enforced

    def wait_until_granted(self, generation: int) -> None:
        """Return once credentials made at ``generation`` work; raises ``Unavailable`` if that takes too long.

        A broker that is not running will read the files at its start, so that they are enough.
        """
        if self._granting.grant(generation):
            self.wake()
            return
        outcome = self.apply(generation)
        if outcome.covers(generation):
            self.wait_for_restart()
        elif not self._granting.is_granted(generation) and (outcome.installed < generation or self.broker_answers()):
            raise Unavailable("The broker does not know the device's newest state yet; try again in a few seconds.")

    def wait_for_restart(self) -> None:
        """Wait until the broker has all, if that takes a restart which is due soon; else leave it to the jobs."""
        deadline = time.monotonic() + self._settings.enforce_timeout
        try:
            while (seconds := self.restart_if_due()) is not None and time.monotonic() + seconds < deadline:
                time.sleep(seconds)
        except PortalError as error:
            log.error("the broker could not be restarted", extra={"problem": error.detail})

    def restart_if_due(self) -> float | None:
        """Restart the broker if something waits for that and the last start was long enough ago.

        Return after how many seconds it is due, ``inf`` if somebody else has to do it, ``None`` if nothing waits, or if
        the broker does not run. Raise ``BrokerUnavailable`` if it does not answer as it should after the restart.
        """
        timeout = self._settings.enforce_timeout
        if self._waits(timeout) is None:
            return None
        with self._lock.hold(MAX_AHEAD * timeout):  # those that wait behind it find nothing more to do
            if (reason := self._waits(timeout)) is None:
                return None
            seconds = self.restarts.seconds_until_due()
            if seconds == math.inf:
                if self.restarts.ask_for(reason):
                    self._announce_restart(reason, by_portal=False)
            elif seconds == 0 and not self._damage():
                log.warning("the broker is restarted", extra={"because": str(reason)})
                self._announce_restart(reason, by_portal=True)
                self.restarts.restart(reason)
                return None
            return max(seconds, LEAST_SPACING / 20)

    def install(self) -> Outcome:
        """Write the files of the newest generation without telling the broker, which may not run yet."""
        if not self._has_broker:
            return self._sign_for_others()
        with self._lock.hold(), self._granting.lock.hold():
            try:
                target = self._prepare(with_crls=True)
            except TokenUnavailable as error:
                log.error("the broker begins with the CRLs that were signed last", extra={"problem": error.detail})
                self.wake()
                self.crls.wake()
                try:
                    target = self._prepare()
                except TokenUnavailable:  # under files there is nothing newer without a CRL
                    installed = self._broker.files.installed_generation()
                    if installed is None:
                        raise
                    return Outcome(installed, self.applied_generation())
            self._install(target)
            return Outcome(target.state.generation, target.state.applied_generation)

    def _sign_for_others(self) -> Outcome:
        """Sign the CRLs that are due, which agents and others read from the database."""
        try:
            self.crls.sign_put_off()
        except TokenUnavailable as error:
            log.error("the CRLs are not signed", extra={"problem": error.detail})
            self.crls.wake()
        state = self.own_state()
        return Outcome(state.generation, state.applied_generation)

    def _announce_restart(self, reason: RestartReason, *, by_portal: bool) -> None:
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            kind, now = EventType.BROKER_RESTART, self._clock()
            events.record(tx, self._first_tenant, kind, None, at=now, because=str(reason), by_portal=by_portal)

    def _waits(self, timeout: float) -> RestartReason | None:
        try:
            return self._broker.waits(self._probe_certificates, time.monotonic() + timeout)
        except BrokerUnavailable:
            return None  # it reads all at its start

    def applied_generation(self) -> int:
        """Return the newest generation that the broker was seen to enforce, by any process; else one elsewhere."""
        if not self._has_broker:
            return self._others.newest_enforced()
        return self.own_state().applied_generation

    def damage(self) -> list[str]:
        """Return what is wrong with the broker's files, a sentence each; checked again if they may be being written."""
        if not self._has_broker or not self._damage():
            return []
        try:
            with self._lock.hold(self._settings.enforce_timeout), self.crls.lock.hold(self._settings.enforce_timeout):
                return self._damage()
        except LockUnavailable as error:
            return [error.detail]

    def _damage(self) -> list[str]:
        enforced, files = self.applied_generation(), self._broker.files
        problems = files.damage()
        if not problems and (files.installed_generation() or 0) < enforced:
            return [f"{self._settings.broker_dir} is older than generation {enforced}, which was in force."]
        return problems

    def broker_answers(self) -> bool:
        """Return whether the node's broker runs and answers on its internal listener."""
        return self._broker.reachable()

    @property
    def silence(self) -> str:
        """The sentence for a broker beside the node that does not answer."""
        if self._settings.rabbitmq_nodes:
            return "No node of RabbitMQ answers at its management API."
        return "The broker does not answer on its internal listener."

    def is_broker_well(self) -> bool:
        """Return whether nothing is to be said of the node's broker: it answers, or there is none."""
        return not self._has_broker or self._broker.reachable()

    def why_pending(self, generation: int) -> str | None:
        """Return a sentence about the brokers that were not seen to enforce a generation, if one can be said."""
        if self._has_broker and not self._answers():
            return self.silence
        return self._others.problem(generation)

    def broker_nodes(self) -> Mapping[str, bool]:
        """Return the nodes of a cluster, each with whether clients reach it; empty for a broker that is one program."""
        return self._broker.nodes()

    def probe_problem(self) -> str | None:
        """Return why the broker failed the last probe, whichever process made it; ``None`` if it did not."""
        return self._broker.probe_problem()

    def wake(self) -> None:
        """Ask for a reconciliation within a second, without waiting for it."""
        self._woken.set()

    def look(self, *, at_once: bool = False) -> None:
        """Ask for a reconciliation if this node's broker lacks something, as after a change at another node.

        With ``at_once`` it keeps no distance to the one before: a request at another node waits for it.
        """
        state = self.own_state()
        if state.applied_generation < state.generation and self._has_broker:
            self.wake()
            if at_once:
                self._hurried.set()

    def run_requested(self, stopping: threading.Event) -> None:
        """Run the reconciliations that ``wake`` asks for until ``stopping`` is set; the body of a thread."""
        if not self._has_broker:
            return
        interval, ended = 0.0, time.monotonic()
        while not stopping.is_set():
            if not self._woken.wait(timeout=1.0):
                continue
            self._woken.clear()
            started = time.monotonic()
            try:
                quiet = min(started - ended, self._seconds_since_last())
                self._hurried.wait(max(0.0, interval - quiet))
                self._hurried.clear()
                if stopping.is_set():
                    return
                started = time.monotonic()
                state = self.own_state()
                if state.applied_generation < state.generation:
                    self.apply(state.generation, timeout=self._settings.enforce_timeout)
                self.restart_if_due()
            except PortalError as error:
                log.warning("reconciliation failed", extra={"problem": error.detail})
            except Exception:
                log.exception("reconciliation failed")
            ended = time.monotonic()
            interval = max(INTERVAL_SECONDS, ended - started)

    # --- One reconciliation

    def _seconds_since_last(self) -> float:
        """Return how long ago the broker was last seen to obey, by any process."""
        applied_at = self.own_state().applied_at
        return math.inf if applied_at is None else max(0.0, (self._clock() - applied_at).total_seconds())

    def _active_devices(self) -> int:
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return devices.count_active(tx)

    def own_state(self) -> BrokerStateRecord:
        """Return the newest generation, and the one that this node's broker was seen to enforce, by any process.

        If the node has none: the one that all brokers enforce which count.
        """
        if self._has_broker:
            return brokers.own_state_now(self._database, self._broker_id)
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return generations.get_broker_state(tx)

    def _reconcile(self, timeout: float, enforced: int) -> Outcome:
        started = time.monotonic()
        progress = _Progress(enforced=enforced)
        try:
            self._run(progress, started + timeout)
        except PortalError as error:
            metrics.counts.passes.labels("failed").inc()
            self._log_problem(error.detail, progress.installed, progress.enforced)
            if progress.steps is not None:
                progress.steps.failed(error.detail)
            if progress.target is not None:
                target = progress.target
                self._announce_pending(target.state.applied_generation, target.disconnected, error.detail)
            return Outcome(progress.installed, progress.enforced, error.detail)
        except Exception:
            metrics.counts.passes.labels("failed").inc()
            log.exception("reconciliation failed unexpectedly")
            problem = "Unexpected error; the portal's log has the cause."
            if progress.steps is not None:
                progress.steps.failed(problem)
            return Outcome(progress.installed, progress.enforced, problem)
        self._last_problem = ("", 0.0)
        self._announced.clear()
        metrics.counts.passes.labels("enforced").inc()
        return Outcome(progress.enforced, progress.enforced)

    def _run(self, progress: _Progress, deadline: float) -> None:
        started = time.monotonic()
        failpoint("apply.begin")
        with self._granting.lock.hold(self._settings.enforce_timeout):
            target = progress.target = self._prepare()
            generation, progress.enforced = target.state.generation, target.state.applied_generation
            steps = progress.steps = Progress(
                self._database, self._broker_id, progress.enforced, generation, self._clock()
            )
            has_crls = self._install(target)
        progress.installed = generation
        failpoint("apply.after_install")
        in_doubt = bool(target.crls) or target.in_doubt
        changes = Changes(generation, target.disconnected, target.revoked, target.narrowed, in_doubt)
        self._broker.bring_into_force(changes, self._probe_certificates, deadline, steps.proven, has_crls=has_crls)
        # If a power cut takes this record back, the same is proven again.
        with self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
            steps.record(tx)
            brokers.take_turns(tx)
            note_applied(tx, self._broker_id, generation, at=self._clock())
            failpoint("apply.before_recorded")
        failpoint("apply.after_recorded")
        progress.enforced = generation
        if target.puts_off_crls:
            self.crls.wake()
        figures = {"cut": len(changes.sessions_to_end), "crl": bool(target.crls)}
        took = round((time.monotonic() - started) * 1000, 1)
        log.info("broker enforces", extra={"generation": generation, **figures, "ms": took})

    def _log_problem(self, problem: str, installed: int, enforced: int) -> None:
        """Log a problem when it is new, and then once a minute: the repair job tries every two seconds."""
        said, when = self._last_problem
        now = time.monotonic()
        if problem == said and now - when < PROBLEM_REPEATED_SECONDS:
            return
        self._last_problem = (problem, now)
        log.error(
            "the broker does not enforce the newest generation yet",
            extra={"generation": installed, "enforced": enforced, "problem": problem},
        )
        with suppress(PortalError), self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
            brokers.set_problem(tx, self._broker_id, problem, at=self._clock())

    def _announce_pending(self, applied: int, disconnected: Sequence[str], problem: str) -> None:
        """Record an event, once for each device that a broker was not seen to disconnect yet."""
        new = [device_id for device_id in disconnected if device_id not in self._announced]
        if not new or not events.has_subscribers(self._database.engine):
            return
        since = f"since {applied}"  # the same in every process while this lasts
        try:
            with self._database.transaction(sees=ALL_TENANTS) as tx:
                for device_id in new:
                    self._record(tx, EventType.BROKER_PENDING, device_id, at=self._clock(), once=since, problem=problem)
        except PortalError as error:
            log.warning("a pending revocation was not announced", extra={"problem": error.detail})
        else:
            self._announced.update(new)

    def _record(self, tx: Connection, type_: EventType, device_id: str, *, at: datetime, **facts: Any) -> None:
        if events.has_subscribers(tx):
            tenant_id, kind = devices.owner_of(tx, device_id)
            events.record(tx, tenant_id, type_, device_id, at=at, kind=kind, **facts)

    def _prepare(self, *, with_crls: bool = False) -> _Target:
        """Read one snapshot, draft what the broker must enforce, and sign the CRLs that are due or put that off."""
        draft: Draft | None = None
        try:
            with self._database.snapshot(sees=ALL_TENANTS) as tx:
                known = BrokerTenants(tx)
                state, draft, issuers = self._granting.begin(tx, known)
                failpoint("apply.after_snapshot")
                disconnected, revoked, narrowed = self._sessions_to_end(tx, known, since=state.applied_generation)
            puts_off = not with_crls and draft.puts_off_crls(issuers.broker_ca, issuers.tenants)
            # If CRLs are put off, no file is damaged.
            in_doubt = self._broker.accepted_revoked() or (not puts_off and bool(self._broker.files.damage()))
            crls: Sequence[CrlRecord] = ()
            if not puts_off:
                issuers, crls = self.crls.sign_due()
            return _Target(state, draft, disconnected, revoked, narrowed, crls, issuers, puts_off, in_doubt)
        except BaseException:
            if draft is not None:
                draft.discard()
            raise

    def _sessions_to_end(
        self, tx: Connection, known: BrokerTenants, *, since: int
    ) -> tuple[Sequence[str], Mapping[str, str], Sequence[str]]:
        """Return whose sessions must end, which of them were revoked, and who has lost topics."""
        if not generations.takes_away(tx, since):
            return (), {}, ()
        disconnected = generations.devices_to_disconnect(tx, since=since)
        revoked = generations.revoked_since(tx, since) if disconnected else {}
        prefixes = {
            device_id: self._settings.topic_prefix if (tenant := known.of(tenant_id)) is None else tenant.prefix
            for device_id, tenant_id in revoked.items()
        }
        if not self._broker.control.narrows_at_once:
            return disconnected, prefixes, ()
        return disconnected, prefixes, generations.narrowed_since(tx, since)

    def _install(self, target: _Target) -> bool:
        """Write it for the broker; return whether that has the CRLs now, and not only what the draft says."""
        log_closed(target.draft)
        generation = target.state.generation
        try:
            if target.puts_off_crls:
                return target.draft.install(generation, None)
            with self.crls.trust(target.issuers) as trust:
                return target.draft.install(generation, trust)
        finally:  # without the CRLs nothing was installed
            target.draft.discard()
