"""Does what must happen without a request: repairs of the broker's files, renewals, expiry of links, clean-up."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.control import RestartReason
from broker.folder import SERVER_CERTIFICATE_FILE
from core.boot import boot_id
from core.errors import BrokerUnavailable, PortalError, StateConflict
from onboarding_portal import VERSION
from operations.authority import (
    advance,
    check_broker_certificate,
    renew_certificates,
    renew_crls,
    retire_unneeded,
    take_outside_certificates,
    write_ca_file,
)
from operations.leadership import leadership_of
from operations.own_certificates import probe_certificates
from operations.wiring import Portal
from store import audit, certificates, deliveries, devices, generations, nodes, tenants, webhooks
from store.listening import listen
from workflows import events
from workflows.events import EventType

log = logging.getLogger("portal.jobs")

# The broker drops a connection that was being made when its device was revoked after this time at the latest. Until
# then a session without any rights may still appear, and is disconnected again.
LATE_SESSIONS = timedelta(seconds=100)
EVENTS_BATCH = 500
RESTART_AGAIN_AFTER = timedelta(hours=1)
QUIET = timedelta(minutes=1)  # without a change for the broker

LEADER_LOCK, FOLLOWER_LOCK, PROVIDER_LOCK = ".jobs.lock", ".presence.lock", ".provider.lock"
# Of what one process of one node does for all nodes.
MAIL_LOCK, INSTALLATION_LOCK = ".mail.lock", ".installation.lock"
LOGINS_KEPT = timedelta(days=30)
CLOCK_SEEN = ".jobs.clock"
CLOCK_MOVED_SECONDS = 60.0
CLOCK_TRUSTED_SECONDS = 3600.0


def repair_broker(portal: Portal) -> None:
    """Rewrite damaged files of the broker, and finish what a crash or a stopped broker left undone."""
    if not portal.settings.has_broker:
        return
    problems = portal.reconciler.damage()
    state = _state(portal)
    recorded = portal.memory.damage
    if problems and (problems != recorded or state.applied_generation >= state.generation):
        log.error("the broker's files were damaged and are written again", extra={"problem": " ".join(problems)})
        advance(portal, "broker:repair", problems=problems)
        state = _state(portal)
    portal.memory.damage = problems
    if not problems:
        portal.reconciler.restart_if_due()
    if state.applied_generation < state.generation:
        portal.reconciler.apply(state.generation, timeout=portal.settings.enforce_timeout)
    if problems:
        probe_broker(portal)  # a broker that loaded the damaged files may have accepted any client


def write_lists_of_cas(portal: Portal) -> None:
    """Write the CAs that TLS and others are to trust if they have changed, as by a tenant that was added or removed."""
    portal.clients.write_authorities()
    write_ca_file(portal)


def _state(portal: Portal) -> generations.BrokerStateRecord:
    return portal.reconciler.own_state()


def expire(portal: Portal) -> None:
    """Revoke certificates whose overlap has ended, destroy bundles whose links have expired, delete old records."""
    prune_events(portal)
    portal.nonces.sweep()
    portal.sessions.sweep()
    while portal.renewals.end_overlaps():
        pass
    now = portal.clock()
    with portal.database.snapshot() as tx:
        if not deliveries.anything_due(tx, now=now):
            return
    with portal.database.transaction() as tx:
        expired = deliveries.expire_deliveries(tx, now=now)
        audit.lock_audit_heads(tx, (tenant_id for tenant_id, _, _ in expired))
        for tenant_id, device_id, delivery_id in expired:
            audit.record(
                tx,
                audit.system_actor(tenant_id),
                "bundle:expire",
                f"{devices.kind_of(tx, tenant_id, device_id)}:{device_id}",
                at=now,
                delivery=delivery_id,
            )
        deliveries.forget_kept_bundles(tx, now=now)
        deliveries.forget_answers(tx, now=now)


def disconnect_again(portal: Portal) -> None:
    """Disconnect devices again that were revoked or suspended just now: one may have been connecting meanwhile.

    A device with a newer certificate is disconnected once, when no session can come from the older one any more.
    """
    since = portal.clock() - LATE_SESSIONS
    with portal.database.snapshot() as tx:
        late = generations.devices_denied_since(tx, since)
        superseded = dict(generations.superseded_between(tx, since - LATE_SESSIONS, since))
    done = portal.memory.disconnected
    done.intersection_update(superseded)
    late += [device_id for certificate_id, device_id in superseded.items() if certificate_id not in done]
    if late and portal.broker.reachable():
        portal.broker.disconnect(late, time.monotonic() + portal.settings.enforce_timeout)
        done.update(superseded)


def probe_broker(portal: Portal) -> None:
    """Probe the broker although nothing has changed here: its configuration may have been changed."""
    if portal.broker.reachable():
        deadline = time.monotonic() + portal.settings.enforce_timeout
        certificates = probe_certificates(portal.settings)
        try:
            portal.broker.probe(certificates, deadline)
        finally:  # a broker whose certificate has ended fails the probe, and needs the restart most
            _restart_if_due(portal, portal.broker.server_certificate(certificates, deadline))


def probe_again(portal: Portal) -> None:
    """Probe a broker that failed the last probe, so that it is soon seen to be repaired; ``probe_broker`` logs it."""
    if portal.broker.probe_problem() is not None:
        with contextlib.suppress(BrokerUnavailable):
            probe_broker(portal)


def _restart_if_due(portal: Portal, served: bytes) -> None:
    """Restart a broker that shows an older server certificate, or tell by when that has to be done.

    A restart keeps sessions and queues; it waits for a quiet moment.
    """
    settings, now, last = portal.settings, portal.clock(), portal.memory.broker_restart_at
    newest = x509.load_pem_x509_certificate(settings.broker_file(SERVER_CERTIFICATE_FILE).read_bytes())
    if served == newest.public_bytes(Encoding.DER):
        settings.probe_ca_files[1].unlink(missing_ok=True)
        return
    if not portal.broker.control.reads_certificate_at_start:
        return
    if last is not None and abs(now - last) < RESTART_AGAIN_AFTER:
        return
    shown = x509.load_der_x509_certificate(served)
    if settings.broker_restart and not (_is_quiet(portal) or _ends_soon(shown, now)):
        return
    portal.memory.broker_restart_at = now
    _announce_restart(portal, shown.not_valid_after_utc)
    if settings.broker_restart:
        portal.reconciler.restarts.restart(RestartReason.CERTIFICATE)


def _is_quiet(portal: Portal) -> bool:
    """Return whether the broker has been told nothing new for a while."""
    state = _state(portal)
    since = timedelta.max if state.applied_at is None else abs(portal.clock() - state.applied_at)
    return state.applied_generation == state.generation and since >= QUIET


def _ends_soon(certificate: x509.Certificate, now: datetime) -> bool:
    """Return whether a sixth of its life is left: half of what is left when its successor is made.

    Or whether it is not valid at all: before its time, too, as after the clock was moved back.
    """
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return not begins <= now < ends - (ends - begins) / 6


def _announce_restart(portal: Portal, ends: datetime) -> None:
    """Say in the log and by an event, once for each certificate, that the broker is restarted, or has to be."""
    by_portal = bool(portal.settings.broker_restart)
    with portal.database.transaction() as tx:
        now, once = portal.clock(), f"{ends.isoformat()} {by_portal}"
        events.record(
            tx,
            portal.first_tenant,
            EventType.BROKER_RESTART,
            None,
            at=now,
            once=once,
            certificate_ends_at=ends,
            by_portal=by_portal,
        )
        if by_portal:
            audit.record(tx, audit.system_actor(portal.first_tenant), "broker:restart", "broker", at=now)
    if by_portal:
        log.warning("the broker is restarted for its new server certificate", extra={"old_one_ends": ends.isoformat()})
    else:
        log.error(
            "restart the broker at a quiet time, for its new server certificate", extra={"before": ends.isoformat()}
        )


def sign_audit_record(portal: Portal) -> None:
    """Sign a checkpoint of each tenant's audit record if one is due and the record continues the one before."""
    problems = portal.audit_logs.sign_due()
    for tenant_id, problem in problems.items():
        if problem != portal.memory.audit_problems.get(tenant_id):
            detail = portal.named(tenant_id) | {"problem": problem}
            log.error("the audit record was changed, and is not signed any more", extra=detail)
    portal.memory.audit_problems = problems


