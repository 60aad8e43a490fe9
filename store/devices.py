"""Devices: their rows, topics, lists, and what suspending one changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import AttestationVerdict, CertificateStatus, ClientKind, DeviceStatus, PresenceState
from core.topics import is_device_id
from store.certificates import CURRENT, IS_APPLICATION, OF_DEVICE, of_device
from store.database import columns_of
from store.group_tables import GroupMember
from store.presences import PresenceRecord
from store.profiles import DEFAULT, id_of, name_of
from store.tables import AclEntry, Certificate, Device, IssuerRow, Presence, Tenant


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A row of ``devices``: a device, or an application."""

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
    kind: ClientKind
    profile: str  # the name of its certificate profile
    attested: AttestationVerdict | None
    topics_group_id: str | None  # of the group that its topics are those of

    @property
    def name_in_audit(self) -> str:
        """What it is called in the audit record, such as ``device:<id>``."""
        return f"{self.kind}:{self.id}"


DEVICE_COLUMNS = columns_of(DeviceRecord, Device, profile=name_of(Device.profile_id))


# Statements are built once where a request that is to be quick runs them: that takes longer than to run them.
_UPDATE_DEVICE = sa.update(cast(sa.Table, Device.__table__)).where(
    Device.tenant_id == sa.bindparam("of_tenant"), Device.id == sa.bindparam("of_device")
)


def update_device(tx: Connection, tenant_id: str, device_id: str, values: dict[str, Any]) -> None:
    """Set columns of a device, by their names."""
    tx.execute(_UPDATE_DEVICE, {**values, "of_tenant": tenant_id, "of_device": device_id})


def device_with_external_id(tx: Connection, tenant_id: str, external_id: str) -> str | None:
    """Return the id of the device with an external id."""
    return tx.execute(
        sa.select(Device.id).where(Device.tenant_id == tenant_id, Device.external_id == external_id)
    ).scalar_one_or_none()


def kind_of(tx: Connection, tenant_id: str, client_id: str) -> ClientKind:
    """Return whether an id is that of a device or of an application; of one that is not known, a device."""
    query = sa.select(Device.kind).where(Device.tenant_id == tenant_id, Device.id == client_id)
    return tx.execute(query).scalar_one_or_none() or ClientKind.DEVICE


def owner_of(tx: Connection, client_id: str) -> tuple[str, ClientKind]:
    """Return the tenant of a device or an application that the broker's files name, and which of the two it is."""
    row = tx.execute(sa.select(Device.tenant_id, Device.kind).where(Device.id == client_id)).one()
    return row.tenant_id, row.kind


# --- Topics ----------------------------------------------------------------------------------------------------------


def device_topics(tx: Connection, tenant_id: str, device_id: str) -> tuple[tuple[str, str], ...]:
    """Return a device's own topics as pairs of filter and access, in their order."""
    own = TOPICS.where(AclEntry.tenant_id == tenant_id, AclEntry.device_id == device_id)
    return tuple(topics_by_device(tx, own).get(device_id, ()))


