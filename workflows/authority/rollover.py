"""The steps by which one issuing CA replaces another (rollover)."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta

import sqlalchemy as sa
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy.engine import Connection

import ca
import db
from config import Settings
from core.errors import CaKeyUnavailable, StateConflict
from core.server_command import server_command
from core.states import CertificateStatus, IssuerKind, IssuerStatus
from pki.algorithms import KeyType
from pki.issuers import Issuer, signing_key
from pki.keys.contract import check_that_it_signs
from pki.keys.stores import KeyStores
from pki.outer_chain import encode_above, named
from store import audit, generations
from store import issuers as store_issuers
from store.audit import Actor
from store.database import Database
from store.issuers import IssuerRecord
from store.scope import ALL_TENANTS
from store.tables import Certificate, IssuerRow
from workflows.authority.issuers import Authority, Issuers, RecordedIssuer
from workflows.authority.names import common_name, issuing_name, next_number

# By then no process can be about to record a certificate that it had the older CA sign.
MIN_TIME_SINCE_MOVE = timedelta(hours=1)


def waiting_issuer(tx: Connection, tenant_id: str) -> str | None:
    """Return the name of the issuing CA of a tenant that is to issue next, ``None`` if there is none."""
    waiting = [
        record.name
        for record in store_issuers.list_issuers(tx, tenant_id=tenant_id)
        if record.kind == IssuerKind.ISSUING and record.issuing_since is None
    ]
    return waiting[-1] if waiting else None


def prepare_next(
    database: Database,
    authority: Authority,
    keys: KeyStores,
    settings: Settings,
    actor: Actor,
    *,
    own_root: bool = False,
    now: datetime,
) -> tuple[str, int]:
    """Create the next issuing CA of the actor's tenant, trusted but not issuing yet, or find an earlier call's.

    Returns its name, and the generation that the broker must reach before it may issue. Raises ``CaKeyUnavailable``
    if the root's key is not here, ``StateConflict`` if another root is above the present one, unless ``own_root``.
    """
    with database.snapshot() as tx:
        issuers = store_issuers.list_issuers(tx, retired=True)
        generation = generations.get_broker_state(tx).generation
        waiting, current = waiting_issuer(tx, actor.tenant_id), authority.seen_by(tx)
    if waiting is not None:
        return waiting, generation
    issuing = current.issuing_of(actor.tenant_id)
    above = current.own_root(issuing)
    if not own_root and above is None:
        raise StateConflict(
            f"{issuing.issuer.name} is below {named(current.anchor(issuing))}, so that has to sign the next one, too:"
            f" {server_command('ca request')}, then ca install. With --own-root the portal's own root signs."
        )
    root = authority.with_root_key(above or current.root)
    if root is None:
        raise CaKeyUnavailable(
            f"The root's key is not in {settings.ca_dir}, and only the root can sign a new CA: bring the key back for"
            " this command, then move it away again; or have a request signed where it is (ca request, ca install)."
        )
    check_that_it_signs(signing_key(root.issuer))  # its token may be elsewhere
    issuer = new_issuing(root.issuer, actor.tenant_id, next_number(issuers, keys, actor.tenant_id), keys, settings, now)
    return issuer.name, add_issuing(database, actor, issuer, root, now=now)


def new_issuing(
    root: Issuer, tenant_id: str, number: int, keys: KeyStores, settings: Settings, now: datetime
) -> Issuer:
    """Make the key of a tenant's issuing CA, and have the root sign its certificate."""
    name = issuing_name(tenant_id, number)
    issued = ca.create_issuing(
        root,
        keys.create(name, KeyType(settings.issuing_key_type)).public_key(),
        common_name=common_name(settings.ca_name, tenant_id, f"Issuing CA {number}"),
        now=now,
        days=settings.issuing_days,
        pki_url=settings.pki_url,
    )
    return Issuer(name, issued.certificate)