def show_node(portal: Portal) -> None:
    """Record that this node works, and take over the files that others have given or destroyed."""
    if portal.node is None:
        return
    portal.shared_files.fetch_all()
    own = portal.authority.servers.issuer.name
    if portal.memory.own_issuer != own:  # which a CA may wait for that is to retire
        with contextlib.suppress(StateConflict, BrokerUnavailable):
            renew_certificates(portal)
            check_broker_certificate(portal, own)
            portal.memory.own_issuer = own
    with portal.database.transaction(durable=False) as tx:
        nodes.sign_of_life(tx, portal.node.id, version=VERSION, own_issuer=portal.memory.own_issuer)


# --- Events ----------------------------------------------------------------------------------------------------------


def announce_expiring(portal: Portal) -> None:
    """Announce each certificate past two thirds of its lifetime once, in the log and as an event."""
    more = True
    while more:
        now = portal.clock()
        with portal.database.snapshot() as tx:
            found = certificates.renewals_to_announce(tx, now=now, limit=EVENTS_BATCH)
        if not found:
            return
        with portal.database.transaction() as tx:
            for one in found:
                events.record(
                    tx,
                    one.tenant_id,
                    EventType.EXPIRING,
                    one.device_id,
                    kind=one.kind,
                    at=now,
                    name=one.name,
                    serial_number=one.serial_number,
                    expires_at=one.not_after,
                )
            certificates.mark_announced(tx, found, at=now)
        for one in found:
            detail = {f"{one.kind}_id": one.device_id, "expires_at": one.not_after.isoformat()}
            log.warning("a certificate should be renewed", extra=detail)
        more = len(found) == EVENTS_BATCH


