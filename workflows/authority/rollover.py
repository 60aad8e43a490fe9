"""Records the steps by which one issuing CA follows another."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

import ca
import db
from config import Settings
from core.errors import CaKeyUnavailable, StateConflict
from core.states import CertificateStatus, IssuerKind, IssuerStatus
from pki.algorithms import KeyType
from pki.keystore import CaKeys
from store import generations
from store import issuers as store_issuers
from store.database import Database
from store.tables import Certificate, IssuerRow
from workflows import audit
from workflows.audit import Actor
from workflows.authority.issuers import Authority

# By then no process can be about to record a certificate that it had the older CA sign.
LEAST_TIME_MOVED = timedelta(hours=1)
MOST_ISSUERS = 100


def prepare_next(
    database: Database, authority: Authority, keys: CaKeys, settings: Settings, actor: Actor, *, now: datetime
) -> tuple[str, int]:
    """Make the next issuing CA, trusted but not issuing yet, or find the one that an earlier call has made.

    Returns its name, and the generation that the broker must reach before it may issue. Raises ``CaKeyUnavailable``
    where the root's key is not here.
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
    taken = {record.name for record in issuers}
    # A key without a CA was left by a call that was cut off, or by a database that was put back since: it may have
    # signed certificates that nobody knows of here, so it is never used again.
    number = next(n for n in range(2, MOST_ISSUERS) if f"issuing-{n}" not in taken and not keys.exists(f"issuing-{n}"))
    name = f"issuing-{number}"
    key = keys.create(name, KeyType.EC_P256)
    issued = ca.create_issuing(
        root.issuer,
        key.public_key(),
        common_name=f"{settings.ca_name} Issuing CA {number}",
        now=now,
        days=settings.issuing_days,
        pki_url=settings.pki_url,
    )
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
    return name, generation


def move_to(database: Database, actor: Actor, name: str, *, now: datetime) -> None:
    """Let a CA that is trusted everywhere issue from now on."""
    with database.transaction() as tx:
        begun = tx.execute(
            sa.update(IssuerRow)
            .where(IssuerRow.name == name, IssuerRow.status == IssuerStatus.ACTIVE, IssuerRow.issuing_since.is_(None))
            .values(issuing_since=now)
        )
        if begun.rowcount:
            audit.record(tx, actor, "ca:issue", f"issuer:{name}", at=now)


def in_use(tx: Connection, issuer_id: int, *, now: datetime) -> int:
    """How many devices' certificates of an issuer are still good."""
    return tx.execute(sa.select(sa.func.count()).select_from(Certificate).where(*_good(issuer_id, now))).scalar_one()


def is_in_use(tx: Connection, issuer_id: int, *, now: datetime) -> bool:
    """Whether any is, which is known sooner than how many."""
    return tx.execute(sa.select(Certificate.id).where(*_good(issuer_id, now)).limit(1)).first() is not None


def _good(issuer_id: int, now: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        Certificate.issuer_id == issuer_id,
        Certificate.purpose == "device",
        Certificate.status != CertificateStatus.REVOKED,
        Certificate.not_after > now,
    )


def retire(database: Database, authority: Authority, actor: Actor, name: str, *, now: datetime) -> int:
    """Trust a CA no more, since nobody has a certificate of it that is still good; returns the generation.

    Its CRL goes on being published. Raises ``StateConflict`` where it is too early.
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
        if now - moved_at < LEAST_TIME_MOVED:
            raise StateConflict(f"{name} issued until {moved_at:%H:%M} UTC; it can retire an hour after that.")
        if count := in_use(tx, wanted.id, now=now):
            raise StateConflict(
                f"{count} certificates of {name} are still good; renew or revoke their devices, or wait for their end."
            )
        tx.execute(sa.update(IssuerRow).where(IssuerRow.id == wanted.id).values(status=IssuerStatus.RETIRED))
        generation = db.next_generation(tx, actor.tenant_id, at=now)
        audit.record(tx, actor, "ca:retire", f"issuer:{name}", at=now)
    return generation
