"""The generation that the broker must reach, the one it has reached, and the changes since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.device_status import DeviceStatus
from core.states import CertificateStatus
from store.tables import AclEntry, BrokerState, Certificate, Device
from store.types import UtcDateTime


@dataclass(frozen=True, slots=True)
class BrokerStateRecord:
    """The generation that the broker must reach, with the one it was last seen to enforce.

    ``pending_since`` is since when the two have differed, ``None`` where they do not.
    """

    generation: int
    applied_generation: int
    applied_at: datetime | None
    pending_since: datetime | None


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


# --- What has changed ------------------------------------------------------------------------------------------------

_DENIED = sa.text("devices.status IN ('revoked', 'suspended')")
_ANY_GENERATION = (1 << 63) - 1
_ON_A_CRL = sa.text("certificates.generation > 0")
_CHANGED = sa.text("devices.generation > 0")
_OWN_TOPICS = sa.text("devices.own_topics")


@dataclass(frozen=True, slots=True)
class AclChange:
    """What the broker must know of a device: ``topics`` are pairs of filter and access, ``None`` the default ones."""

    device_id: str
    status: DeviceStatus
    topics: tuple[tuple[str, str], ...] | None
    generation: int


def acl_changes(tx: Connection, tenant_id: str, *, since: int, defaults: bool) -> Iterator[AclChange]:
    """Every device whose place in the ACL changed after generation ``since``, in the order of the changes.

    From 0 this is the whole ACL where ``defaults`` says that devices which are active with the default topics are
    wanted, too. Without them (a pattern line stands for them all) it is only the active devices with topics of their
    own, which ``newly_out`` completes.
    """
    query = sa.select(Device.id, Device.status, Device.own_topics, Device.generation).where(
        Device.tenant_id == tenant_id
    )
    entries = sa.select(AclEntry.device_id, AclEntry.filter, AclEntry.access).where(AclEntry.tenant_id == tenant_id)
    if since > 0:
        query = query.where(Device.generation > since, _CHANGED)
        changed = sa.select(Device.id).where(Device.tenant_id == tenant_id, Device.generation > since, _CHANGED)
        entries = entries.where(AclEntry.device_id.in_(changed))
    elif not defaults:
        query = query.where(_OWN_TOPICS, Device.status == DeviceStatus.ACTIVE)
    topics: dict[str, list[tuple[str, str]]] = {}
    for device_id, pattern, access in tx.execute(entries.order_by(AclEntry.device_id, AclEntry.position)):
        topics.setdefault(device_id, []).append((pattern, access))
    query = query.order_by(Device.generation)
    for device_id, status, own_topics, generation in tx.execute(query.execution_options(yield_per=5000)):
        own = tuple(topics.get(device_id, ())) if own_topics else None
        yield AclChange(device_id, status, own, generation)


def newest_denied(tx: Connection, tenant_id: str, *, newest: int, applied: int, since: datetime) -> Sequence[AclChange]:
    """The devices that were revoked or suspended last, in that order.

    They are so many of the ``newest``, with all that the broker was not yet seen to put out (after generation
    ``applied``), or that were put out or changed after the time ``since``.
    """
    query = (
        sa.select(Device.id, Device.status, Device.generation, Device.updated_at)
        .where(Device.tenant_id == tenant_id, _DENIED)
        .order_by(Device.generation.desc())
    )
    found: list[AclChange] = []
    with tx.execute(query.execution_options(yield_per=1000)) as rows:
        for device_id, status, generation, updated_at in rows:
            if len(found) >= newest and generation <= applied and updated_at <= since:
                break
            found.append(AclChange(device_id, status, None, generation))
    return found[::-1]


def denied_among(tx: Connection, tenant_id: str, device_ids: Sequence[str]) -> set[str]:
    """Which of these devices are revoked or suspended."""
    out: set[str] = set()
    for start in range(0, len(device_ids), 500):
        query = sa.select(Device.id).where(
            Device.tenant_id == tenant_id, Device.id.in_(device_ids[start : start + 500]), _DENIED
        )
        out.update(tx.execute(query).scalars())
    return out


def devices_to_disconnect(tx: Connection, tenant_id: str, *, since: int) -> list[str]:
    """Devices whose sessions must end since generation ``since``.

    They were put out (revoked or suspended), or one certificate of theirs was revoked, with which the session may have
    begun: a device that has another connects again with it.
    """
    out = sa.select(Device.id).where(
        Device.tenant_id == tenant_id,
        Device.generation > since,
        _DENIED,
    )
    lost_one = sa.select(Certificate.device_id).where(
        Certificate.generation > since,
        _ON_A_CRL,
        Certificate.tenant_id == tenant_id,
        Certificate.status == CertificateStatus.REVOKED,
        Certificate.device_id.is_not(None),
    )
    return [device_id for device_id in tx.execute(sa.union(out, lost_one)).scalars() if device_id]


def devices_denied_since(tx: Connection, tenant_id: str, since: datetime) -> list[str]:
    """Devices put out after a time: their half-open connections may still be on their way in."""
    return [change.device_id for change in newest_denied(tx, tenant_id, newest=0, applied=_ANY_GENERATION, since=since)]


def superseded_between(tx: Connection, tenant_id: str, start: datetime, end: datetime) -> list[tuple[int, str]]:
    """Certificates of devices that are in, superseded in a span of time, as pairs of row id and device.

    Only the newest thousand revocations are looked at.
    """
    newest = (
        sa.select(Certificate.id, Certificate.device_id, Certificate.revoked_at, Certificate.revocation_reason)
        .where(Certificate.tenant_id == tenant_id, _ON_A_CRL, Certificate.status == CertificateStatus.REVOKED)
        .order_by(Certificate.generation.desc())
        .limit(1000)
        .subquery()
    )
    rows = tx.execute(
        sa.select(newest.c.id, newest.c.device_id)
        .join(Device, Device.id == newest.c.device_id)
        .where(
            newest.c.revocation_reason == "superseded",
            newest.c.revoked_at > start,
            newest.c.revoked_at <= end,
            Device.status == DeviceStatus.ACTIVE,
        )
    )
    return [(row.id, row.device_id) for row in rows]
