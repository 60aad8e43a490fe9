"""What is done about the CAs over the years: their CRLs, one following another, the end of those that nobody needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import db
from core.errors import BrokerUnavailable, LockUnavailable, StateConflict
from core.files import FileLock, replace_file
from core.states import IssuerKind
from operations.readiness import ROOT_CRL_SOON
from operations.wiring import Portal
from store import generations
from store import issuers as store_issuers
from workflows import audit
from workflows.audit import Actor
from workflows.authority import rollover
from workflows.authority.crls import ROOT_CRL_DAYS, RevokedEntries, crl_is_due, next_crl
from workflows.authority.issuers import RecordedIssuer

log = logging.getLogger("portal.jobs")

SAID_AGAIN = timedelta(hours=12)
JUST_MOVED = timedelta(days=1)

# By data folder: when it was last said that the root's CRL will end.
_said: dict[Path, datetime] = {}


# --- CRLs ---------------------------------------------------------------------------------------------------------


def renew_crls(portal: Portal) -> None:
    """Renew CRLs past half their life, or not yet valid because the clock was moved.

    That of the root only while its key is here, that of a retired CA as long as its certificate lasts.
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
            if root is None:
                _say_that_it_ends(portal, recorded, now)
            else:
                _sign_crl(portal, root, ROOT_CRL_DAYS, now)
        elif recorded.retired and recorded.issuer.key is not None and now < recorded.issuer.not_after:
            _sign_crl(portal, recorded, portal.settings.crl_days, now)
    if any(recorded.kind == IssuerKind.ISSUING and not recorded.retired for recorded in due):
        advance(portal, "broker:renew", renewed=["crl"])
        _apply(portal)  # its pass signs the CRL


def _sign_crl(portal: Portal, recorded: RecordedIssuer, days: int, now: datetime) -> None:
    with portal.database.transaction() as tx:
        state = generations.get_broker_state(tx, portal.tenant_id)
        crl = next_crl(
            tx,
            recorded.id,
            recorded.issuer,
            store_issuers.get_crl_head(tx, recorded.id),
            RevokedEntries(),
            days=days,
            generation=state.generation,
            now=now,
        )
        store_issuers.put_crl(tx, portal.tenant_id, crl)


def _say_that_it_ends(portal: Portal, root: RecordedIssuer, now: datetime) -> None:
    with portal.database.snapshot() as tx:
        crl = store_issuers.get_crl_head(tx, root.id)
    said = _said.get(portal.settings.data_dir)
    if crl is None or crl.next_update - now > ROOT_CRL_SOON or (said is not None and abs(now - said) < SAID_AGAIN):
        return
    _said[portal.settings.data_dir] = now
    log.error(
        "the root's CRL ends soon and its key is not here; bring the key back for as long as it takes to sign another",
        extra={"ends": crl.next_update.isoformat(), "folder": str(portal.settings.ca_dir)},
    )


# --- The portal's own certificates --------------------------------------------------------------------------------


def renew_certificates(portal: Portal) -> None:
    """Renew the portal's own certificates past two thirds of their life, or of a CA that issues no more."""
    with FileLock(portal.settings.data_dir / ".renewal.lock").hold():
        renewed = portal.own_certificates.renew(served=True)
        if renewed:
            advance(portal, "broker:renew", renewed=renewed)
            _apply(portal)


# --- One CA following another -------------------------------------------------------------------------------------


def roll_over(portal: Portal, actor: Actor, say: Callable[[str], None], *, again: bool = False) -> str:
    """Make the next issuing CA, have it trusted, let it issue; returns its name. What was cut off is gone on with.

    Each step is done when the one before holds: the CA is in the portal's and the broker's files with its CRL before
    it certifies anybody, and the portal's own certificates follow last. ``say`` is told of each. Raises
    ``StateConflict`` where the last rollover is younger than a day (unless ``again``), ``CaKeyUnavailable`` where the
    root's key is not here, ``BrokerUnavailable`` where the broker does not take the new CA.
    """
    with FileLock(portal.settings.data_dir / ".rollover.lock").try_hold() as free:
        if not free:
            raise LockUnavailable("Another rollover is under way; wait for its end.")
        return _roll_over(portal, actor, say, again=again)


