"""Groups of devices: their rows, who is in them, and the topics that members have of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import aliased

from core.errors import NotFound
from core.states import ClientKind, DeviceStatus
from store.database import columns_of
from store.group_tables import DeviceGroup, GroupMember
from store.tables import AclEntry, Device


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """A row of ``device_groups``; ``topics`` are pairs of filter and access."""

    id: str
    tenant_id: str
    name: str
    description: str
    filter: Mapping[str, Any] | None
    topics: Sequence[Sequence[str]] | None
    validity_days: int | None
    attestation_policy_id: str | None
    members: int
    created_at: datetime
    updated_at: datetime

    @property
    def pairs(self) -> tuple[tuple[str, str], ...] | None:
        """Its topics as pairs of filter and access, ``None`` if it sets none."""
        return None if self.topics is None else tuple((pattern, access) for pattern, access in self.topics)


_group, _member = DeviceGroup, GroupMember
_SELECT = sa.select(*columns_of(GroupRecord, _group)).where(_group.tenant_id == sa.bindparam("of_tenant"))
_BY_NAME = _SELECT.where(_group.name == sa.bindparam("of_name"))
_OF_DEVICE = _SELECT.join(_member, _member.group_id == _group.id).where(
    _member.tenant_id == sa.bindparam("of_tenant"), _member.device_id == sa.bindparam("of_device")
)


def find_group(tx: Connection, tenant_id: str, name: str) -> GroupRecord | None:
    """Return a group by its name, ``None`` if there is none."""
    row = tx.execute(_BY_NAME, {"of_tenant": tenant_id, "of_name": name}).one_or_none()
    return None if row is None else GroupRecord(*row)


def get_group(tx: Connection, tenant_id: str, name: str, *, for_update: bool = False) -> GroupRecord:
    """Return a group by its name; raises ``NotFound``.

    ``for_update`` keeps others from changing it, or who is in it, until the transaction ends: before the rows of
    devices are locked, and before the audit head.
    """
    query = _BY_NAME.with_for_update() if for_update else _BY_NAME
    row = tx.execute(query, {"of_tenant": tenant_id, "of_name": name}).one_or_none()
    if row is None:
        raise NotFound(f"There is no group {name}; list them with GET /groups.")
    return GroupRecord(*row)


def groups_named(
    tx: Connection, tenant_id: str, names: Collection[str], *, for_update: bool = False
) -> dict[str, GroupRecord]:
    """Return the groups that have these names, by name; ``for_update`` as in ``get_group``, in one order."""
    query = _SELECT.where(_group.name.in_(names)).order_by(_group.name)
    rows = tx.execute(query.with_for_update() if for_update else query, {"of_tenant": tenant_id})
    return {group.name: group for group in (GroupRecord(*row) for row in rows)}


def list_groups(tx: Connection, tenant_id: str) -> Sequence[GroupRecord]:
    """Return every group of a tenant, by name."""
    return [GroupRecord(*row) for row in tx.execute(_SELECT.order_by(_group.name), {"of_tenant": tenant_id})]


def count_groups(tx: Connection, tenant_id: str) -> int:
    """Return how many groups a tenant has."""
    query = sa.select(sa.func.count()).select_from(_group).where(_group.tenant_id == tenant_id)
    return int(tx.execute(query).scalar_one())


def groups_of_device(tx: Connection, tenant_id: str, device_id: str) -> Sequence[GroupRecord]:
    """Return the groups that a device is a member of, by name."""
    rows = tx.execute(_OF_DEVICE.order_by(_group.name), {"of_tenant": tenant_id, "of_device": device_id})
    return [GroupRecord(*row) for row in rows]


def groups_of_devices(tx: Connection, tenant_id: str, device_ids: Collection[str]) -> dict[str, list[GroupRecord]]:
    """Return the groups that devices are members of, by device, without those that are in none."""
    found: dict[str, list[GroupRecord]] = {}
    query = sa.select(_member.device_id, *columns_of(GroupRecord, _group)).join(_group, _member.group_id == _group.id)
    own = (_member.tenant_id == tenant_id, _member.device_id.in_(device_ids))
    for device_id, *values in tx.execute(query.where(*own).order_by(_group.name)):
        found.setdefault(device_id, []).append(GroupRecord(*values))
    return found


def policy_of(tx: Connection, tenant_id: str, device_id: str) -> str | None:
    """Return the id of the appraisal policy that a group of a device sets, ``None`` if none does."""
    found = (one.attestation_policy_id for one in groups_of_device(tx, tenant_id, device_id))
    return next((policy_id for policy_id in found if policy_id is not None), None)


def group_names_of(tx: Connection, tenant_id: str, device_ids: Collection[str]) -> dict[str, list[str]]:
    """Return the names of the groups that devices are members of, by device, in alphabetical order."""
    found: dict[str, list[str]] = {}
    if not device_ids:
        return found
    query = sa.select(_member.device_id, _group.name).join(_group, _member.group_id == _group.id)
    own = (_member.tenant_id == tenant_id, _member.device_id.in_(device_ids))
    for device_id, name in tx.execute(query.where(*own).order_by(_group.name)):
        found.setdefault(device_id, []).append(name)
    return found


def add_group(tx: Connection, record: GroupRecord) -> None:
    """Record a group; a unique constraint refuses a second one of its name."""
    tx.execute(sa.insert(_group), {name: getattr(record, name) for name in GroupRecord.__slots__})


def update_group(tx: Connection, tenant_id: str, group_id: str, values: Mapping[str, Any]) -> None:
    """Set columns of a group, by their names."""
    tx.execute(sa.update(_group).where(_group.tenant_id == tenant_id, _group.id == group_id).values(dict(values)))


def remove_group(tx: Connection, tenant_id: str, group_id: str) -> None:
    """Delete a group with its members, of which none has its topics any more."""
    tx.execute(sa.delete(_member).where(_member.tenant_id == tenant_id, _member.group_id == group_id))
    tx.execute(sa.delete(_group).where(_group.tenant_id == tenant_id, _group.id == group_id))


# --- Members ---------------------------------------------------------------------------------------------------------


def lock_devices(tx: Connection, tenant_id: str, device_ids: Collection[str]) -> dict[str, datetime]:
    """Lock devices in one order until the transaction ends; return when each was created, without those not there."""
    query = sa.select(Device.id, Device.created_at).where(
        Device.tenant_id == tenant_id, Device.kind == ClientKind.DEVICE, Device.id.in_(device_ids)
    )
    return {row.id: row.created_at for row in tx.execute(query.order_by(Device.id).with_for_update())}


def members_among(tx: Connection, tenant_id: str, group_id: str, device_ids: Collection[str]) -> set[str]:
    """Return those of some devices that are members of a group."""
    own = (_member.tenant_id == tenant_id, _member.group_id == group_id, _member.device_id.in_(device_ids))
    return set(tx.execute(sa.select(_member.device_id).where(*own)).scalars())


def add_members(tx: Connection, group: GroupRecord, created: Mapping[str, datetime]) -> None:
    """Add devices, each with its time of creation, that are not members yet."""
    if not created:
        return
    rows = [
        {"group_id": group.id, "device_id": device_id, "tenant_id": group.tenant_id, "created_at": at}
        for device_id, at in created.items()
    ]
    tx.execute(sa.insert(_member), rows)
    _count(tx, group, len(rows))


def remove_members(tx: Connection, group: GroupRecord, device_ids: Collection[str]) -> None:
    """Remove devices that are members."""
    if device_ids:
        own = (_member.tenant_id == group.tenant_id, _member.group_id == group.id)
        tx.execute(sa.delete(_member).where(*own, _member.device_id.in_(device_ids)))
        _count(tx, group, -len(device_ids))


def _count(tx: Connection, group: GroupRecord, more: int) -> None:
    update_group(tx, group.tenant_id, group.id, {"members": _group.members + more})


def lock_members(tx: Connection, group: GroupRecord) -> None:
    """Lock the devices of a group, so that nobody adds them to another one before the transaction ends."""
    members = sa.select(_member.device_id).where(_member.tenant_id == group.tenant_id, _member.group_id == group.id)
    own = (Device.tenant_id == group.tenant_id, Device.id.in_(members))
    tx.execute(sa.select(Device.id).where(*own).order_by(Device.id).with_for_update()).all()


def members_of_others(
    tx: Connection, group: GroupRecord, *, setting: str, among: Collection[str] | None = None
) -> tuple[str, str] | None:
    """Return a device that another group with a value for ``setting``, a column, has, too, and the name of that group.

    ``among`` are the devices to look at, ``None`` for the members of the group.
    """
    other = aliased(_member)
    query = sa.select(other.device_id, _group.name).join(_group, other.group_id == _group.id)
    query = query.where(
        other.tenant_id == group.tenant_id, other.group_id != group.id, getattr(_group, setting).is_not(None)
    )
    if among is not None:
        query = query.where(other.device_id.in_(among))
    else:
        own = sa.select(_member.device_id).where(_member.tenant_id == group.tenant_id, _member.group_id == group.id)
        query = query.where(other.device_id.in_(own))
    row = tx.execute(query.limit(1)).one_or_none()
    return None if row is None else (row[0], row[1])


# --- The topics of members -------------------------------------------------------------------------------------------


def give_topics(
    tx: Connection, group: GroupRecord, *, among: Collection[str] | None, generation: int, narrowed: bool, at: datetime
) -> int:
    """Give the topics of a group to its members, those ``among`` some or all, that have no topics of their own.

    ``narrowed`` if they can read less than before, so that their sessions must end. Returns how many there are.
    """
    may = (Device.topics_group_id == group.id) | Device.own_topics.is_(False)
    members = sa.select(_member.device_id).where(_member.tenant_id == group.tenant_id, _member.group_id == group.id)
    which = [Device.id.in_(members), may, *([] if among is None else [Device.id.in_(among)])]
    count = _change(tx, group, which, {"own_topics": True, "topics_group_id": group.id}, generation, narrowed, at)
    for position, (pattern, access) in enumerate(group.topics or ()):
        values = (Device.id, *map(sa.literal, (position, group.tenant_id, pattern, access)))
        changed = (Device.tenant_id == group.tenant_id, Device.generation == generation)
        rows = sa.select(*values).where(*changed, Device.topics_group_id == group.id)
        columns = ("device_id", "position", "tenant_id", "filter", "access")
        tx.execute(sa.insert(AclEntry).from_select(list(columns), rows))
    return count


def take_topics(
    tx: Connection, group: GroupRecord, *, among: Collection[str] | None, generation: int, narrowed: bool, at: datetime
) -> int:
    """Return those devices to the default topics that have the topics of a group, and are ``among`` some or all."""
    which = [Device.topics_group_id == group.id, *([] if among is None else [Device.id.in_(among)])]
    return _change(tx, group, which, {"own_topics": False, "topics_group_id": None}, generation, narrowed, at)


def _change(
    tx: Connection,
    group: GroupRecord,
    which: Sequence[sa.ColumnElement[bool]],
    values: Mapping[str, Any],
    generation: int,
    narrowed: bool,
    at: datetime,
) -> int:
    """Set columns of devices, at a generation that no other change has, and delete the topics that they had."""
    own = (Device.tenant_id == group.tenant_id, Device.status != DeviceStatus.REVOKED, *which)
    # In one order, as others who lock several devices do; and before their topics, as who changes those of one does.
    tx.execute(sa.select(Device.id).where(*own).order_by(Device.id).with_for_update()).all()
    more = {"narrowed_generation": generation} if narrowed else {}
    changed = {**values, "generation": generation, "updated_at": at, **more}
    count = tx.execute(sa.update(Device).where(*own).values(changed)).rowcount
    now = sa.select(Device.id).where(
        Device.tenant_id == group.tenant_id,
        Device.generation == generation,
        Device.topics_group_id.is_not_distinct_from(values["topics_group_id"]),
    )
    tx.execute(sa.delete(AclEntry).where(AclEntry.tenant_id == group.tenant_id, AclEntry.device_id.in_(now)))
    return count
