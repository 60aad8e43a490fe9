"""The database's record of the issuers, their CRLs and the generation that the broker has reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import IssuerKind, IssuerStatus
from store.certificates import CERTIFICATE_COLUMNS, CertificateRecord, certificate_record
from store.tables import AuditHead, BrokerState, Certificate, Crl, IssuerRow, Tenant, UtcDateTime


@dataclass(frozen=True, slots=True)
class IssuerRecord:
    """A CA certificate of the portal's; ``revoked_generation`` is when what its CRL must list last changed.

    The last of the active issuing CAs that has an ``issuing_since`` signs new certificates; ``None``: trusted only.
    """

    id: int
    name: str
    kind: IssuerKind
    status: IssuerStatus
    der: bytes
    fingerprint: str
    not_after: datetime
    revoked_generation: int
    issuing_since: datetime | None


@dataclass(frozen=True, slots=True)
class CrlRecord:
    """The newest CRL of an issuer."""

    issuer_id: int
    number: int
    this_update: datetime
    next_update: datetime
    generation: int
    der: bytes


@dataclass(frozen=True, slots=True)
class BrokerStateRecord:
    """The generation that the broker must reach, with the one it was last seen to enforce.

    ``pending_since`` is since when the two have differed, ``None`` where they do not.
    """

    generation: int
    applied_generation: int
    applied_at: datetime | None
    pending_since: datetime | None


def add_tenant(tx: Connection, tenant_id: str, *, created_at: datetime) -> None:
    """Record a tenant with its broker state and an empty audit record, unless it is there."""
    if tx.execute(sa.select(Tenant.id).where(Tenant.id == tenant_id)).one_or_none() is None:
        tx.execute(sa.insert(Tenant), {"id": tenant_id, "created_at": created_at})
        tx.execute(sa.insert(AuditHead), {"tenant_id": tenant_id, "number": 0, "hash": "0" * 64})
        tx.execute(
            sa.insert(BrokerState),
            {"tenant_id": tenant_id, "generation": 1, "applied_generation": 0, "pending_since": created_at},
        )


def add_issuer(
    tx: Connection, *, tenant_id: str, name: str, kind: IssuerKind, der: bytes, fingerprint: str, not_after: datetime,
    created_at: datetime, issuing_since: datetime | None,
) -> int:  # fmt: skip
    """Record a CA certificate and return its row's id."""
    return tx.execute(
        sa.insert(IssuerRow).returning(IssuerRow.id),
        {
            "tenant_id": tenant_id,
            "name": name,
            "kind": kind,
            "status": IssuerStatus.ACTIVE,
            "der": der,
            "fingerprint": fingerprint,
            "not_after": not_after,
            "created_at": created_at,
            "issuing_since": issuing_since,
        },
    ).scalar_one()


def list_issuers(tx: Connection, *, retired: bool = False) -> Sequence[IssuerRecord]:
    """All CA certificates in use, with ``retired`` those that were, the root first."""
    rows = tx.execute(
        sa.select(
            IssuerRow.id,
            IssuerRow.name,
            IssuerRow.kind,
            IssuerRow.status,
            IssuerRow.der,
            IssuerRow.fingerprint,
            IssuerRow.not_after,
            IssuerRow.revoked_generation,
            IssuerRow.issuing_since,
        )
        .where(IssuerRow.status.in_(tuple(IssuerStatus) if retired else (IssuerStatus.ACTIVE,)))
        .order_by(IssuerRow.id)
    )
    return [IssuerRecord(*row) for row in rows]


def get_crl(tx: Connection, issuer_id: int) -> CrlRecord | None:
    """The newest CRL of an issuer, ``None`` before the first."""
    row = tx.execute(
        sa.select(Crl.issuer_id, Crl.number, Crl.this_update, Crl.next_update, Crl.generation, Crl.der).where(
            Crl.issuer_id == issuer_id
        )
    ).one_or_none()
    return None if row is None else CrlRecord(*row)


def put_crl(tx: Connection, tenant_id: str, record: CrlRecord) -> bool:
    """Make a CRL the newest of its issuer; returns False, changing nothing, where its number is not higher."""
    values = {
        "number": record.number,
        "this_update": record.this_update,
        "next_update": record.next_update,
        "generation": record.generation,
        "der": record.der,
    }
    updated = tx.execute(
        sa.update(Crl).where(Crl.issuer_id == record.issuer_id, Crl.number < record.number).values(values)
    )
    if updated.rowcount == 1:
        return True
    if tx.execute(sa.select(Crl.number).where(Crl.issuer_id == record.issuer_id)).one_or_none() is not None:
        return False
    tx.execute(sa.insert(Crl), {"tenant_id": tenant_id, "issuer_id": record.issuer_id, **values})
    return True


def get_broker_state(tx: Connection, tenant_id: str) -> BrokerStateRecord:
    """The broker's newest and reached generation."""
    row = tx.execute(
        sa.select(
            BrokerState.generation,
            BrokerState.applied_generation,
            BrokerState.applied_at,
            BrokerState.pending_since,
        ).where(BrokerState.tenant_id == tenant_id)
    ).one()
    return BrokerStateRecord(*row)


def set_applied_generation(tx: Connection, tenant_id: str, generation: int, *, applied_at: datetime) -> None:
    """Record that the broker enforces ``generation``; never goes back."""
    tx.execute(
        sa.update(BrokerState)
        .where(BrokerState.tenant_id == tenant_id, BrokerState.applied_generation < generation)
        .values(
            applied_generation=generation,
            applied_at=applied_at,
            # What came while the pass ran has been pending from then on, at the latest from now on.
            pending_since=sa.case(
                (BrokerState.generation > generation, sa.literal(applied_at, UtcDateTime)), else_=None
            ),
        )
    )


def touch_issuer(tx: Connection, issuer_id: int, *, generation: int) -> None:
    """Say that what the issuer's CRL must list has changed at ``generation``."""
    tx.execute(sa.update(IssuerRow).where(IssuerRow.id == issuer_id).values(revoked_generation=generation))


def list_own_certificates(tx: Connection, tenant_id: str, purpose: str) -> Sequence[CertificateRecord]:
    """Certificates of the portal's own, ``server`` or ``canary``, newest first."""
    rows = tx.execute(
        sa.select(*CERTIFICATE_COLUMNS)
        .where(Certificate.tenant_id == tenant_id, Certificate.purpose == purpose)
        .order_by(Certificate.id.desc())
    )
    return [certificate_record(row) for row in rows]