def _roll_over(portal: Portal, actor: Actor, say: Callable[[str], None], *, again: bool) -> str:
    moved_at = _last_move(portal)
    if not again and moved_at is not None and portal.clock() - moved_at < JUST_MOVED:
        renew_certificates(portal)  # what a rollover that was cut off at its end has left
        raise StateConflict(
            f"Issuance moved at {moved_at:%Y-%m-%d %H:%M} UTC, and all is done; --again makes one more CA."
        )
    name, generation = rollover.prepare_next(
        portal.database, portal.authority, portal.keys, portal.settings, actor, now=portal.clock()
    )
    say(f"{name} is made.")
    write_ca_file(portal)
    outcome = portal.enforcement.apply(generation, timeout=portal.settings.enforce_timeout)
    if not outcome.covers(generation) and (
        outcome.installed < generation or portal.enforcement.broker_answers()
    ):  # a broker that is not running reads the files at its start
        raise BrokerUnavailable(
            f"{name} is made and trusted here, but not by the broker yet, so the CA before it goes on issuing."
            f" See to this, then run the command again: {outcome.problem}"
        )
    say(f"{name} is trusted, by the broker too.")
    portal.responder.certificates.renew()
    rollover.move_to(portal.database, actor, name, now=portal.clock())
    with portal.database.snapshot() as tx:
        portal.authority.seen_by(tx)
    say(f"{name} issues.")
    renew_certificates(portal)
    say("The portal's and the broker's certificates are of the new CA.")
    return name


def write_ca_file(portal: Portal) -> None:
    """Bring the file of what clients trust to what the database says now."""
    with portal.database.snapshot() as tx:
        ca_pem = portal.authority.seen_by(tx).ca_pem
    path = portal.settings.data_dir / "ca.pem"
    if not path.exists() or path.read_text() != ca_pem:
        replace_file(path, ca_pem.encode(), mode=0o644)


def _last_move(portal: Portal) -> datetime | None:
    """When issuance last moved from one CA to another; ``None`` where it never did, or has begun to again."""
    with portal.database.snapshot() as tx:
        issuing = [record for record in store_issuers.list_issuers(tx) if record.kind == IssuerKind.ISSUING]
    return issuing[-1].issuing_since if len(issuing) > 1 else None


def retire(portal: Portal, actor: Actor, name: str) -> None:
    """Take a CA that nobody needs any more from what the portal and the broker trust.

    Raises ``StateConflict`` where somebody does.
    """
    renew_certificates(portal)
    rollover.retire(portal.database, portal.authority, actor, name, now=portal.clock())
    write_ca_file(portal)
    _apply(portal)


def retire_unneeded(portal: Portal) -> None:
    """Retire the CAs that issued once and have no good certificate left."""
    now = portal.clock()
    with portal.database.snapshot() as tx:
        issuers = portal.authority.seen_by(tx)
        older = [recorded for recorded in issuers.with_crl() if recorded.id < issuers.issuing.id]
        unneeded = [recorded.issuer.name for recorded in older if not rollover.is_in_use(tx, recorded.id, now=now)]
    moved_at = _last_move(portal)
    if unneeded and moved_at is not None and now - moved_at >= rollover.LEAST_TIME_MOVED:
        for name in unneeded:
            retire(portal, audit.system_actor(portal.tenant_id), name)
            log.info("a CA has retired", extra={"issuer": name})


# --- Shared -------------------------------------------------------------------------------------------------------


def advance(portal: Portal, action: str, **detail: Any) -> None:
    """Advance the generation because of something that the portal did by itself, and record that."""
    now = portal.clock()
    with portal.database.transaction() as tx:
        generation = db.next_generation(tx, portal.tenant_id, at=now)
        audit.record(
            tx, audit.system_actor(portal.tenant_id), action, "broker", at=now, generation=generation, **detail
        )


def _apply(portal: Portal) -> None:
    with portal.database.snapshot() as tx:
        state = generations.get_broker_state(tx, portal.tenant_id)
    portal.enforcement.apply(state.generation, timeout=portal.settings.enforce_timeout)
