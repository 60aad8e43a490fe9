"""Looks after the CAs over the years: renews their CRLs, rolls issuance over to a new CA, retires unused ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import db
from core.errors import BrokerUnavailable, LockUnavailable, StateConflict, TokenUnavailable
from core.files import FileLock, replace_file
from core.states import IssuerKind
from operations.monitoring import ROOT_CRL_SOON
from operations.wiring import Portal
from store import audit, generations
from store import issuers as store_issuers
from store.audit import Actor
from workflows.authority import rollover
from workflows.authority.issuers import ROOT_CRL_DAYS, RecordedIssuer, RevokedEntries, crl_is_due, next_crl

log = logging.getLogger("portal.jobs")

LOG_AGAIN_AFTER = timedelta(hours=12)
JUST_MOVED = timedelta(days=1)

# --- CRLs ---------------------------------------------------------------------------------------------------------


def renew_crls(portal: Portal) -> None:
    """Renew the CRLs past half of their lifetime, and those not yet valid because the clock was moved.

    The root's needs the root's key in the CA folder; a retired CA's is renewed until its certificate expires.
    """
    now = portal.clock()
    with portal.database.snapshot() as tx:
        changed_at = {record.id: record.revoked_generation for record in store_issuers.list_issuers(tx, retired=True)}
        due = [
            recorded
            for recorded in portal.authority.seen_by(tx).issuers
            if crl_is_due(store_issuers.get_crl_head(tx, recorded.id), changed_at=changed_at[recorded.id], now=now)
        ]
    for recorded in due:
        if recorded.kind == IssuerKind.ROOT:
            root = portal.authority.root_with_key()
            if root is None or not _sign_roots_crl(portal, root, now):
                _log_that_it_ends(portal, recorded, now)
        elif recorded.retired and recorded.issuer.key is not None and now < recorded.issuer.not_after:
            _sign_crl(portal, recorded, portal.settings.crl_days, now)
    if any(recorded.kind == IssuerKind.ISSUING and not recorded.retired for recorded in due):
        advance(portal, "broker:renew", renewed=["crl"])
        _apply(portal)  # its reconciliation signs the CRL


def _sign_roots_crl(portal: Portal, root: RecordedIssuer, now: datetime) -> bool:
    """Sign the root's CRL, unless its token is kept elsewhere."""
    try:
        _sign_crl(portal, root, ROOT_CRL_DAYS, now)
    except TokenUnavailable:
        return False
    return True


def _sign_crl(portal: Portal, recorded: RecordedIssuer, days: int, now: datetime) -> None:
    """Sign a CRL before there is a transaction: a token may take its time."""
    with portal.database.snapshot() as tx:
        crl = next_crl(
            tx,
            recorded.id,
            recorded.issuer,
            store_issuers.get_crl_head(tx, recorded.id),
            RevokedEntries(),
            days=days,
            generation=generations.get_broker_state(tx, portal.tenant_id).generation,
            now=now,
        )
    with portal.database.transaction() as tx:
        store_issuers.put_crl(tx, portal.tenant_id, crl)  # nothing, if another process was faster


def _log_that_it_ends(portal: Portal, root: RecordedIssuer, now: datetime) -> None:
    with portal.database.snapshot() as tx:
        crl = store_issuers.get_crl_head(tx, root.id)
    logged_at = portal.memory.root_crl_logged_at
    if crl is None or crl.next_update - now > ROOT_CRL_SOON:
        return
    if logged_at is not None and abs(now - logged_at) < LOG_AGAIN_AFTER:
        return
    portal.memory.root_crl_logged_at = now
    log.error(
        "the root's CRL expires soon and the root's key is not here; put it back until the CRL is renewed",
        extra={"ends": crl.next_update.isoformat(), "folder": str(portal.settings.ca_dir)},
    )


# --- The portal's own certificates --------------------------------------------------------------------------------


def renew_certificates(portal: Portal) -> None:
    """Renew the portal's own certificates past two thirds of their lifetime, or of a CA that issues no more."""
    with FileLock(portal.settings.data_dir / ".renewal.lock").hold():
        renewed = portal.own_certificates.renew(served=True)
        if renewed:
            advance(portal, "broker:renew", renewed=renewed)
            _apply(portal)


# --- Rollover and retirement -------------------------------------------------------------------------------------


