"""The steps by which one issuing CA replaces another (rollover)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
from pki.keys.contract import CaKeys, check_that_it_signs
from pki.outer_chain import encode_above, named
from store import audit, generations
from store import issuers as store_issuers
from store.audit import Actor
from store.database import Database
from store.issuers import IssuerRecord
from store.tables import Certificate, IssuerRow
from workflows.authority.issuers import Authority, Issuers

# By then no process can be about to record a certificate that it had the older CA sign.
MIN_TIME_SINCE_MOVE = timedelta(hours=1)
MAX_ISSUERS = 100


def waiting_issuer(tx: Connection) -> str | None:
    """Return the name of the issuing CA that is to issue next, ``None`` if there is none."""
    waiting = [
        record.name
        for record in store_issuers.list_issuers(tx)
        if record.kind == IssuerKind.ISSUING and record.issuing_since is None
    ]
    return waiting[-1] if waiting else None


def prepare_next(
    database: Database,
    authority: Authority,
    keys: CaKeys,
    settings: Settings,
    actor: Actor,
    *,
    own_root: bool = False,
    now: datetime,
) -> tuple[str, int]:
    """Create the next issuing CA, trusted but not issuing yet, or find the one that an earlier call has created.

    Returns its name, and the generation that the broker must reach before it may issue. Raises ``CaKeyUnavailable``
    if the root's key is not here, ``StateConflict`` if another root is above the present one, unless ``own_root``.
    """
    with database.snapshot() as tx:
        issuers = store_issuers.list_issuers(tx, retired=True)
        generation = generations.get_broker_state(tx).generation
        waiting, current = waiting_issuer(tx), authority.seen_by(tx)
    if waiting is not None:
        return waiting, generation
    if not own_root and current.anchor(current.issuing) != current.root.issuer.certificate:
        raise StateConflict(
            f"{current.issuing.issuer.name} is below {named(current.anchor(current.issuing))}, so that has to sign the"
            f" next one, too: {server_command('ca request')}, then ca install."
            " With --own-root the portal's own root signs."
        )
    root = authority.root_with_key()
    if root is None:
        raise CaKeyUnavailable(
            f"The root's key is not in {settings.ca_dir}, and only the root can sign a new CA: bring the key back for"
            " this command, then move it away again; or have a request signed where it is (ca request, ca install)."
        )
    check_that_it_signs(signing_key(root.issuer))  # its token may be elsewhere
    issuer = _new_issuing(root.issuer, next_number(issuers, keys), keys, settings, now)
    return issuer.name, add_issuing(database, actor, issuer, now=now)


def _new_issuing(root: Issuer, number: int, keys: CaKeys, settings: Settings, now: datetime) -> Issuer:
    name = f"issuing-{number}"
    issued = ca.create_issuing(
        root,
        keys.create(name, KeyType(settings.issuing_key_type)).public_key(),
        common_name=f"{settings.ca_name} Issuing CA {number}",
        now=now,
        days=settings.issuing_days,
        pki_url=settings.pki_url,
    )
    return Issuer(name, issued.certificate)


def add_issuing(database: Database, actor: Actor, issuer: Issuer, *, now: datetime) -> int:
    """Record an issuing CA that does not issue yet; returns the generation at which the broker trusts it.

    The portal's own root, if that is the one above it, is trusted from then on, too.
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
        if not issuer.above:
            tx.execute(sa.update(IssuerRow).where(IssuerRow.kind == IssuerKind.ROOT).values(status=IssuerStatus.ACTIVE))
        generation = db.next_generation(tx, at=now)
        below = {"below": named(issuer.above[-1])} if issuer.above else {}
        audit.record(tx, actor, "ca:create", f"issuer:{issuer.name}", at=now, fingerprint=fingerprint, **below)
    return generation


def next_number(issuers: Sequence[IssuerRecord], keys: CaKeys) -> int:
    """Return the number of the next issuing CA, which has neither a certificate nor a key yet.

    A key without a CA was left by a call that was cut off, or by a database that was restored since: it may have signed
    certificates that are not known here, so it is never used again.
    """
    taken = {record.name for record in issuers}
    numbers = range(2, MAX_ISSUERS)
    return next(n for n in numbers if f"issuing-{n}" not in taken and not keys.exists(f"issuing-{n}"))


