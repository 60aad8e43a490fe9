"""Devices: their rows, topics, lists, and what suspending one changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.device_status import DeviceStatus
from core.states import CertificateStatus
from core.topics import is_device_id
from store.certificates import CURRENT
from store.tables import AclEntry, Certificate, Device, IssuerRow


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A row of ``devices``."""

    id: str
    tenant_id: str
    external_id: str | None
    name: str
    type: str
    location: str
    firmware: str
    metadata: dict[str, Any]
    own_topics: bool
    status: DeviceStatus
    created_at: datetime
    updated_at: datetime
    revoked_at: datetime | None
    revocation_reason: str | None
    generation: int


DEVICE_COLUMNS = tuple(Device.__table__.c[name] for name in (
    "id", "tenant_id", "external_id", "name", "type", "location", "firmware", "metadata", "own_topics", "status",
    "created_at", "updated_at", "revoked_at", "revocation_reason", "generation",
))  # fmt: skip


def device_record(row: Sequence[Any]) -> DeviceRecord:
    """Read a row of ``DEVICE_COLUMNS``."""
    return DeviceRecord(*row)


def update_device(tx: Connection, tenant_id: str, device_id: str, values: dict[str, Any]) -> None:
    """Set columns of a device, by the columns' names."""
    tx.execute(sa.update(Device).where(Device.tenant_id == tenant_id, Device.id == device_id).values(values))


def devices_by_status(tx: Connection, tenant_id: str) -> dict[str, int]:
    """How many devices there are in each status that any is in."""
    rows = tx.execute(
        sa.select(Device.status, sa.func.count()).where(Device.tenant_id == tenant_id).group_by(Device.status)
    )
    return {row[0]: row[1] for row in rows}


# --- Topics ----------------------------------------------------------------------------------------------------------


def device_topics(tx: Connection, tenant_id: str, device_id: str) -> tuple[tuple[str, str], ...]:
    """The topics of a device that has its own, as pairs of filter and access, in their order."""
    rows = tx.execute(
        sa.select(AclEntry.filter, AclEntry.access)
        .where(AclEntry.tenant_id == tenant_id, AclEntry.device_id == device_id)
        .order_by(AclEntry.position)
    )
    return tuple((row.filter, row.access) for row in rows)


# --- Lists -----------------------------------------------------------------------------------------------------------

# Where more than one thing narrows a list, no index has its rows one after the other. So a page ends after so many
# devices that were looked at, however few of them it holds, and the next one goes on there.
LOOKED_AT = 1000
LOOKED_AT_BY_END = 200  # in the order of the certificates' ends: each of them has its device looked up
Place = tuple[datetime, str]  # in a list: creation time, or else not_after, and id of a device


@dataclass(frozen=True, slots=True)
class DeviceFilter:
    """Which devices a list is to hold; ``None`` does not narrow it. ``q`` is a part of a name, or a whole id."""

    status: str | None = None
    type: str | None = None
    location: str | None = None
    q: str | None = None
    expires_before: datetime | None = None
    external_id: str | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """Devices with the not_after and not_before of their certificates; ``end`` is where looking at them stopped."""

    devices: Sequence[tuple[DeviceRecord, datetime | None, datetime | None]]
    end: Place | None


def list_devices(
    tx: Connection, tenant_id: str, wanted: DeviceFilter, *, limit: int, after: Place | None = None
) -> Listed:
    """A page of devices, newest first; in the order of their certificates' not_after where one asks by that.

    ``after`` is the place of the last device of the page before, or its ``end`` (keyset paging). Each filter and each
    order has an index; with several of them so many devices are looked at, and ``end`` says that there are more.
    """
    place = (Device.created_at, Device.id)
    if wanted.expires_before is not None:
        place = (Certificate.not_after, Certificate.device_id)  # type: ignore[assignment]
    equal = _equalities(wanted)
    lead, end = _reach(tx, tenant_id, wanted, equal, place, after)
    query = sa.select(*DEVICE_COLUMNS, Certificate.not_after, Certificate.not_before)
    current = sa.and_(Certificate.device_id == Device.id, CURRENT)
    if wanted.expires_before is None:
        query = query.outerjoin_from(Device, Certificate, current)
    else:
        query = query.join_from(Certificate, Device, current)
    for column, value in equal:
        # Of several indexes a database may choose any: an expression leaves it the one that leads.
        query = query.where(column == value if column is lead else column.concat("") == value)
    if wanted.q is not None and not is_device_id(wanted.q.lower()):
        # The database folds both sides, each in its way.
        query = query.where(Device.name.icontains(wanted.q, autoescape=True))
    rows = tx.execute(_between(query, tenant_id, wanted, place, after, end).limit(limit))
    return Listed([(device_record(row[:-2]), row[-2], row[-1]) for row in rows], end)


def _equalities(wanted: DeviceFilter) -> list[tuple[Any, str]]:
    """The columns that must have a value; first those that one device has at the most."""
    q = None if wanted.q is None else wanted.q.lower()
    values = (
        (Device.id, q if q is not None and is_device_id(q) else None),
        (Device.external_id, wanted.external_id),
        (Device.status, wanted.status),
        (Device.type, wanted.type),
        (Device.location, wanted.location),
    )
    return [(column, value) for column, value in values if value is not None]


