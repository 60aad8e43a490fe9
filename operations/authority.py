"""Looks after the CAs over the years: renews their CRLs, rolls issuance over to a new CA, retires unused ones."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import db
from broker.folder import SERVER_CERTIFICATE_FILE
from core.errors import (
    BrokerUnavailable,
    CaKeyUnavailable,
    IssuerUnusable,
    LockUnavailable,
    StateConflict,
    TokenUnavailable,
)
from core.failpoints import failpoint
from core.files import LOOK_SECONDS, FileLock, is_owned
from core.server_command import server_command
from core.states import IssuerKind
from operations import data_folder
from operations.monitoring import ROOT_CRL_SOON
from operations.own_certificates import probe_certificates
from operations.wiring import Portal, write_trust_anchors
from pki.algorithms import KeyType, check_public_key
from pki.keys.contract import KeyDescription
from store import audit, generations, nodes
from store import issuers as store_issuers
from store.audit import Actor
from workflows.authority import outer, rollover
from workflows.authority.creation import ROOT_CRL_DAYS, create_tenant_issuer
from workflows.authority.crls import RevokedEntries, crl_is_due, next_crl
from workflows.authority.issuers import RecordedIssuer

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
        issuers, states = portal.authority.seen_by(tx).issuers, store_issuers.crl_states(tx)
        # The rows of a tenant that is being removed go while its CAs may still be known.
        due = [one for one in issuers if one.id in states and crl_is_due(states[one.id], now=now)]
    for recorded in due:
        if recorded.kind == IssuerKind.ROOT:
            root = portal.authority.with_root_key(recorded)
            if root is None or not _sign_roots_crl(portal, root, now):
                _log_that_it_ends(portal, recorded, now)
        elif recorded.retired and recorded.issuer.key is not None and now < recorded.issuer.not_after:
            with contextlib.suppress(IssuerUnusable):  # the key of a retired CA may be lost
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
            generation=generations.get_broker_state(tx).generation,
            now=now,
        )
    with portal.database.transaction() as tx:
        store_issuers.put_crl(tx, crl)  # nothing, if another process was faster


def _log_that_it_ends(portal: Portal, root: RecordedIssuer, now: datetime) -> None:
    with portal.database.snapshot() as tx:
        crl = store_issuers.get_crl_head(tx, root.id)
    logged_at = portal.memory.root_crl_logged_at
    if root.retired or crl is None or crl.next_update - now > ROOT_CRL_SOON:
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


def take_outside_certificates(portal: Portal) -> None:
    """Take the server certificates of other issuers into use that have been renewed."""
    with FileLock(portal.settings.data_dir / ".renewal.lock").hold():
        portal.own_certificates.take_outside()


# --- Rollover and retirement -------------------------------------------------------------------------------------


def roll_over(
    portal: Portal, actor: Actor, say: Callable[[str], None], *, again: bool = False, own_root: bool = False
) -> str:
    """Create the next issuing CA of the actor's tenant, make it trusted, let it issue; return its name.

    An interrupted rollover is continued; a tenant that has no CA yet gets its first one.

    Each step waits for the one before: the CA is in the portal's and the broker's files with its CRL before it issues
    a certificate, and the portal's own certificates are renewed last. ``say`` is called with a sentence for each.
    Raise ``StateConflict`` if the last rollover was within a day (unless ``again``), or if a root that is not the
    portal's own has to sign the next CA (unless ``own_root``), ``CaKeyUnavailable`` without the root's key,
    ``BrokerUnavailable`` if the broker does not load the new CA.
    """
    with _alone(portal):
        return _roll_over(portal, actor, say, again=again, own_root=own_root)


@contextlib.contextmanager
def _alone(portal: Portal) -> Iterator[None]:
    """Keep other rollovers, requests and installations away for the body of the ``with``."""
    with portal.database.locks.of(".rollover.lock").try_hold() as free:
        if not free:
            raise LockUnavailable("Another rollover is running; wait for its end.")
        yield


def _roll_over(portal: Portal, actor: Actor, say: Callable[[str], None], *, again: bool, own_root: bool) -> str:
    moved_at = _last_move(portal, actor.tenant_id)
    if not again and moved_at is not None and portal.clock() - moved_at < JUST_MOVED:
        renew_certificates(portal)  # the last step of an interrupted rollover
        raise StateConflict(
            f"Issuance moved at {moved_at:%Y-%m-%d %H:%M} UTC and the rollover is complete;"
            " use --again for one more CA."
        )
    with portal.database.snapshot() as tx:
        is_first = not portal.authority.seen_by(tx).has_issuing(actor.tenant_id)
        is_first = is_first and rollover.waiting_issuer(tx, actor.tenant_id) is None
    if is_first:
        return _create_first(portal, actor, say)
    name, generation = rollover.prepare_next(
        portal.database,
        portal.authority,
        portal.keys,
        portal.settings,
        actor,
        own_root=own_root,
        now=portal.clock(),
    )
    say(f"{name} is created.")
    _make_trusted(portal, name, generation, say)
    _let_issue(portal, actor, name, say)
    return name


def _create_first(portal: Portal, actor: Actor, say: Callable[[str], None]) -> str:
    """Create the first CA of a tenant that could not have one when it was added, such as without the root's key."""
    problem = create_tenant_issuer(
        portal.database, portal.authority, portal.keys, portal.settings, actor, now=portal.clock()
    )
    if problem is not None:
        raise CaKeyUnavailable(problem)
    with portal.database.snapshot() as tx:
        name = portal.authority.seen_by(tx).issuing_of(actor.tenant_id).issuer.name
        generation = generations.get_broker_state(tx).generation
    say(f"{name} is created.")
    _make_trusted(portal, name, generation, say)
    return name