def add_issuing(
    database: Database, actor: Actor, issuer: Issuer, own_root: RecordedIssuer | None, *, now: datetime
) -> int:
    """Record an issuing CA of the actor's tenant that does not issue yet; returns the generation of the broker's trust.

    A root of the portal's own that is above it is trusted from then on, too.
    """
    der = issuer.certificate.public_bytes(Encoding.DER)
    fingerprint = hashlib.sha256(der).hexdigest()
    with database.transaction() as tx:
        store_issuers.add_issuer(
            tx,
            tenant_id=actor.tenant_id,
            name=issuer.name,
            kind=IssuerKind.ISSUING,
            der=der,
            fingerprint=fingerprint,
            not_after=issuer.not_after,
            created_at=now,
            issuing_since=None,
            above=encode_above(issuer.above) if issuer.above else None,
        )
        if own_root is not None:
            store_issuers.set_status(tx, own_root.id, IssuerStatus.ACTIVE)
        generation = db.next_generation(tx, at=now)
        below = {"below": named(issuer.above[-1])} if issuer.above else {}
        audit.record(tx, actor, "ca:create", f"issuer:{issuer.name}", at=now, fingerprint=fingerprint, **below)
    return generation


def move_to(database: Database, authority: Authority, actor: Actor, name: str, *, now: datetime) -> None:
    """Let a CA issue from now on; clients and broker must trust it already.

    One of the first tenant signs the certificates of portal and broker, too, unless there are devices that know another
    root only.
    """
    with database.transaction() as tx:
        current = authority.seen_by(tx)
        if store_issuers.begin_issuing(tx, name, at=now):
            audit.record(tx, actor, "ca:issue", f"issuer:{name}", at=now)
            new = next(recorded for recorded in current.issuers if recorded.issuer.name == name)
            if new.tenant_id != current.servers.tenant_id:
                return
            known = current.anchor(current.servers)
            own = [one for one in current.with_crl() if one.tenant_id == new.tenant_id and one.id != new.id]
            others = [one for one in own if current.anchor(one) == known]
            stays = current.anchor(new) != known and (
                any(is_in_use(tx, one.id, now=now) for one in others) or _others_know_less(tx, new, now)
            )
            store_issuers.let_sign_servers(tx, current.servers.id if stays else new.id, at=now)


def move_servers(
    database: Database, authority: Authority, actor: Actor, name: str, *, alone: bool = False, now: datetime
) -> bool:
    """Have another CA sign the certificates of portal and broker if it is ``name`` that does, which is to retire.

    One below the same root if there are devices that know that root only, else the one that issues. Returns whether
    those certificates have another root than ``name`` has: then they must be in use before it retires. Raises
    ``StateConflict`` as ``retire`` does.
    """
    with database.transaction() as tx:
        current = authority.seen_by(tx)
        _check_unneeded(tx, current, actor.tenant_id, name, alone=alone, now=now)
        leaving = next(recorded for recorded in current.issuers if recorded.issuer.name == name)
        servers = current.servers
        if servers.id == leaving.id:
            own = [one for one in current.with_crl() if one.tenant_id == leaving.tenant_id]
            siblings = [one for one in own if current.anchor(one) == current.anchor(leaving)]
            needed = [one for one in siblings if is_in_use(tx, one.id, now=now)]
            servers = needed[-1] if needed else current.issuing_of(leaving.tenant_id)
            if current.anchor(servers) != current.anchor(leaving) and _others_know_less(tx, servers, now):
                raise StateConflict(
                    f"Devices of other tenants verify the portal and the broker by the root of {name}, and may know no"
                    " other one; renew them, or wait until their certificates expire."
                )
            store_issuers.let_sign_servers(tx, servers.id, at=now)
            audit.record(tx, actor, "ca:servers", f"issuer:{servers.issuer.name}", at=now)
        return leaving.tenant_id == servers.tenant_id and current.anchor(servers) != current.anchor(leaving)


def in_use(tx: Connection, issuer_id: int, *, now: datetime) -> int:
    """Return how many valid certificates of devices an issuer has."""
    return tx.execute(sa.select(sa.func.count()).select_from(Certificate).where(*_good(issuer_id, now))).scalar_one()


