"""What must happen with nobody asking: repair of the broker's files, renewals, expiry of links."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from operations.jobs import events, schedule
from operations.jobs.authority import advance, renew_certificates, renew_crls, retire_unneeded
from operations.jobs.schedule import Job
from operations.own_certificates import probe_certificates
from operations.wiring import Portal
from store import deliveries, generations
from workflows import audit

log = logging.getLogger("portal.jobs")

# A connection that was half-way in when its device was revoked is dropped by the broker after this time at the
# latest; until then a session may still appear, without any rights, and is cut again.
LATE_SESSIONS = timedelta(seconds=100)


# By data folder: damage that was recorded already, and may outlast many tries to repair it (a disk that is read-only).
_recorded: dict[Path, list[str]] = {}
# By data folder: certificates that were superseded, and whose devices' sessions were cut for the second time.
_cut_again: dict[Path, set[int]] = {}


def repair_broker(portal: Portal) -> None:
    """Put damaged files right and finish what a crash or an absent broker left undone."""
    problems = portal.enforcement.damage()
    state = _state(portal)
    recorded = _recorded.pop(portal.settings.data_dir, [])
    if problems and (problems != recorded or state.applied_generation >= state.generation):
        log.error("the broker's files were damaged; writing them anew", extra={"problem": " ".join(problems)})
        advance(portal, "broker:repair", problems=problems)
        state = _state(portal)
    if problems:
        _recorded[portal.settings.data_dir] = problems
    if state.applied_generation < state.generation:
        portal.enforcement.apply(state.generation, timeout=portal.settings.enforce_timeout)
    if problems:
        probe_broker(portal)  # a broker that read the damaged files may have let anybody in


def _state(portal: Portal) -> generations.BrokerStateRecord:
    with portal.database.snapshot() as tx:
        return generations.get_broker_state(tx, portal.tenant_id)


def renew_responders(portal: Portal) -> None:
    """Renew the certificates that answer OCSP, and make one for a CA that is new."""
    portal.responder.certificates.renew()


def expire(portal: Portal) -> None:
    """End certificates whose overlap is over, destroy bundles whose links are, forget what is kept for a time only."""
    events.prune_events(portal)
    while portal.renewals.end_overlaps(portal.tenant_id):
        pass
    now = portal.clock()
    with portal.database.snapshot() as tx:
        if not deliveries.anything_due(tx, now=now):
            return
    with portal.database.transaction() as tx:
        for tenant_id, device_id, delivery_id in deliveries.expire_deliveries(tx, now=now):
            audit.record(
                tx,
                audit.system_actor(tenant_id),
                "bundle:expire",
                f"device:{device_id}",
                at=now,
                delivery=delivery_id,
            )
        deliveries.forget_answers(tx, now=now)


def record_refusals(portal: Portal) -> None:
    """Sum up in one entry of the audit record the refused logins that were too many to be recorded each."""
    portal.operators.record_the_rest(portal.tenant_id)


def cut_late_sessions(portal: Portal) -> None:
    """Cut sessions of devices that were just put out once more: one may have been half-way in.

    Those of a device that has a newer certificate are cut once, when no more can come from the older one.
    """
    since = portal.clock() - LATE_SESSIONS
    with portal.database.snapshot() as tx:
        late = generations.devices_denied_since(tx, portal.tenant_id, since)
        superseded = dict(generations.superseded_between(tx, portal.tenant_id, since - LATE_SESSIONS, since))
    done = _cut_again.setdefault(portal.settings.data_dir, set())
    done.intersection_update(superseded)
    late += [device_id for certificate_id, device_id in superseded.items() if certificate_id not in done]
    if late and portal.broker.reachable():
        portal.broker.cut_sessions(late, time.monotonic() + portal.settings.enforce_timeout)
        done.update(superseded)


def write_client_authorities(portal: Portal) -> None:
    """Ask TLS clients for certificates of the CAs that are registered now, whoever has changed that and where."""
    portal.clients.write_authorities()


def probe_broker(portal: Portal) -> None:
    """Probe the broker although nothing has changed here: its configuration may have been changed."""
    if portal.broker.reachable():
        portal.broker.probe(probe_certificates(portal.settings), time.monotonic() + portal.settings.enforce_timeout)


# In this order if several are due. After the clock was moved the probe certificates come before the CRLs: a current CRL
# makes the portal ready, and expired probe certificates would prove nothing.
JOBS = (
    Job("certificate renewal", 600.0, renew_certificates),
    Job("repair", 2.0, repair_broker),
    Job("client CAs", 10.0, write_client_authorities),
    Job("late sessions", 20.0, cut_late_sessions),
    Job("expiry", 30.0, expire, final=True),
    Job("probe", 60.0, probe_broker),
    Job("refusals", 60.0, record_refusals),
    Job("responder renewal", 60.0, renew_responders),
    Job("crl renewal", 300.0, renew_crls),
    Job("retirement of CAs", 3600.0, retire_unneeded, final=True),
    Job("certificates that end", 600.0, events.announce_expiring),
)


def run(portal: Portal, stopping: threading.Event, jobs: tuple[Job, ...] = JOBS) -> None:
    """Run the jobs until ``stopping`` is set, in one process among all on the data folder; the body of a thread."""
    schedule.run(portal, stopping, jobs)


def start(portal: Portal) -> threading.Event:
    """Start the threads of this process that grant, run the jobs and send events; setting the event stops them."""
    stopping = threading.Event()
    bodies: dict[str, Callable[[threading.Event], None]] = {
        "grants": portal.enforcement.run_grants,
        "jobs": functools.partial(run, portal),
        "events": portal.dispatcher.run,
    }
    for name, body in bodies.items():
        threading.Thread(target=body, args=(stopping,), name=name, daemon=True).start()
    return stopping