def request_ca(
    portal: Portal, actor: Actor, *, subject: str = "", key_type: KeyType | None = None, another: bool = False
) -> outer.CaRequest:
    """Return the request for the certificate of an issuing CA, which somebody else signs; see ``request_issuing``."""
    with _alone(portal):
        return outer.request_issuing(
            portal.database,
            portal.keys,
            portal.settings,
            actor,
            subject=subject,
            key_type=key_type,
            another=another,
            now=portal.clock(),
        )


def install_ca(portal: Portal, actor: Actor, content: bytes, say: Callable[[str], None], *, later: bool = False) -> str:
    """Take the CA into service whose chain (PEM) answers a request: as in a rollover, but that others have signed it.

    With ``later`` it is trusted only, until a rollover lets it issue. If no device has a certificate of the CAs before
    it, and no portal serves, these retire at once. Raise ``CaChainRefused``, and as ``roll_over`` does.
    """
    with _alone(portal):
        name, generation = outer.add_requested(
            portal.database, portal.authority, portal.keys, portal.settings, actor, content, now=portal.clock()
        )
        say(f"{name} is installed.")
        _make_trusted(portal, name, generation, say)
        if not later:
            _let_issue(portal, actor, name, say)
            serves = is_owned(portal.settings.data_dir / data_folder.SERVING_LOCK) or nodes.others_work(portal.database)
            if not serves:
                _retire_at_once(portal, actor, say)
    return name


def _make_trusted(portal: Portal, name: str, generation: int, say: Callable[[str], None]) -> None:
    write_ca_file(portal)
    outcome = portal.reconciler.apply_everywhere(generation, timeout=portal.settings.enforce_timeout)
    if not outcome.covers(generation) and (
        outcome.installed < generation or portal.reconciler.broker_answers() or not portal.settings.has_broker
    ):  # the portal's broker, if it is not running, reads the files at its start
        raise BrokerUnavailable(
            f"{name} is created and trusted by the portal, but not by the broker yet, so the previous CA keeps issuing."
            f" Correct this, then run the command again: {outcome.problem}"
        )
    say(f"{name} is trusted by the portal and the broker.")