def move_to(database: Database, authority: Authority, actor: Actor, name: str, *, now: datetime) -> None:
    """Let a CA issue from now on; clients and broker must trust it already.

    It signs the certificates of portal and broker, too, unless there are devices that know another root only.
    """
    with database.transaction() as tx:
        current = authority.seen_by(tx)
        begun = tx.execute(
            sa.update(IssuerRow)
            .where(IssuerRow.name == name, IssuerRow.status == IssuerStatus.ACTIVE, IssuerRow.issuing_since.is_(None))
            .values(issuing_since=now)
        )
        if begun.rowcount:
            audit.record(tx, actor, "ca:issue", f"issuer:{name}", at=now)
            new = next(recorded for recorded in current.issuers if recorded.issuer.name == name)
            known = current.anchor(current.servers)
            others = [one for one in current.with_crl() if one.id != new.id and current.anchor(one) == known]
            stays = current.anchor(new) != known and any(is_in_use(tx, one.id, now=now) for one in others)
            _let_sign_servers(tx, current.servers.id if stays else new.id, now)


def _let_sign_servers(tx: Connection, issuer_id: int, now: datetime) -> None:
    tx.execute(sa.update(IssuerRow).where(IssuerRow.id == issuer_id).values(servers_since=now))


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
        _check_unneeded(tx, current, name, alone=alone, now=now)
        leaving = next(recorded for recorded in current.issuers if recorded.issuer.name == name)
        servers = current.servers
        if servers.id == leaving.id:
            siblings = [one for one in current.with_crl() if current.anchor(one) == current.anchor(leaving)]
            needed = [one for one in siblings if is_in_use(tx, one.id, now=now)]
            servers = needed[-1] if needed else current.issuing
            _let_sign_servers(tx, servers.id, now)
            audit.record(tx, actor, "ca:servers", f"issuer:{servers.issuer.name}", at=now)
        return current.anchor(servers) != current.anchor(leaving)


def in_use(tx: Connection, issuer_id: int, *, now: datetime) -> int:
    """Return how many valid certificates of devices an issuer has."""
    return tx.execute(sa.select(sa.func.count()).select_from(Certificate).where(*_good(issuer_id, now))).scalar_one()


def is_in_use(tx: Connection, issuer_id: int, *, now: datetime) -> bool:
    """Return whether an issuer has any valid certificate of a device: quicker than ``in_use``."""
    return tx.execute(sa.select(Certificate.id).where(*_good(issuer_id, now)).limit(1)).first() is not None


def _good(issuer_id: int, now: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        Certificate.issuer_id == issuer_id,
        Certificate.purpose == "device",
        Certificate.status != CertificateStatus.REVOKED,
        Certificate.not_after > now,
    )


def _check_unneeded(tx: Connection, current: Issuers, name: str, *, alone: bool, now: datetime) -> IssuerRecord:
    """Return the CA ``name`` if it may retire, see ``retire``."""
    issuers = [record for record in store_issuers.list_issuers(tx) if record.kind == IssuerKind.ISSUING]
    wanted = next((record for record in issuers if record.name == name), None)
    if wanted is None:
        raise StateConflict(f"There is no issuing CA {name} in use; list them with: {server_command('ca list')}")
    moved_at = next(record.issuing_since for record in issuers if record.id == current.issuing.id)
    if wanted.id >= current.issuing.id or moved_at is None:
        raise StateConflict(f"{name} issues, or is to; make another CA first: {server_command('ca rollover')}")
    if not alone and now - moved_at < MIN_TIME_SINCE_MOVE:
        raise StateConflict(f"{name} issued until {moved_at:%H:%M} UTC; it can retire an hour after that.")
    if count := in_use(tx, wanted.id, now=now):
        raise StateConflict(
            f"{count} certificates of {name} are still valid; renew or revoke their devices, or wait until they expire."
        )
    return wanted


def retire(
    database: Database, authority: Authority, actor: Actor, name: str, *, alone: bool = False, now: datetime
) -> int:
    """Stop trusting a CA that has no valid certificate of a device any more; returns the generation.

    The portal's own root is not trusted any more, either, if no CA below it is. The CRL of the CA is still published.
    Raises ``StateConflict`` if it is too early: within an hour of the last move of issuance, unless no portal serves
    (``alone``).
    """
    with database.transaction() as tx:
        wanted = _check_unneeded(tx, authority.seen_by(tx), name, alone=alone, now=now)
        tx.execute(sa.update(IssuerRow).where(IssuerRow.id == wanted.id).values(status=IssuerStatus.RETIRED))
        left = [record for record in store_issuers.list_issuers(tx) if record.kind == IssuerKind.ISSUING]
        if all(record.above is not None for record in left):
            tx.execute(
                sa.update(IssuerRow).where(IssuerRow.kind == IssuerKind.ROOT).values(status=IssuerStatus.RETIRED)
            )
        generation = db.next_generation(tx, at=now)
        audit.record(tx, actor, "ca:retire", f"issuer:{name}", at=now)
    return generation
