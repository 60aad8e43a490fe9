"""Devices: their rows, topics, lists, and what suspending one changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import CertificateStatus, DeviceStatus
from core.topics import is_device_id
from store.certificates import CURRENT, OF_DEVICE, of_device
from store.database import columns_of
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
    former_external_id: str | None


DEVICE_COLUMNS = columns_of(DeviceRecord, Device)


# Statements are built once where a request that is to be quick runs them: that takes longer than to run them.
_UPDATE_DEVICE = sa.update(cast(sa.Table, Device.__table__)).where(
    Device.tenant_id == sa.bindparam("of_tenant"), Device.id == sa.bindparam("of_device")
)


def update_device(tx: Connection, tenant_id: str, device_id: str, values: dict[str, Any]) -> None:
    """Set columns of a device, by their names."""
    tx.execute(_UPDATE_DEVICE, {**values, "of_tenant": tenant_id, "of_device": device_id})


def owner_of(tx: Connection, tenant_id: str, external_id: str) -> str | None:
    """Return the id of the device with an external id."""
    return tx.execute(
        sa.select(Device.id).where(Device.tenant_id == tenant_id, Device.external_id == external_id)
    ).scalar_one_or_none()


def devices_by_status(tx: Connection, tenant_id: str) -> dict[str, int]:
    """Return how many devices there are in each status; a status without devices is left out."""
    rows = tx.execute(
        sa.select(Device.status, sa.func.count()).where(Device.tenant_id == tenant_id).group_by(Device.status)
    )
    return {row[0]: row[1] for row in rows}


# --- Topics ----------------------------------------------------------------------------------------------------------


def device_topics(tx: Connection, tenant_id: str, device_id: str) -> tuple[tuple[str, str], ...]:
    """Return a device's own topics as pairs of filter and access, in their order."""
    own = TOPICS.where(AclEntry.tenant_id == tenant_id, AclEntry.device_id == device_id)
    return tuple(topics_by_device(tx, own).get(device_id, ()))


TOPICS = sa.select(AclEntry.device_id, AclEntry.filter, AclEntry.access).order_by(AclEntry.device_id, AclEntry.position)


def topics_by_device(
    tx: Connection, query: sa.Select[str, str, str], **parameters: Any
) -> dict[str, list[tuple[str, str]]]:
    """Return own topics as pairs of filter and access, by device id; ``query`` is ``TOPICS`` with conditions."""
    topics: dict[str, list[tuple[str, str]]] = {}
    for device_id, pattern, access in tx.execute(query, parameters):
        topics.setdefault(device_id, []).append((pattern, access))
    return topics


# --- Lists -----------------------------------------------------------------------------------------------------------

# If several conditions narrow a list, no index holds its rows one after the other. A page therefore ends after this
# many devices were read, however few of them match, and the next page continues there.
LOOKED_AT = 1000
LOOKED_AT_BY_END = 200  # in the order of expiry, where each certificate needs a look at its device
Place = tuple[datetime, str]  # in a list: creation time or not_after, and the id of a device


@dataclass(frozen=True, slots=True)
class DeviceFilter:
    """The conditions of a list; ``None`` sets none. ``q`` is a part of a name, or a whole id."""

    status: str | None = None
    type: str | None = None
    location: str | None = None
    q: str | None = None
    expires_before: datetime | None = None
    external_id: str | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """Devices with the not_after and not_before of their certificates; ``end`` is the place where reading stopped."""

    devices: Sequence[tuple[DeviceRecord, datetime | None, datetime | None]]
    end: Place | None


def list_devices(
    tx: Connection, tenant_id: str, wanted: DeviceFilter, *, limit: int, after: Place | None = None
) -> Listed:
    """Return a page of devices, newest first, or with ``expires_before`` in the order of their certificates' expiry.

    ``after`` is the place of the last device of the previous page, or its ``end`` (keyset paging). Each filter and each
    order has an index; with several filters only ``LOOKED_AT`` devices are read, and ``end`` says that there are more.
    """
    place: tuple[Any, Any]
    query = sa.select(*DEVICE_COLUMNS, Certificate.not_after, Certificate.not_before)
    current = sa.and_(Certificate.device_id == Device.id, CURRENT)
    if wanted.expires_before is None:
        place = (Device.created_at, Device.id)
        query = query.outerjoin_from(Device, Certificate, current)
    else:
        place = (Certificate.not_after, Certificate.device_id)
        query = query.join_from(Certificate, Device, current)
    equal = _equalities(wanted)
    lead, end = _reach(tx, tenant_id, wanted, equal, place, after)
    for column, value in equal:
        # An expression hides the other indexes from the database, so that it uses the one of ``lead``.
        query = query.where(column == value if column is lead else column.concat("") == value)
    if wanted.q is not None and not is_device_id(wanted.q.lower()):
        # Each database folds the case of both sides in its own way.
        query = query.where(Device.name.icontains(wanted.q, autoescape=True))
    rows = tx.execute(_between(query, tenant_id, wanted, place, after, end).limit(limit))
    return Listed([(DeviceRecord(*row[:-2]), row[-2], row[-1]) for row in rows], end)