def _let_issue(portal: Portal, actor: Actor, name: str, say: Callable[[str], None]) -> None:
    portal.responder.certificates.renew()
    rollover.move_to(portal.database, portal.authority, actor, name, now=portal.clock())
    with portal.database.snapshot() as tx:
        servers = portal.authority.seen_by(tx).servers.issuer.name
    say(f"{name} issues.")
    if actor.tenant_id != portal.first_tenant:
        return
    renew_certificates(portal)
    if servers == name:
        say("The portal and the broker have certificates of the new CA.")
    else:
        say(
            f"The portal and the broker keep certificates of {servers}, because devices trust its root alone; they get"
            f" certificates of {name} once no device has one of {servers} any more."
        )


def _retire_at_once(portal: Portal, actor: Actor, say: Callable[[str], None]) -> None:
    """Retire the CAs of which no device has a certificate, while no portal serves that could issue by them."""
    for name in _unneeded(portal, actor.tenant_id):
        try:
            retire(portal, actor, name, alone=True)
        except StateConflict as error:
            say(error.detail)
        else:
            say(f"{name} is retired: no device has a certificate of it.")


def write_ca_file(portal: Portal) -> None:
    """Write the CAs of all tenants to ``ca.pem``."""
    with portal.database.snapshot() as tx:
        content = portal.authority.seen_by(tx).broker_ca
    write_trust_anchors(portal.settings, content)


def _last_move(portal: Portal, tenant_id: str) -> datetime | None:
    """Return when issuance last moved to another CA; ``None`` if it never did, or if a rollover is incomplete."""
    with portal.database.snapshot() as tx:
        records = store_issuers.list_issuers(tx, tenant_id=tenant_id)
    issuing = [record for record in records if record.kind == IssuerKind.ISSUING]
    return issuing[-1].issuing_since if len(issuing) > 1 else None


def retire(portal: Portal, actor: Actor, name: str, *, alone: bool = False) -> None:
    """Remove a CA of the actor's tenant without valid device certificates from those that portal and broker trust.

    The portal's own root goes with the last CA below it. Raise ``StateConflict`` if a device still has a valid
    certificate of it, within an hour of the last move of issuance (unless no portal serves and this one is ``alone``),
    or while the broker shows a certificate of it that devices without that root could not verify; ``BrokerUnavailable``
    if the broker does not say.
    """
    other_root = rollover.move_servers(portal.database, portal.authority, actor, name, alone=alone, now=portal.clock())
    with portal.database.snapshot() as tx:
        portal.authority.seen_by(tx)  # at once, or the certificates would be of the CA that is to retire
    renew_certificates(portal)
    if other_root:
        check_broker_certificate(portal, name)
        _check_other_nodes(portal, name)
        _wait_for_workers(portal)
    rollover.retire(portal.database, portal.authority, actor, name, alone=alone, now=portal.clock())
    write_ca_file(portal)
    _apply(portal)


def check_broker_certificate(portal: Portal, name: str) -> None:
    """Raise ``StateConflict`` while the running broker shows an older certificate than the one in its folder."""
    if not portal.settings.has_broker or portal.broker.is_stopped():
        return  # it reads the newest one at its start
    deadline = time.monotonic() + portal.settings.enforce_timeout
    shown = portal.broker.server_certificate(probe_certificates(portal.settings), deadline)
    newest = x509.load_pem_x509_certificate(portal.settings.broker_file(SERVER_CERTIFICATE_FILE).read_bytes())
    if shown != newest.public_bytes(Encoding.DER):
        raise StateConflict(
            f"The broker still shows a certificate below the root of {name}; restart it for its new one (with"
            f" PORTAL_BROKER_RESTART the portal does, at a quiet moment). Then {name} can retire."
        )