def is_in_use(tx: Connection, issuer_id: int, *, now: datetime) -> bool:
    """Return whether an issuer has any valid certificate of a device: quicker than ``in_use``."""
    return tx.execute(sa.select(Certificate.id).where(*_good(issuer_id, now)).limit(1)).first() is not None


def _others_know_less(tx: Connection, issuer: RecordedIssuer, now: datetime) -> bool:
    """Return whether a device of another tenant got its certificate before a CA was trusted: it may not know the CA."""
    trusted_since = sa.select(IssuerRow.created_at).where(IssuerRow.id == issuer.id).scalar_subquery()
    query = sa.select(Certificate.id).where(
        Certificate.tenant_id != issuer.tenant_id,
        Certificate.purpose == "device",
        Certificate.status != CertificateStatus.REVOKED,
        Certificate.not_after > now,
        Certificate.issued_at < trusted_since,
    )
    return tx.execute(query.limit(1)).first() is not None


def _good(issuer_id: int, now: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        Certificate.issuer_id == issuer_id,
        Certificate.purpose == "device",
        Certificate.status != CertificateStatus.REVOKED,
        Certificate.not_after > now,
    )


def _check_unneeded(
    tx: Connection, current: Issuers, tenant_id: str, name: str, *, alone: bool, now: datetime
) -> IssuerRecord:
    """Return the CA ``name`` of a tenant if it may retire, see ``retire``."""
    of_tenant = store_issuers.list_issuers(tx, tenant_id=tenant_id)
    issuers, issuing = [one for one in of_tenant if one.kind == IssuerKind.ISSUING], current.issuing_of(tenant_id)
    wanted = next((record for record in issuers if record.name == name), None)
    if wanted is None:
        raise StateConflict(f"There is no issuing CA {name} in use; list them with: {server_command('ca list')}")
    moved_at = next(record.issuing_since for record in issuers if record.id == issuing.id)
    if wanted.id >= issuing.id or moved_at is None:
        raise StateConflict(f"{name} issues, or is to; make another CA first: {server_command('ca rollover')}")
    if not alone and now - moved_at < MIN_TIME_SINCE_MOVE:
        raise StateConflict(f"{name} issued until {moved_at:%H:%M} UTC; it can retire an hour after that.")
    if count := in_use(tx, wanted.id, now=now):
        raise StateConflict(
            f"{count} certificates of {name} are still valid; renew or revoke their devices, or wait until they expire."
        )
    return wanted


def retire_all(database: Database, actor: Actor, *, now: datetime) -> None:
    """Stop trusting all CAs of the actor's tenant, which was removed, and whose devices are all revoked."""
    with database.transaction(sees=ALL_TENANTS) as tx:
        db.next_generation(tx, at=now)
        for record in store_issuers.list_issuers(tx, tenant_id=actor.tenant_id):
            store_issuers.set_status(tx, record.id, IssuerStatus.RETIRED)
            audit.record(tx, actor, "ca:retire", f"issuer:{record.name}", at=now)


def retire(
    database: Database, authority: Authority, actor: Actor, name: str, *, alone: bool = False, now: datetime
) -> int:
    """Stop trusting a CA that has no valid certificate of a device any more; returns the generation.

    The portal's own root is not trusted any more, either, if no CA below it is. The CRL of the CA is still published.
    Raises ``StateConflict`` if it is too early: within an hour of the last move of issuance, unless no portal serves
    (``alone``).
    """
    with database.transaction() as tx:
        current = authority.seen_by(tx)
        wanted = _check_unneeded(tx, current, actor.tenant_id, name, alone=alone, now=now)
        store_issuers.set_status(tx, wanted.id, IssuerStatus.RETIRED)
        needed = {root.id for one in current.with_crl() if one.id != wanted.id and (root := current.own_root(one))}
        for root in current.issuers:
            if root.kind == IssuerKind.ROOT and not root.retired and root.id not in needed:
                store_issuers.set_status(tx, root.id, IssuerStatus.RETIRED)
        generation = db.next_generation(tx, at=now)
        audit.record(tx, actor, "ca:retire", f"issuer:{name}", at=now)
    return generation
