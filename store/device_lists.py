"""The database's lists of devices, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.topics import is_device_id
from store.devices import DEVICE_COLUMNS, DeviceRecord, device_record
from store.reads import CURRENT
from store.tables import Certificate, Device

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
