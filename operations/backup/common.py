"""What the restores of an installation and of one tenant share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from broker.guard.journal import read_access, read_certificates
from broker.guard.told import read_told
from config import Settings
from core.broker_control import JOURNAL_FILE
from core.errors import ProjectionInvalid
from core.states import PENDING_DELIVERY, CertificateStatus, DeliveryStatus
from operations.backup.archive import Backup
from operations.backup.revocations import GuardRefusals, Kept, Tables
from pki.checkpoints import VerifierKey
from store import audit
from store import issuers as store_issuers
from store.tables import DEFAULT_TENANT, Certificate, Delivery, KeptBundle

# What only the old database has. Without it, these are as in the backup.
NOT_KNOWN = (
    "operator tokens, enrolment tokens and manufacturers that were revoked or removed since",
    "uses of enrolment tokens since",
    "topics that were taken away since, and webhooks that were deleted",
    "terms of manufacturers, enrolment tokens and certificate profiles that were changed since, evidence among them",
    "devices registered since: their certificates are valid until they expire",
    "devices that enrolled since and were revoked or rejected: their token or factory certificate admits them again",
)


@dataclass(slots=True)
class Restored:
    """The result of a restore: what it revoked again, notes for the operator, where the old database is.

    ``older`` says, item by item, which terms are again those of the backup, and ``unknown`` what was changed since and
    could not be read anywhere.
    """

    made_at: str
    counts: dict[str, int]
    generation: int = 0
    links_expired: int = 0
    kept: list[Kept] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    older: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    before: Path | None = None


def refused_by_the_guard(settings: Settings, done: Restored) -> GuardRefusals:
    """Return what the guard's journal refuses: it is told of a revocation before any CRL is signed."""
    path = settings.broker_file(JOURNAL_FILE)
    if not settings.broker_control.by_journal or not path.exists():
        return GuardRefusals()
    try:
        access, certificates, told = read_access(path), read_certificates(path), read_told(path)
    except ProjectionInvalid as error:
        done.notes.append(f"{error.detail} What it refused and no CRL lists is not known.")
        return GuardRefusals()
    allowed = frozenset(identity for identity, text in access.items() if text.startswith("allow "))
    suspended = frozenset(name for name, tenant in told.tenants.items() if tenant.suspended)
    return GuardRefusals(frozenset(access.keys() - allowed), allowed, frozenset(certificates), suspended)


def free_name(path: Path) -> Path:
    """Return the path, with a number appended if it exists."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def is_of_one_of(replaced: Tables | None, issuers: Sequence[store_issuers.IssuerRecord]) -> bool:
    """Return whether the replaced database was read and is of the backup's CA, so that it knows what was revoked."""
    ours = {issuer.fingerprint for issuer in issuers}
    return replaced is not None and any(row["fingerprint"] in ours for row in replaced("issuers"))


def check_audit_record(tx: Connection, tenant_id: str, backup: Backup) -> list[str]:
    """Return as notes what is wrong with a restored audit record, by itself and by the checkpoint in the backup."""
    found = backup.checkpoint(tenant_id)
    record = "audit record" if tenant_id == DEFAULT_TENANT else f"audit record of the tenant {tenant_id}"
    if found is None:
        verdict = audit.verify(tx, tenant_id)
        return [f"The {record} in the backup is damaged: {verdict.problem}"] if verdict.problem is not None else []
    note, key = found
    try:
        signed = VerifierKey.parse(key).open(note)
    except ValueError as error:
        return [f"The checkpoint of the {record} in the backup cannot be used: {error}."]
    verdict = audit.verify(tx, tenant_id, sizes={signed.size})
    if verdict.problem is not None:
        return [f"The {record} in the backup is damaged: {verdict.problem}"]
    if verdict.roots.get(signed.size) != signed.root:
        return [f"The {record} in the backup is not the one that its checkpoint of {signed.size} entries signs."]
    return []


def expire_links(tx: Connection, replaced: Tables | None, *, keep: bool, tenant_id: str | None = None) -> int:
    """Destroy undelivered bundles of the backup, which may have been delivered since; return their number.

    Those that were kept for a repeat of their fetch are destroyed, too. With ``tenant_id`` only that tenant's.
    """
    tx.execute(sa.delete(KeptBundle).where(sa.true() if tenant_id is None else KeptBundle.tenant_id == tenant_id))
    own = sa.true() if tenant_id is None else Delivery.tenant_id == tenant_id
    good: set[str] = set()
    if keep:
        query = (
            sa.select(Delivery.id)
            .join(Certificate, Certificate.id == Delivery.certificate_id)
            .where(own, Delivery.status.in_(PENDING_DELIVERY), Certificate.status == CertificateStatus.ACTIVE)
        )
        good = set(tx.execute(query).scalars())
        if replaced is not None:
            good &= {row["id"] for row in replaced("deliveries") if row["status"] == DeliveryStatus.READY}
    waiting = tx.execute(sa.select(Delivery.id).where(own, Delivery.status.in_(PENDING_DELIVERY))).scalars().all()
    over = [{"of_delivery": delivery_id} for delivery_id in waiting if delivery_id not in good]
    if over:
        tx.execute(
            sa.update(Delivery)
            .where(Delivery.id == sa.bindparam("of_delivery"))
            .values(status=DeliveryStatus.EXPIRED, bundle=None, lease_until=None),
            over,
        )
    return len(over)
