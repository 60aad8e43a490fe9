"""The database's record of devices that wait for an operator: to be let in, or to come back with another key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.device_status import DeviceStatus
from core.errors import StateConflict
from core.states import EnrolmentStatus
from store.tables import Certificate, Device
from store.tables_enrolment import Enrolment
from store.tables_reenrolment import Reenrolment

# As the conditions of indexes say it, so that these serve.
_FIRST_WAITS = sa.text("enrolments.status = 'waiting'")
_AGAIN_WAITS = sa.text("reenrolments.status = 'waiting'")


@dataclass(frozen=True, slots=True)
class ReenrolmentRecord:
    """What a device that has enrolled asks for now; ``status`` is ``waiting``, ``approved`` or ``rejected``."""

    enrolment_id: int
    key_fingerprint: str
    status: EnrolmentStatus


_COLUMNS = (Reenrolment.enrolment_id, Reenrolment.key_fingerprint, Reenrolment.status)


def find(tx: Connection, tenant_id: str, enrolment_id: int) -> ReenrolmentRecord | None:
    """What the device of an enrolment asks for now, ``None`` where it does not."""
    own = (Reenrolment.tenant_id == tenant_id, Reenrolment.enrolment_id == enrolment_id)
    row = tx.execute(sa.select(*_COLUMNS).where(*own)).one_or_none()
    return None if row is None else ReenrolmentRecord(*row)


def ask(tx: Connection, tenant_id: str, enrolment_id: int, *, key_fingerprint: str, asked_at: datetime) -> None:
    """Record the key that a device asks for, in the place of another one, whatever was decided about that."""
    own = (Reenrolment.tenant_id == tenant_id, Reenrolment.enrolment_id == enrolment_id)
    tx.execute(sa.delete(Reenrolment).where(*own))
    values = {"key_fingerprint": key_fingerprint, "status": EnrolmentStatus.WAITING, "asked_at": asked_at}
    tx.execute(sa.insert(Reenrolment), {"tenant_id": tenant_id, "enrolment_id": enrolment_id, **values})


def decide(
    tx: Connection,
    tenant_id: str,
    enrolment_id: int,
    *,
    key_fingerprint: str,
    status: EnrolmentStatus,
    decided_at: datetime,
) -> bool:
    """Record a decision about a key that waits for it; returns whether it still did."""
    own = (Reenrolment.tenant_id == tenant_id, Reenrolment.enrolment_id == enrolment_id)
    waits = (Reenrolment.key_fingerprint == key_fingerprint, Reenrolment.status == EnrolmentStatus.WAITING)
    values = {"status": status, "decided_at": decided_at}
    return tx.execute(sa.update(Reenrolment).where(*own, *waits).values(values)).rowcount == 1


def take(tx: Connection, tenant_id: str, enrolment_id: int, key_fingerprint: str) -> None:
    """Use up the approval of a key; raises ``StateConflict`` where there is none any more."""
    own = (Reenrolment.tenant_id == tenant_id, Reenrolment.enrolment_id == enrolment_id)
    approved = (Reenrolment.key_fingerprint == key_fingerprint, Reenrolment.status == EnrolmentStatus.APPROVED)
    if tx.execute(sa.delete(Reenrolment).where(*own, *approved)).rowcount != 1:
        raise StateConflict("The device has asked with another key meanwhile; ask again.")


def count_issued(tx: Connection, tenant_id: str, device_id: str, *, since: datetime) -> int:
    """How many certificates a device was given from a time on."""
    own = (Certificate.tenant_id == tenant_id, Certificate.device_id == device_id, Certificate.issued_at >= since)
    return tx.execute(sa.select(sa.func.count()).select_from(Certificate).where(*own)).scalar_one()


@dataclass(frozen=True, slots=True)
class Asking:
    """A device about which an operator is to decide; ``again`` where it has a certificate and brings another key."""

    device_id: str
    name: str
    again: bool
    key_fingerprint: str
    token_id: str | None
    manufacturer_id: str | None
    asked_at: datetime


_OF_BOTH = (Enrolment.token_id, Enrolment.manufacturer_id)
_DEVICE = sa.and_(Device.tenant_id == Enrolment.tenant_id, Device.id == Enrolment.device_id)


def first_asking(tx: Connection, tenant_id: str, *, limit: int) -> Sequence[Asking]:
    """The devices that wait to be let in, who has waited longest first."""
    query = (
        sa.select(
            Device.id, Device.name, sa.false(), Enrolment.key_fingerprint, *_OF_BOTH, Enrolment.created_at
        )
        .join(Device, _DEVICE)
        .where(Enrolment.tenant_id == tenant_id, _FIRST_WAITS, Device.status == DeviceStatus.PENDING)
    )  # fmt: skip
    rows = tx.execute(query.order_by(Enrolment.created_at, Enrolment.id).limit(limit))
    return [Asking(*row) for row in rows]


def asking_again(tx: Connection, tenant_id: str, *, limit: int) -> Sequence[Asking]:
    """The devices that are in and wait to be given a certificate for another key, who has waited longest first."""
    query = (
        sa.select(
            Device.id, Device.name, sa.true(), Reenrolment.key_fingerprint, *_OF_BOTH, Reenrolment.asked_at
        )
        .select_from(Reenrolment)
        .join(Enrolment, Enrolment.id == Reenrolment.enrolment_id)
        .join(Device, _DEVICE)
        .where(Reenrolment.tenant_id == tenant_id, _AGAIN_WAITS, Device.status == DeviceStatus.ACTIVE)
    )  # fmt: skip
    rows = tx.execute(query.order_by(Reenrolment.asked_at, Reenrolment.enrolment_id).limit(limit))
    return [Asking(*row) for row in rows]