def _reach(
    tx: Connection,
    tenant_id: str,
    wanted: DeviceFilter,
    equal: list[tuple[Any, str]],
    place: tuple[Any, Any],
    after: Place | None,
) -> tuple[Any, Place | None]:
    """The column whose index the page is read from, and where the page must end; ``None``: nowhere.

    The one that leads is that of which as many rows reach furthest: the rarest, at this place of the list.
    """
    if equal and equal[0][0] in (Device.id, Device.external_id):
        return equal[0][0], None
    leads: list[tuple[Any, Any]] = [(None, None)] if wanted.expires_before is not None or not equal else list(equal)
    if wanted.q is None and len(equal) + (wanted.expires_before is not None) < 2:
        return leads[0][0], None
    many = LOOKED_AT if wanted.expires_before is None else LOOKED_AT_BY_END
    furthest: tuple[Any, Place | None] = (None, None)
    for column, value in leads:
        query = _between(sa.select(*place), tenant_id, wanted, place, after, None)
        if column is not None:
            query = query.where(column == value)
        elif wanted.expires_before is not None:
            query = query.where(CURRENT)
        row = tx.execute(query.limit(1).offset(many - 1)).one_or_none()
        if row is None:
            return column, None
        end: Place = (row[0], row[1])
        if furthest[1] is None or (end > furthest[1] if wanted.expires_before is not None else end < furthest[1]):
            furthest = column, end
    return furthest


def _between(
    query: sa.Select[Any],
    tenant_id: str,
    wanted: DeviceFilter,
    place: tuple[Any, Any],
    after: Place | None,
    end: Place | None,
) -> sa.Select[Any]:
    """Narrow a query to what comes after one place and not after another, in the order of the list."""
    here, kind = sa.tuple_(*place), place[0].type
    first, last = (sa.tuple_(sa.literal(at[0], kind), at[1]) if at is not None else None for at in (after, end))
    if wanted.expires_before is None:
        query = query.where(Device.tenant_id == tenant_id).order_by(*(column.desc() for column in place))
        bounds = [] if first is None else [here < first]
        bounds += [] if last is None else [here >= last]
    else:
        query = query.where(Certificate.tenant_id == tenant_id).order_by(*place)
        bounds = [] if first is None else [here > first]
        # One or the other: a database takes only one of them for the end of what it reads of the index.
        bounds.append(Certificate.not_after < wanted.expires_before if last is None else here <= last)
    return query.where(*bounds)


# --- Suspension ------------------------------------------------------------------------------------------------------

HOLD = "certificate_hold"


def suspend_device(tx: Connection, tenant_id: str, device_id: str, *, suspended_at: datetime, generation: int) -> None:
    """Suspend a device and put every certificate with which it could get in on hold (RFC 5280 section 5.3.1)."""
    values = {"status": DeviceStatus.SUSPENDED, "updated_at": suspended_at, "generation": generation}
    update_device(tx, tenant_id, device_id, values)
    _change_certificates(
        tx,
        (
            *_certificates_of(tenant_id, device_id),
            Certificate.status.in_((CertificateStatus.ACTIVE, CertificateStatus.REPLACED)),
        ),
        {
            "status": CertificateStatus.HELD,
            "revoked_at": suspended_at,
            "revocation_reason": HOLD,
            "generation": generation,
        },
    )


def resume_device(tx: Connection, tenant_id: str, device_id: str, *, resumed_at: datetime, generation: int) -> None:
    """Let a device back in: each certificate on hold becomes what it was."""
    values = {"status": DeviceStatus.ACTIVE, "updated_at": resumed_at, "generation": generation}
    update_device(tx, tenant_id, device_id, values)
    was = sa.case(
        (Certificate.replaced_until.is_(None), sa.literal(CertificateStatus.ACTIVE, Certificate.status.type)),
        else_=sa.literal(CertificateStatus.REPLACED, Certificate.status.type),
    )
    _change_certificates(
        tx,
        (*_certificates_of(tenant_id, device_id), Certificate.status == CertificateStatus.HELD),
        {"status": was, "revoked_at": None, "revocation_reason": None, "generation": generation},
    )


def suspended_since(tx: Connection, tenant_id: str, device_id: str) -> datetime | None:
    """When the certificates of a device were put on hold, ``None`` where none is."""
    query = sa.select(sa.func.max(Certificate.revoked_at)).where(
        *_certificates_of(tenant_id, device_id), Certificate.status == CertificateStatus.HELD
    )
    since: datetime | None = tx.execute(query).scalar_one()
    return since


def _certificates_of(tenant_id: str, device_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return Certificate.tenant_id == tenant_id, Certificate.device_id == device_id


def _change_certificates(tx: Connection, which: tuple[sa.ColumnElement[bool], ...], values: dict[str, object]) -> None:
    """Change certificates, and say to their issuers that their CRLs must follow."""
    issuers = sa.select(Certificate.issuer_id).where(*which)
    tx.execute(sa.update(IssuerRow).where(IssuerRow.id.in_(issuers)).values(revoked_generation=values["generation"]))
    tx.execute(sa.update(Certificate).where(*which).values(values))