def topics_of(tx: Connection, tenant_id: str, device_ids: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the own topics of devices as pairs of filter and access, by device id, in their order."""
    if not device_ids:
        return {}
    return topics_by_device(tx, TOPICS.where(AclEntry.tenant_id == tenant_id, AclEntry.device_id.in_(device_ids)))


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
LOOKED_AT_BY_OTHERS = 200  # in an order of other tables, where each row needs a look at its device
UNATTESTED = "none"
Place = tuple[Any, ...]  # in a list: the values of its order's columns, of which the last is the id of a device


class ListOrder(StrEnum):
    """In which order devices are listed."""

    NEWEST = "newest"
    OLDEST = "created"
    NAME = "name"
    NAME_LAST_FIRST = "-name"
    EXPIRY = "expires"  # of their certificates, the first to expire first
    LAST_SEEN = "last_seen"  # never seen, seen longest ago, …, connected
    LAST_SEEN_FIRST = "-last_seen"  # the other way round


BY_AGE = (ListOrder.NEWEST, ListOrder.OLDEST)
BY_NAME = (ListOrder.NAME, ListOrder.NAME_LAST_FIRST)
BY_SEEN = (ListOrder.LAST_SEEN, ListOrder.LAST_SEEN_FIRST)


@dataclass(frozen=True, slots=True)
class DeviceFilter:
    """The conditions of a list, of devices or of applications, and its order; ``None`` sets none.

    ``q`` is a part of a name, an external id or metadata, or a whole id; ``metadata`` is a key with its value,
    ``KEY=VALUE``; ``attested`` is a verdict, or ``none``; ``group`` is the name of a group, for which
    ``workflows/groups.py:expanded`` puts ``member_of``, its id, or the conditions that it has.
    """

    status: str | None = None
    type: str | None = None
    location: str | None = None
    q: str | None = None
    expires_before: datetime | None = None
    external_id: str | None = None
    profile: str | None = None
    connected: PresenceState | None = None
    # Of those that are connected or offline: at these brokers alone, since others are not heard now; None for any.
    at_brokers: frozenset[int] | None = None
    sort: str | None = None
    kind: ClientKind = ClientKind.DEVICE
    attested: str | None = None
    name: str | None = None
    metadata: str | None = None
    id: str | None = None
    group: str | None = None
    member_of: str | None = None

    @property
    def order(self) -> ListOrder:
        """The order: as asked for, else the one in which an index has what the filter leaves."""
        if self.sort is not None:
            return ListOrder(self.sort)
        if self.connected is not None:
            return ListOrder.LAST_SEEN_FIRST
        return ListOrder.NEWEST if self.expires_before is None else ListOrder.EXPIRY

    @property
    def is_searched(self) -> bool:
        """Whether it has a condition that no index helps with: a part of a name, or what is so of most devices."""
        is_of_group = self.member_of is not None and not self.is_read_from_members
        searched = self.q is not None or self.metadata is not None or is_of_group or self.narrows_connection
        searched |= self.narrows_brokers
        return searched or self.profile == DEFAULT or self.is_unattested

    @property
    def is_read_from_members(self) -> bool:
        """Whether the members of a group are listed in the order in which the index of members has them."""
        return self.member_of is not None and self.order in BY_AGE

    @property
    def narrows_expiry(self) -> bool:
        """Whether ``expires_before`` is a condition in another order than that of expiry."""
        return self.expires_before is not None and self.order is not ListOrder.EXPIRY

    @property
    def narrows_connection(self) -> bool:
        """Whether ``connected`` is a condition in another order than those of the connection."""
        return self.connected is not None and self.order not in BY_SEEN

    @property
    def narrows_brokers(self) -> bool:
        """Whether it is one of connections, of which those at some brokers are left out."""
        return self.at_brokers is not None and self.connected not in (None, PresenceState.NEVER_SEEN)

    @property
    def is_unattested(self) -> bool:
        """Whether only devices fit that have shown no evidence."""
        return self.attested == UNATTESTED


class ListedDevice(NamedTuple):
    """A device with the dates of its certificate, and with what is known of its connection."""

    device: DeviceRecord
    not_after: datetime | None
    not_before: datetime | None
    presence: PresenceRecord


@dataclass(frozen=True, slots=True)
class Listed:
    """A page; ``end`` is the place where reading stopped, though there may be more that match."""

    devices: Sequence[ListedDevice]
    end: Place | None


def place_of(listed: ListedDevice, wanted: DeviceFilter) -> Place:
    """Return the place of a device in its list."""
    device, presence = listed.device, listed.presence
    if wanted.order in BY_AGE:
        return device.created_at, device.id
    if wanted.order in BY_NAME:
        return device.name, device.created_at, device.id
    if wanted.order is ListOrder.EXPIRY:
        return listed.not_after, device.id
    return (
        (presence.since, device.id)
        if wanted.connected is not None
        else (int(presence.state), presence.since, device.id)
    )


def list_devices(
    tx: Connection, tenant_id: str, wanted: DeviceFilter, *, limit: int, after: Place | None = None
) -> Listed:
    """Return a page of devices in the order that ``wanted`` has.

    ``after`` is the place of the last device of the previous page, or its ``end`` (keyset paging). Each filter and each
    order has an index; with several filters only ``LOOKED_AT`` devices are read, and ``end`` says that there are more.
    """
    order, equal = _order_of(wanted), _equalities(tenant_id, wanted)
    lead, end = _reach(tx, tenant_id, wanted, order, equal, after)
    dates = (Certificate.not_after, Certificate.not_before)
    seen = (Presence.broker_id, Presence.left_at, Presence.state, Presence.since)
    query = sa.select(*DEVICE_COLUMNS, *dates, *seen).select_from(order.source)
    # The few applications have an index; among the devices they are passed over.
    query = query.where(IS_APPLICATION if wanted.kind is ClientKind.APPLICATION else Device.kind == ClientKind.DEVICE)
    for column, value in equal:
        # An expression hides the other indexes from the database, so that it uses the one of ``lead``.
        query = query.where(column == value if column is lead else column.concat("") == value)
    query = query.where(*_searched(wanted))
    if wanted.narrows_brokers:
        query = query.where(Presence.broker_id.in_(sorted(wanted.at_brokers or ())))
    if wanted.profile == DEFAULT:
        query = query.where(Device.profile_id.is_(None))
    if wanted.is_unattested:
        query = query.where(Device.attested.is_(None))
    if wanted.member_of is not None and not wanted.is_read_from_members:
        of_group = (GroupMember.group_id == wanted.member_of, GroupMember.device_id == Device.id)
        query = query.where(sa.exists().where(*of_group))
    if wanted.narrows_expiry:
        query = query.where(Certificate.not_after < wanted.expires_before)
    if wanted.narrows_connection:
        query = query.where(sa.func.coalesce(Presence.state, int(PresenceState.NEVER_SEEN)) == wanted.connected)
    rows = tx.execute(_between(query, tenant_id, wanted, order, after, end).limit(limit))
    return Listed([_listed(row) for row in rows], end)


def _searched(wanted: DeviceFilter) -> list[sa.ColumnElement[bool]]:
    """Return the conditions that each row has to be read for."""
    conditions: list[sa.ColumnElement[bool]] = []
    if wanted.q is not None and not is_device_id(wanted.q.lower()):
        # Each database folds the case of both sides in its own way. Metadata is searched as the JSON that is stored.
        metadata = sa.cast(Device.device_metadata, sa.Text)
        conditions.append(
            Device.name.icontains(wanted.q, autoescape=True)
            | Device.external_id.icontains(wanted.q, autoescape=True)
            | metadata.icontains(json.dumps(wanted.q)[1:-1], autoescape=True)
        )
    if wanted.metadata is not None:
        key, _, value = wanted.metadata.partition("=")
        conditions.append(sa.cast(Device.device_metadata[key].as_string(), sa.Text) == value)
    return conditions


def _listed(values: Sequence[Any]) -> ListedDevice:
    not_after, not_before, broker_id, left_at, state, since = values[-6:]
    device = DeviceRecord(*values[:-6])
    presence = PresenceRecord(PresenceState(state or 0), since or device.created_at, broker_id, left_at)
    return ListedDevice(device, not_after, not_before, presence)


@dataclass(frozen=True, slots=True)
class _Order:
    """An order that an index has: its columns, which way, the tables, and the conditions that the index needs."""

    columns: tuple[Any, ...]
    descending: bool
    source: sa.FromClause
    tenant: Any
    conditions: tuple[sa.ColumnElement[bool], ...] = ()
    looked_at: int = 0


def _order_of(wanted: DeviceFilter) -> _Order:
    devices, certificates, presences = Device.__table__, Certificate.__table__, Presence.__table__
    current = sa.and_(Certificate.device_id == Device.id, CURRENT)
    seen = Presence.identity == Device.id
    if wanted.is_read_from_members:
        member = GroupMember
        source = member.__table__.join(devices, Device.id == member.device_id)
        source = source.outerjoin(certificates, current).outerjoin(presences, seen)
        descending, of_group = wanted.order is ListOrder.NEWEST, (member.group_id == wanted.member_of,)
        by_age = (member.created_at, member.device_id)
        return _Order(by_age, descending, source, member.tenant_id, of_group, LOOKED_AT_BY_OTHERS)
    if wanted.order in BY_AGE or wanted.order in BY_NAME:
        source = devices.outerjoin(certificates, current).outerjoin(presences, seen)
        named = (Device.name,) if wanted.order in BY_NAME else ()
        descending = wanted.order in (ListOrder.NEWEST, ListOrder.NAME_LAST_FIRST)
        own = (*named, Device.created_at, Device.id)
        return _Order(own, descending, source, Device.tenant_id, looked_at=LOOKED_AT)
    if wanted.order is ListOrder.EXPIRY:
        source = certificates.join(devices, current).outerjoin(presences, seen)
        by_expiry = (Certificate.not_after, Certificate.device_id)
        return _Order(by_expiry, False, source, Certificate.tenant_id, (CURRENT,), LOOKED_AT_BY_OTHERS)
    source = presences.join(devices, seen).outerjoin(certificates, current)
    columns: tuple[Any, ...] = (Presence.state, Presence.since, Presence.identity)
    conditions: tuple[sa.ColumnElement[bool], ...] = ()
    if wanted.connected is not None:
        columns, conditions = columns[1:], (Presence.state == wanted.connected,)
    descending = wanted.order is ListOrder.LAST_SEEN_FIRST
    return _Order(columns, descending, source, Presence.tenant_id, conditions, LOOKED_AT_BY_OTHERS)


def _equalities(tenant_id: str, wanted: DeviceFilter) -> list[tuple[Any, Any]]:
    """Return the columns that must equal a value, unique ones first."""
    q = None if wanted.q is None else wanted.q.lower()
    has_own_profile = wanted.profile not in (None, DEFAULT)
    values = (
        (Device.id, wanted.id),
        (Device.id, q if q is not None and is_device_id(q) else None),
        (Device.external_id, wanted.external_id),
        (Device.name, wanted.name),
        (Device.status, wanted.status),
        (Device.type, wanted.type),
        (Device.location, wanted.location),
        (Device.profile_id, id_of(tenant_id, str(wanted.profile)) if has_own_profile else None),
        (Device.attested, None if wanted.is_unattested else wanted.attested),
    )
    return [(column, value) for column, value in values if value is not None]


def _reach(
    tx: Connection,
    tenant_id: str,
    wanted: DeviceFilter,
    order: _Order,
    equal: list[tuple[Any, Any]],
    after: Place | None,
) -> tuple[Any, Place | None]:
    """Return the column whose index the page is read from, and the place where it must end (``None`` for no limit).

    It is the column of the rarest value here: the one of which a fixed number of rows reaches furthest in the list.
    """
    if equal and equal[0][0] in (Device.id, Device.external_id):
        return equal[0][0], None
    by_age = wanted.order in BY_AGE and not wanted.is_read_from_members
    leads: list[tuple[Any, Any]] = [*equal] if by_age and equal else [(None, None)]
    if not wanted.is_searched and len(equal) + wanted.narrows_expiry + (not by_age) < 2:
        return leads[0][0], None
    furthest: tuple[Any, Place | None] = (None, None)
    for column, value in leads:
        source = order.columns[0].class_.__table__
        query = _between(sa.select(*order.columns).select_from(source), tenant_id, wanted, order, after, None)
        if column is not None:
            query = query.where(column == value)
        row = tx.execute(query.limit(1).offset(order.looked_at - 1)).one_or_none()
        if row is None:
            return column, None
        end: Place = tuple(row)
        if furthest[1] is None or (end < furthest[1] if order.descending else end > furthest[1]):
            furthest = column, end
    return furthest


def _between(
    query: sa.Select[Any],
    tenant_id: str,
    wanted: DeviceFilter,
    order: _Order,
    after: Place | None,
    end: Place | None,
) -> sa.Select[Any]:
    """Narrow a query to the rows after one place and up to another, in the order of the list."""
    here = sa.tuple_(*order.columns)

    def literal(place: Place) -> sa.Tuple:
        return sa.tuple_(*(sa.literal(value, at.type) for value, at in zip(place, order.columns, strict=True)))

    query = query.where(order.tenant == tenant_id, *order.conditions)
    if order.descending:
        query = query.order_by(*(column.desc() for column in order.columns))
        bounds = [] if after is None else [here < literal(after)]
        bounds += [] if end is None else [here >= literal(end)]
        return query.where(*bounds)
    query = query.order_by(*order.columns)
    bounds = [] if after is None else [here > literal(after)]
    if end is not None:
        bounds.append(here <= literal(end))
    elif wanted.order is ListOrder.EXPIRY and wanted.expires_before is not None:
        # Only one of them, because a database uses only one condition as the upper bound of an index scan.
        bounds.append(Certificate.not_after < wanted.expires_before)
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


def count_active(tx: Connection) -> int:
    """Return the number of devices that the broker must accept, of all tenants."""
    active = (Device.tenant_id.in_(sa.select(Tenant.id)), Device.status == DeviceStatus.ACTIVE)  # by the index
    count: int = tx.execute(sa.select(sa.func.count()).select_from(Device).where(*active)).scalar_one()
    return count
