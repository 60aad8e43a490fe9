"""What holds for the rows of an upload before they are registered: which devices there are, and what rows name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from config import Settings
from core.errors import ExternalIdTaken, StateConflict
from core.states import DeviceStatus
from pki.profiles import DEFAULT, CertificateProfile
from store import bulk, groups
from store.audit import Actor
from store.bulk import KnownDevice
from store.database import Database
from store.groups import GroupRecord
from workflows.admission import checked_topics
from workflows.credentials import DeviceRequest
from workflows.profiles import find_profiles
from workflows.tenants import TenantTerms


@dataclass(frozen=True, slots=True)
class Known:
    """What holds for some rows of an ``actor``: the tenant's terms, the devices there are by external id.

    Profiles and groups that rows name are by name, ``groups_of`` the groups of those devices by their ids.
    """

    actor: Actor
    tenant: TenantTerms
    devices: Mapping[str, KnownDevice] = field(default_factory=dict)
    profiles: Mapping[str, CertificateProfile] = field(default_factory=dict)
    groups: Mapping[str, GroupRecord] = field(default_factory=dict)
    groups_of: Mapping[str, Sequence[GroupRecord]] = field(default_factory=dict)


def find_known(database: Database, tenant: TenantTerms, actor: Actor, requests: Sequence[DeviceRequest]) -> Known:
    """Look up which devices of the rows are there already, and what the rows name; nothing if they name nothing."""
    external_ids = [request.external_id for request in requests if request.external_id is not None]
    profiles = {request.profile for request in requests} - {None}
    named = {name for request in requests for name in request.groups}
    if not external_ids and not profiles and not named:
        return Known(actor, tenant)
    with database.snapshot() as tx:
        known = bulk.find_known(tx, tenant.id, external_ids)
        ids = [found.device.id for found in known.values()]
        return Known(
            actor,
            tenant,
            known,
            find_profiles(tx, tenant.id, profiles),
            groups.groups_named(tx, tenant.id, named) if named else {},
            groups.groups_of_devices(tx, tenant.id, ids) if ids else {},
        )


def check_same(settings: Settings, known: Known, request: DeviceRequest, found: KnownDevice) -> None:
    """Raise if the row describes the device differently: it may be meant for another one."""
    device = found.device
    if device.status is DeviceStatus.REVOKED:
        raise StateConflict(
            f"The external_id is that of device {device.id}, which is revoked; free it for a successor by PATCH"
            " of that device with external_id null (portal update --free-external-id), or give the row another."
        )
    if device.status is DeviceStatus.PENDING:
        raise StateConflict(
            f"The external_id is that of device {device.id}, which is expected to enrol by itself; leave the row"
            " out, or give it another."
        )
    topics = checked_topics(settings, known.tenant, request.topics, device.id)
    own = None if device.topics_group_id is not None else found.topics
    same = {name: getattr(request, name) == getattr(device, name) for name in ("name", "type", "location", "firmware")}
    same["profile"] = (request.profile or DEFAULT) == device.profile
    same["metadata"] = dict(request.metadata) == device.metadata
    same["topics"] = own == (None if topics is None else tuple((topic.filter, topic.access) for topic in topics))
    # An operator may have put it into others since; a row without groups says nothing about them.
    same["groups"] = {*request.groups} <= {group.name for group in known.groups_of.get(device.id, ())}
    *others, last = [name for name, is_same in same.items() if not is_same] or [""]
    if last:
        what = f"{', '.join(others)} and {last}" if others else last
        raise ExternalIdTaken(
            f"The external_id is that of device {device.id}, which differs in {what}; change that device, or give the"
            " row another external_id."
        )
