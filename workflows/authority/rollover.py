"""The steps by which one issuing CA replaces another (rollover)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

import ca
import db
from config import Settings
from core.errors import CaKeyUnavailable, StateConflict
from core.states import CertificateStatus, IssuerKind, IssuerStatus
from pki.algorithms import KeyType
from pki.issuers import signing_key
from pki.keys.contract import CaKeys, check_that_it_signs
from store import audit, generations
from store import issuers as store_issuers
from store.audit import Actor
from store.database import Database
from store.issuers import IssuerRecord
from store.tables import Certificate, IssuerRow
from workflows.authority.issuers import Authority

# By then no process can be about to record a certificate that it had the older CA sign.
MIN_TIME_SINCE_MOVE = timedelta(hours=1)
MAX_ISSUERS = 100


def prepare_next(
    database: Database, authority: Authority, keys: CaKeys, settings: Settings, actor: Actor, *, now: datetime
) -> tuple[str, int]:
    """Create the next issuing CA, trusted but not issuing yet, or find the one that an earlier call has created.

    Returns its name, and the generation that the broker must reach before it may issue. Raises ``CaKeyUnavailable``
    if the root's key is not here.
    """
    with database.snapshot() as tx:
        issuers = store_issuers.list_issuers(tx, retired=True)
        generation = generations.get_broker_state(tx, actor.tenant_id).generation
    waiting = [record.name for record in issuers if record.kind == IssuerKind.ISSUING and record.issuing_since is None]
    if waiting:
        return waiting[-1], generation
    root = authority.root_with_key()
    if root is None:
        raise CaKeyUnavailable(
            f"The root's key is not in {settings.ca_dir}, and only the root can sign a new CA: bring the key back for"
            " this command, then move it away again."
        )
    check_that_it_signs(signing_key(root.issuer))  # its token may be elsewhere
    number = _next_number(issuers, keys)
    name = f"issuing-{number}"
    issued = ca.create_issuing(
        root.issuer,
        keys.create(name, KeyType(settings.issuing_key_type)).public_key(),
        common_name=f"{settings.ca_name} Issuing CA {number}",
        now=now,
        days=settings.issuing_days,
        pki_url=settings.pki_url,
    )
    return name, _add(database, actor, name, issued, now)


def _add(database: Database, actor: Actor, name: str, issued: ca.Issued, now: datetime) -> int:
    """Record an issuing CA that does not issue yet; returns the generation at which the broker trusts it."""
    with database.transaction() as tx:
        store_issuers.add_issuer(
            tx,
            tenant_id=actor.tenant_id,
            name=name,
            kind=IssuerKind.ISSUING,
            der=issued.der,
            fingerprint=issued.fingerprint,
            not_after=issued.not_after,
            created_at=now,
            issuing_since=None,
        )
        generation = db.next_generation(tx, actor.tenant_id, at=now)
        audit.record(tx, actor, "ca:create", f"issuer:{name}", at=now, fingerprint=issued.fingerprint)
    return generation


def _next_number(issuers: Sequence[IssuerRecord], keys: CaKeys) -> int:
    """Return the number of the next issuing CA, which has neither a certificate nor a key yet.

    A key without a CA was left by a call that was cut off, or by a database that was restored since: it may have signed
    certificates that are not known here, so it is never used again.
    """
    taken = {record.name for record in issuers}
    numbers = range(2, MAX_ISSUERS)
    return next(n for n in numbers if f"issuing-{n}" not in taken and not keys.exists(f"issuing-{n}"))


def move_to(database: Database, actor: Actor, name: str, *, now: datetime) -> None:
    """Let a CA issue from now on; clients and broker must trust it already."""
    with database.transaction() as tx:
        begun = tx.execute(
            sa.update(IssuerRow)
            .where(IssuerRow.name == name, IssuerRow.status == IssuerStatus.ACTIVE, IssuerRow.issuing_since.is_(None))
            .values(issuing_since=now)
        )
        if begun.rowcount:
            audit.record(tx, actor, "ca:issue", f"issuer:{name}", at=now)


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


def retire(database: Database, authority: Authority, actor: Actor, name: str, *, now: datetime) -> int:
    """Stop trusting a CA that has no valid certificate of a device any more; returns the generation.

    Its CRL is still published. Raises ``StateConflict`` if it is too early.
    """
    with database.transaction() as tx:
        issuers = [record for record in store_issuers.list_issuers(tx) if record.kind == IssuerKind.ISSUING]
        issuing = authority.seen_by(tx).issuing
        wanted = next((record for record in issuers if record.name == name), None)
        if wanted is None:
            raise StateConflict(f"There is no issuing CA {name} in use; list them with: flask --app app ca list")
        moved_at = next(record.issuing_since for record in issuers if record.id == issuing.id)
        if wanted.id >= issuing.id or moved_at is None:
            raise StateConflict(f"{name} issues, or is to; make another CA first: flask --app app ca rollover")
        if now - moved_at < MIN_TIME_SINCE_MOVE:
            raise StateConflict(f"{name} issued until {moved_at:%H:%M} UTC; it can retire an hour after that.")
        if count := in_use(tx, wanted.id, now=now):
            raise StateConflict(
                f"{count} certificates of {name} are still valid; renew or revoke their devices, or wait until they"
                " expire."
            )
        tx.execute(sa.update(IssuerRow).where(IssuerRow.id == wanted.id).values(status=IssuerStatus.RETIRED))
        generation = db.next_generation(tx, actor.tenant_id, at=now)
        audit.record(tx, actor, "ca:retire", f"issuer:{name}", at=now)
    return generation