def prune_events(portal: Portal) -> None:
    """Delete events that were delivered or given up ``PORTAL_EVENT_DAYS`` ago."""
    if not events.has_subscribers(portal.database.engine):
        return
    before = portal.clock() - timedelta(days=portal.settings.event_days)
    with portal.database.snapshot() as tx:
        pruned = EVENTS_BATCH if webhooks.anything_to_prune(tx, before=before) else 0
    while pruned == EVENTS_BATCH:
        with portal.database.transaction() as tx:
            pruned = webhooks.prune(tx, before=before, limit=EVENTS_BATCH)


def prune_logins(portal: Portal) -> None:
    """Delete the tokens of people whose logins ended long ago; the audit record has them for ever."""
    before = portal.clock() - LOGINS_KEPT
    with portal.database.transaction() as tx:
        tenants.prune_logins(tx, before=before)


def ask_provider(portal: Portal) -> None:
    """Ask the identity provider, if there is one, so that the log says early that nobody can log in."""
    if portal.sign_on is not None:
        portal.sign_on.provider.look()


# --- When they run, and in which process -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """A function of the portal to call every ``seconds``; ``final`` if its effect cannot be undone.

    Each node does it with its own broker and files, but for those ``of_all``, which one node does for all.
    """

    name: str
    seconds: float
    run: Callable[[Portal], object]
    final: bool = False
    of_all: bool = False


# In this order if several are due. After the clock was moved the probe certificates come before the CRLs: a current CRL
# makes the portal ready, and expired probe certificates would prove nothing.
JOBS = (
    Job("certificate renewal", 600.0, renew_certificates),
    Job("certificates of other issuers", 60.0, take_outside_certificates),
    Job("repair", 2.0, repair_broker),
    Job("lists of CAs", 10.0, write_lists_of_cas),
    Job("late sessions", 5.0, disconnect_again),
    Job("expiry", 30.0, expire, final=True, of_all=True),
    Job("node", nodes.SIGN_SECONDS, show_node),
    Job("write-ahead log", 30.0, lambda portal: portal.database.empty_log()),
    Job("probe", 60.0, probe_broker),
    Job("failed probe", 2.0, probe_again),
    Job("CRLs put off", 2.0, lambda portal: portal.reconciler.crls.wake_if_due()),
    Job("refusals", 60.0, lambda portal: portal.operators.record_the_rest(portal.first_tenant)),
    Job("responder renewal", 60.0, lambda portal: portal.responder.certificates.renew()),
    Job("reappraisal", 2.0, lambda portal: portal.reappraisals.run(), of_all=True),
    Job("crl renewal", 300.0, renew_crls, of_all=True),
    Job("retirement of CAs", 3600.0, retire_unneeded, final=True, of_all=True),
    Job("audit checkpoints", 60.0, sign_audit_record),
    Job("certificates that end", 600.0, announce_expiring, of_all=True),
    Job("logins that ended", 3600.0, prune_logins, final=True, of_all=True),
    Job("removed tenants", 10.0, lambda portal: portal.tenant_removals.run(), final=True, of_all=True),
)
# Of the node, and of the installation, where several nodes share it; on SQLite one thread does both.
OF_NODE, OF_ALL = tuple(job for job in JOBS if not job.of_all), tuple(job for job in JOBS if job.of_all)
# Each in a thread and under a lock of its own, so that it waits for no other job, and none for it.
FOLLOW_PRESENCE = (Job("presence", 2.0, lambda portal: portal.follower.follow()),)
SEND_MAIL = (Job("mail", 20.0, lambda portal: portal.mail.send_due()),)
ASK_PROVIDER = (Job("identity provider", 300.0, ask_provider),)


def start(portal: Portal) -> threading.Event:
    """Start the threads of this process that grant, publish CRLs, run the jobs, follow presence, send events and mail.

    Setting the event stops them.
    """
    stopping = threading.Event()
    bodies: dict[str, Callable[[threading.Event], None]] = {
        "grants": portal.reconciler.run_requested,
        "crls": portal.reconciler.crls.run_requested,
        "jobs": functools.partial(run, portal, jobs=JOBS if portal.database.is_sqlite else OF_NODE),
        "presence": functools.partial(run, portal, jobs=FOLLOW_PRESENCE, lock=FOLLOWER_LOCK),
        "events": portal.dispatcher.run,
    }
    if not portal.database.is_sqlite:
        bodies["other nodes"] = functools.partial(listen, portal.database, functools.partial(_heard, portal))
        bodies["installation's jobs"] = functools.partial(run, portal, jobs=OF_ALL, lock=INSTALLATION_LOCK)
    if portal.settings.mail_server is not None:
        bodies["mail"] = functools.partial(run, portal, jobs=SEND_MAIL, lock=MAIL_LOCK)
    if portal.sign_on is not None:
        bodies["identity provider"] = functools.partial(run, portal, jobs=ASK_PROVIDER, lock=PROVIDER_LOCK)
    for name, body in bodies.items():
        threading.Thread(target=body, args=(stopping,), name=name, daemon=True).start()
    return stopping


def _heard(portal: Portal, waits: bool) -> None:
    """Look for what another process has told; a request ``waits`` for it, or not."""
    portal.database.advances.heard()
    portal.reconciler.look(at_once=waits)


def run(portal: Portal, stopping: threading.Event, jobs: tuple[Job, ...] = JOBS, lock: str = LEADER_LOCK) -> None:
    """Run the jobs until ``stopping`` is set, in one process among all of the node; the body of a thread.

    Those of the installation, by their lock, are run in one process among all of all nodes.

    When the process that runs them, and holds the ``lock``, dies, another takes over within a few seconds; while it is
    stopped or hangs, another runs them beside it.
    """
    leadership = leadership_of(
        portal.database, portal.settings.data_dir, lock, of_all=lock in (MAIL_LOCK, INSTALLATION_LOCK)
    )
    while not stopping.is_set():
        try:
            with leadership.try_lead() as leading:
                if leading:
                    lead(portal, stopping, jobs, leadership.goes_on)
            # Twice, because a clock that was moved makes the last sign of life look old.
            if not leading and leadership.is_silent() and not stopping.wait(2.5) and leadership.is_silent():
                with leadership.try_stand_in() as standing_in:
                    if standing_in:
                        log.error("the process that runs the jobs does not respond; this process runs them")
                        lead(portal, stopping, jobs, leadership.is_silent)
        except (PortalError, OSError) as error:
            log.error("no job can run", extra={"problem": str(error)})
        stopping.wait(2.0)


def lead(portal: Portal, stopping: threading.Event, jobs: tuple[Job, ...], goes_on: Callable[[], bool]) -> None:
    """Run the jobs until ``stopping`` is set or ``goes_on()``, called between them, is false."""
    next_at = {job.name: time.monotonic() for job in jobs}
    seen = _ClockSeen(portal)
    leading = goes_on()
    while leading and not stopping.is_set():
        if seen.was_moved():
            log.warning("the clock was moved; every job with a date runs now")
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
    """The clock by which the jobs last ran, in this process or in one that replaced it for a while.

    Kept in a file: if this process sleeps while the clock is moved and moved back, and another one runs the jobs in
    between, the certificates and CRLs are of the other clock. The content has a fixed length, so that overwriting it
    needs no space on the disk.
    """

    def __init__(self, portal: Portal) -> None:
        self._portal = portal
        self._file = portal.settings.data_dir / CLOCK_SEEN
        self._behind = self._now()

    def was_moved(self) -> bool:
        """Return whether the clock was moved since the jobs last ran, and remember the current one."""
        behind, kept = self._now(), self._kept()
        moved = any(abs(behind - last) > CLOCK_MOVED_SECONDS for last in (self._behind, kept) if last is not None)
        if moved or kept is None:
            self._behind = behind
            self._keep(behind)
        return moved

    def _now(self) -> float:
        """Return a number of seconds that changes only when the clock is moved, by as much."""
        return time.monotonic() - self._portal.clock().timestamp()

    def _kept(self) -> float | None:
        """Return the number written since the machine booted, or ``None``."""
        with contextlib.suppress(OSError, ValueError):
            boot, behind = self._file.read_text(encoding="ascii").split()
            return float(behind) if boot == boot_id() else None
        return None

    def _keep(self, behind: float) -> None:
        with contextlib.suppress(OSError):
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, f"{boot_id():36} {behind:24.3f}\n".encode(), 0)
            finally:
                os.close(descriptor)