def roll_over(portal: Portal, actor: Actor, say: Callable[[str], None], *, again: bool = False) -> str:
    """Create the next issuing CA, make it trusted, let it issue; return its name. Continues an interrupted rollover.

    Each step waits for the one before: the CA is in the portal's and the broker's files with its CRL before it issues
    a certificate, and the portal's own certificates are renewed last. ``say`` is called with a sentence for each.
    Raise ``StateConflict`` if the last rollover was within a day (unless ``again``), ``CaKeyUnavailable`` without the
    root's key, ``BrokerUnavailable`` if the broker does not load the new CA.
    """
    with FileLock(portal.settings.data_dir / ".rollover.lock").try_hold() as free:
        if not free:
            raise LockUnavailable("Another rollover is running; wait for its end.")
        return _roll_over(portal, actor, say, again=again)


def _roll_over(portal: Portal, actor: Actor, say: Callable[[str], None], *, again: bool) -> str:
    moved_at = _last_move(portal)
    if not again and moved_at is not None and portal.clock() - moved_at < JUST_MOVED:
        renew_certificates(portal)  # the last step of an interrupted rollover
        raise StateConflict(
            f"Issuance moved at {moved_at:%Y-%m-%d %H:%M} UTC and the rollover is complete;"
            " use --again for one more CA."
        )
    name, generation = rollover.prepare_next(
        portal.database, portal.authority, portal.keys, portal.settings, actor, now=portal.clock()
    )
    say(f"{name} is created.")
    write_ca_file(portal)
    outcome = portal.reconciler.apply(generation, timeout=portal.settings.enforce_timeout)
    if not outcome.covers(generation) and (
        outcome.installed < generation or portal.reconciler.broker_answers()
    ):  # a broker that is not running reads the files at its start
        raise BrokerUnavailable(
            f"{name} is created and trusted by the portal, but not by the broker yet, so the previous CA keeps issuing."
            f" Correct this, then run the command again: {outcome.problem}"
        )
    say(f"{name} is trusted by the portal and the broker.")
    portal.responder.certificates.renew()
    rollover.move_to(portal.database, actor, name, now=portal.clock())
    with portal.database.snapshot() as tx:
        portal.authority.seen_by(tx)
    say(f"{name} issues.")
    renew_certificates(portal)
    say("The portal and the broker have certificates of the new CA.")
    return name


def write_ca_file(portal: Portal) -> None:
    """Write the CAs that clients must trust to ``ca.pem``."""
    with portal.database.snapshot() as tx:
        ca_pem = portal.authority.seen_by(tx).ca_pem
    path = portal.settings.data_dir / "ca.pem"
    if not path.exists() or path.read_text() != ca_pem:
        replace_file(path, ca_pem.encode(), mode=0o644)


def _last_move(portal: Portal) -> datetime | None:
    """Return when issuance last moved to another CA; ``None`` if it never did, or if a rollover is incomplete."""
    with portal.database.snapshot() as tx:
        issuing = [record for record in store_issuers.list_issuers(tx) if record.kind == IssuerKind.ISSUING]
    return issuing[-1].issuing_since if len(issuing) > 1 else None


def retire(portal: Portal, actor: Actor, name: str) -> None:
    """Remove a CA without valid device certificates from those that the portal and the broker trust.

    Raise ``StateConflict`` if a device still has a valid certificate of it.
    """
    renew_certificates(portal)
    rollover.retire(portal.database, portal.authority, actor, name, now=portal.clock())
    write_ca_file(portal)
    _apply(portal)


def retire_unneeded(portal: Portal) -> None:
    """Retire the CAs that issue no more and have no valid device certificate."""
    now = portal.clock()
    with portal.database.snapshot() as tx:
        issuers = portal.authority.seen_by(tx)
        older = [recorded for recorded in issuers.with_crl() if recorded.id < issuers.issuing.id]
        unneeded = [recorded.issuer.name for recorded in older if not rollover.is_in_use(tx, recorded.id, now=now)]
    moved_at = _last_move(portal)
    if unneeded and moved_at is not None and now - moved_at >= rollover.MIN_TIME_SINCE_MOVE:
        for name in unneeded:
            retire(portal, audit.system_actor(portal.tenant_id), name)
            log.info("a CA was retired", extra={"issuer": name})


# --- Shared -------------------------------------------------------------------------------------------------------


def advance(portal: Portal, action: str, **detail: Any) -> None:
    """Advance the generation because of a change of the portal's own, with an audit entry."""
    now = portal.clock()
    with portal.database.transaction() as tx:
        generation = db.next_generation(tx, portal.tenant_id, at=now)
        audit.record(
            tx, audit.system_actor(portal.tenant_id), action, "broker", at=now, generation=generation, **detail
        )


def _apply(portal: Portal) -> None:
    with portal.database.snapshot() as tx:
        state = generations.get_broker_state(tx, portal.tenant_id)
    portal.reconciler.apply(state.generation, timeout=portal.settings.enforce_timeout)