def _check_other_nodes(portal: Portal, name: str) -> None:
    """Raise ``StateConflict`` while another node may show a certificate below the root that is about to go."""
    if portal.node is None:
        return
    with portal.database.snapshot() as tx:
        newest = portal.authority.seen_by(tx).servers.issuer.name
        late = [one.name for one in nodes.list_nodes(tx) if one.id != portal.node.id and one.own_issuer != newest]
    if late:
        raise StateConflict(
            f"The nodes {', '.join(late)} may still show certificates below the root of {name}; while they work they"
            f" get new ones within minutes. Then {name} can retire."
        )


def _wait_for_workers(portal: Portal) -> None:
    """Wait until no worker shows an older certificate than the newest: clients are about to lose the root of that."""
    with contextlib.suppress(FileNotFoundError):  # no portal has served here yet
        age = time.time() - (portal.settings.tls_dir / "server.pem").stat().st_mtime
        time.sleep(min(max(LOOK_SECONDS - age, 0.0), LOOK_SECONDS))


def retire_unneeded(portal: Portal) -> None:
    """Retire the CAs that issue no more and have no valid device certificate."""
    for tenant_id in portal.authority.current.tenants_with_older():
        moved_at = _last_move(portal, tenant_id)
        if moved_at is None or portal.clock() - moved_at < rollover.MIN_TIME_SINCE_MOVE:
            continue
        for name in _unneeded(portal, tenant_id):
            try:
                retire(portal, audit.system_actor(tenant_id), name)
            except (StateConflict, BrokerUnavailable) as error:
                log.warning("a CA cannot retire yet", extra={"issuer": name, "because": error.detail})
            else:
                log.info("a CA was retired", extra={"issuer": name})


def _unneeded(portal: Portal, tenant_id: str) -> list[str]:
    """Return the names of a tenant's CAs before the one that issues of which no device has a valid certificate."""
    now = portal.clock()
    with portal.database.snapshot() as tx:
        issuers = portal.authority.seen_by(tx)
        own = [one for one in issuers.with_crl() if one.tenant_id == tenant_id]
        older = [recorded for recorded in own if recorded.id < issuers.issuing_of(tenant_id).id]
        return [recorded.issuer.name for recorded in older if not rollover.is_in_use(tx, recorded.id, now=now)]


# --- Keys ---------------------------------------------------------------------------------------------------------


def move_key(portal: Portal, actor: Actor, name: str) -> tuple[KeyDescription, Path]:
    """Bring a CA's key from its file into a token; return where it is, and the file that was set aside.

    A move that was cut off is continued. Raise ``StateConflict`` if there is no such CA, ``CaKeyUnavailable`` if its
    key cannot be moved, ``TokenUnavailable``.
    """
    with _alone(portal):
        with portal.database.snapshot() as tx:
            issuers = {record.name: record for record in store_issuers.list_issuers(tx, retired=True)}
        if name not in issuers:
            raise StateConflict(f"There is no CA {name}; list them with: {server_command('ca keys')}")
        public_key = check_public_key(x509.load_der_x509_certificate(issuers[name].der).public_key())
        described = portal.keys.copy_into_token(name, public_key)
        with portal.database.transaction() as tx:
            audit.record(tx, actor, "ca:move", f"issuer:{name}", at=portal.clock(), place=described.place)
        failpoint("move.recorded")
        return described, portal.keys.files.set_aside(name)


# --- Shared -------------------------------------------------------------------------------------------------------


def advance(portal: Portal, action: str, **detail: Any) -> None:
    """Advance the generation because of a change of the portal's own, with an audit entry."""
    now = portal.clock()
    with portal.database.transaction() as tx:
        generation = db.next_generation(tx, at=now)
        audit.record(
            tx, audit.system_actor(portal.first_tenant), action, "broker", at=now, generation=generation, **detail
        )


def _apply(portal: Portal) -> None:
    with portal.database.snapshot() as tx:
        state = generations.get_broker_state(tx)
    portal.reconciler.apply(state.generation, timeout=portal.settings.enforce_timeout)