def _equalities(wanted: DeviceFilter) -> list[tuple[Any, str]]:
    """Return the columns that must equal a value, unique ones first."""
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
    """Return the column whose index the page is read from, and the place where it must end (``None`` for no limit).

    It is the column of the rarest value here: the one of which a fixed number of rows reaches furthest in the list.
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
    """Narrow a query to the rows after one place and up to another, in the order of the list."""
    here, kind = sa.tuple_(*place), place[0].type
    first, last = (sa.tuple_(sa.literal(at[0], kind), at[1]) if at is not None else None for at in (after, end))
    if wanted.expires_before is None:
        query = query.where(Device.tenant_id == tenant_id).order_by(*(column.desc() for column in place))
        bounds = [] if first is None else [here < first]
        bounds += [] if last is None else [here >= last]
    else:
        query = query.where(Certificate.tenant_id == tenant_id).order_by(*place)
        bounds = [] if first is None else [here > first]
        # Only one of them, because a database uses only one condition as the upper bound of an index scan.
        bounds.append(Certificate.not_after < wanted.expires_before if last is None else here <= last)
    return query.where(*bounds)


# --- Suspension ------------------------------------------------------------------------------------------------------

HOLD = "certificate_hold"


class CertificateChange:
    """An update of certificates, built once, that marks their issuers so that new CRLs are signed.

    The columns of ``values`` may be bound parameters, as may the conditions of ``which``.
    """

    def __init__(self, *which: sa.ColumnElement[bool], **values: Any) -> None:
        issuers = sa.select(Certificate.issuer_id).where(*which)
        self._mark = (
            sa.update(IssuerRow).where(IssuerRow.id.in_(issuers)).values(revoked_generation=sa.bindparam("changed_at"))
        )
        self._change = sa.update(Certificate).where(*which).values(**values)

    def run(self, tx: Connection, *, generation: int, **parameters: Any) -> int:
        """Make the change at ``generation``, which is also the parameter ``changed_at``; return how many there were."""
        parameters["changed_at"] = generation
        tx.execute(self._mark, parameters)
        return tx.execute(self._change, parameters).rowcount


_SUSPEND = CertificateChange(
    *OF_DEVICE,
    Certificate.status.in_((CertificateStatus.ACTIVE, CertificateStatus.REPLACED)),
    status=CertificateStatus.HELD,
    revoked_at=sa.bindparam("at"),
    revocation_reason=HOLD,
    generation=sa.bindparam("changed_at"),
)
_RESUME = CertificateChange(
    *OF_DEVICE,
    Certificate.status == CertificateStatus.HELD,
    status=sa.case(
        (Certificate.replaced_until.is_(None), sa.literal(CertificateStatus.ACTIVE, Certificate.status.type)),
        else_=sa.literal(CertificateStatus.REPLACED, Certificate.status.type),
    ),
    revoked_at=None,
    revocation_reason=None,
    generation=sa.bindparam("changed_at"),
)


def suspend_device(tx: Connection, tenant_id: str, device_id: str, *, suspended_at: datetime, generation: int) -> None:
    """Suspend a device and put all its usable certificates on hold (RFC 5280 section 5.3.1)."""
    values = {"status": DeviceStatus.SUSPENDED, "updated_at": suspended_at, "generation": generation}
    update_device(tx, tenant_id, device_id, values)
    _SUSPEND.run(tx, generation=generation, of_tenant=tenant_id, of_device=device_id, at=suspended_at)


def resume_device(tx: Connection, tenant_id: str, device_id: str, *, resumed_at: datetime, generation: int) -> None:
    """Make a suspended device active again; each certificate on hold returns to its former state."""
    values = {"status": DeviceStatus.ACTIVE, "updated_at": resumed_at, "generation": generation}
    update_device(tx, tenant_id, device_id, values)
    _RESUME.run(tx, generation=generation, of_tenant=tenant_id, of_device=device_id)


def suspended_since(tx: Connection, tenant_id: str, device_id: str) -> datetime | None:
    """Return when the certificates of a device were put on hold, ``None`` if none is."""
    query = sa.select(sa.func.max(Certificate.revoked_at)).where(
        *of_device(tenant_id, device_id), Certificate.status == CertificateStatus.HELD
    )
    since: datetime | None = tx.execute(query).scalar_one()
    return since
