"""What people were told by mail, and the certificates about which they were not told yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import CertificateStatus, ClientKind
from store.certificates import CURRENT, past_share
from store.mail_tables import MailedMatter
from store.tables import Certificate, Device

CERTIFICATE = "certificate"  # the kind whose subjects are ids of certificates
_MESSAGE = "message"  # the row of the last message itself


@dataclass(frozen=True, slots=True)
class EndingCertificate:
    """The current certificate of a device or application, which ends soon."""

    certificate_id: int
    device_id: str
    kind: ClientKind
    name: str
    not_after: datetime


def ending_certificates(
    tx: Connection, tenant_id: str, *, now: datetime, within: timedelta, limit: int
) -> Sequence[EndingCertificate]:
    """Return current certificates that were not mailed about and end soon, the first to end first.

    Soon is ``within`` a time and in the last sixth of their life: what renews itself has done so long before.
    """
    mailed = sa.select(MailedMatter.subject).where(
        MailedMatter.tenant_id == Certificate.tenant_id,
        MailedMatter.kind == CERTIFICATE,
        MailedMatter.subject == sa.cast(Certificate.id, sa.String(64)),
    )
    rows: Sequence[Any] = tx.execute(
        sa.select(Certificate.id, Device.id, Device.kind, Device.name, Certificate.not_after)
        .join(Device, sa.and_(Device.tenant_id == Certificate.tenant_id, Device.id == Certificate.device_id))
        .where(
            Certificate.tenant_id == tenant_id,
            CURRENT,
            Certificate.status == CertificateStatus.ACTIVE,
            Certificate.not_after > now,
            Certificate.not_after <= now + within,
            past_share(tx, "5 / 6", now),
            ~mailed.exists(),
        )
        .order_by(Certificate.not_after, Certificate.id)
        .limit(limit)
    ).all()
    return [EndingCertificate(*row) for row in rows]


def said(tx: Connection, tenant_id: str, kind: str, subjects: Sequence[str]) -> set[str]:
    """Return those of at most a few thousand ``subjects`` that were mailed about."""
    named = MailedMatter.subject.in_(subjects)
    query = sa.select(MailedMatter.subject).where(MailedMatter.tenant_id == tenant_id, MailedMatter.kind == kind, named)
    return set(tx.execute(query).scalars()) if subjects else set()


def last_message(tx: Connection, tenant_id: str) -> datetime | None:
    """Return when the last message to a tenant's people was sent."""
    own = (MailedMatter.tenant_id == tenant_id, MailedMatter.kind == _MESSAGE)
    return tx.execute(sa.select(MailedMatter.said_at).where(*own)).scalar_one_or_none()


def record_message(tx: Connection, tenant_id: str, matters: Sequence[tuple[str, str]], *, now: datetime) -> None:
    """Record that a message named these matters, by kind and subject."""
    forget(tx, tenant_id, _MESSAGE)
    rows = [(_MESSAGE, ""), *matters]
    tx.execute(
        sa.insert(MailedMatter),
        [{"tenant_id": tenant_id, "kind": kind, "subject": subject, "said_at": now} for kind, subject in rows],
    )


def forget(tx: Connection, tenant_id: str, kind: str) -> None:
    """Forget all matters of a kind, so that they are named again."""
    tx.execute(sa.delete(MailedMatter).where(MailedMatter.tenant_id == tenant_id, MailedMatter.kind == kind))


def forget_older(tx: Connection, tenant_id: str, *, before: datetime) -> None:
    """Forget the matters that were named before a time."""
    old = (MailedMatter.kind != _MESSAGE, MailedMatter.said_at < before)
    tx.execute(sa.delete(MailedMatter).where(MailedMatter.tenant_id == tenant_id, *old))
