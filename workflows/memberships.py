"""What holds for a device because of its groups, and the groups that a new device is put into.

A device is in at most one group that sets the same thing, so that no order among groups is needed: ``topics_among`` and
``life_among`` look for that one, for new devices as for those that are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from core.errors import FieldProblem, Forbidden, GroupsDisagree, InputInvalid, PortalError, QuotaReached, StateConflict
from core.roles import MAY, Permission
from core.topics import Access, Topic
from pki.profiles import CertificateTerms
from store import audit, groups
from store.audit import Actor
from store.groups import GroupRecord
from workflows import events
from workflows.credentials import CredentialRequest
from workflows.events import EventType

MAX_MEMBERS = 10_000  # of a group: what one transaction can change without others waiting for long
SET_FOR_MEMBERS = {
    "topics": "topics",
    "validity_days": "the life of certificates",
    "attestation_policy_id": "an appraisal policy",
}
_Request = TypeVar("_Request", bound=CredentialRequest)


# --- What holds for a device -----------------------------------------------------------------------------------------


def topics_among(of_device: Iterable[GroupRecord]) -> GroupRecord | None:
    """Return the one of a device's groups that sets topics, ``None`` if none does."""
    return next((group for group in of_device if group.topics is not None), None)


def life_among(of_device: Iterable[GroupRecord]) -> int | None:
    """Return for how many days a device's certificates are to be valid by its groups, ``None`` if none says."""
    return next((group.validity_days for group in of_device if group.validity_days is not None), None)


def topics_in_groups(tx: Connection, tenant_id: str, device_id: str) -> GroupRecord | None:
    """Return the group whose topics a device has unless it has its own; ``None`` if no group of its sets any."""
    return topics_among(groups.groups_of_device(tx, tenant_id, device_id))


def life_in_groups(tx: Connection, tenant_id: str, device_id: str) -> int | None:
    """Return for how many days a device's certificates are to be valid by its groups, ``None`` if none says."""
    return life_among(groups.groups_of_device(tx, tenant_id, device_id))


def with_life(request: _Request, days: int | None, terms: CertificateTerms | None) -> _Request:
    """Return a request for credentials with the life that a group sets, unless it says one itself.

    A certificate profile that allows less keeps its limit.
    """
    if days is None or request.validity_days is not None:
        return request
    most = None if terms is None else terms.profile.max_days
    return dataclasses.replace(request, validity_days=days if most is None else min(days, most))


def topics_of_new(
    own: tuple[Topic, ...] | None, of_device: Iterable[GroupRecord]
) -> tuple[tuple[Topic, ...] | None, str | None]:
    """Return the topics of a new device, ``None`` for the default ones, and the id of the group that sets them.

    ``own`` are the device's own, which come first; ``None`` for a device without.
    """
    group = topics_among(of_device) if own is None else None
    if group is None:
        return own, None
    return tuple(Topic(pattern, Access(access)) for pattern, access in group.pairs or ()), group.id


# --- The groups of a new device --------------------------------------------------------------------------------------


def sets(group: GroupRecord, setting: str) -> bool:
    """Return whether a group sets something of ``SET_FOR_MEMBERS``."""
    return getattr(group, setting) is not None


def check_admin(actor: Actor) -> None:
    """Raise ``Forbidden`` unless the actor may say whose evidence counts, and so for which devices."""
    if Permission.TOKENS not in MAY.get(actor.role, ()):
        raise Forbidden(
            f"The role {actor.role} may not change the appraisal policy of a group, or which devices it is for; ask an"
            " admin."
        )


def groups_of_new(actor: Actor, names: Sequence[str], found: Mapping[str, GroupRecord]) -> Sequence[GroupRecord]:
    """Return the groups of these names that an actor puts a new device into; ``found`` are those that exist, by name.

    Raises ``InputInvalid`` for a name that no group has, or one with a filter; ``GroupsDisagree`` if two set the same;
    ``Forbidden`` for one with an appraisal policy unless the actor is an admin.
    """
    for name in names:
        if name not in found:
            problem = FieldProblem("groups", f"name no group {name}")
            raise InputInvalid(f"There is no group {name}; list them with GET /groups.", [problem])
        if found[name].filter is not None:
            problem = FieldProblem("groups", f"name {name}, which has a filter")
            raise InputInvalid(
                f"Who is in the group {name} follows from its filter; leave it out, or change that.", [problem]
            )
    chosen = [found[name] for name in names]
    for setting, words in SET_FOR_MEMBERS.items():
        both = [group.name for group in chosen if sets(group, setting)]
        if len(both) > 1:
            raise GroupsDisagree(
                f"The groups {both[0]} and {both[1]} both set {words}; name one of them for the device."
            )
    if any(group.attestation_policy_id is not None for group in chosen):
        check_admin(actor)
    return chosen


def find_groups(tx: Connection, actor: Actor, names: Sequence[str]) -> Sequence[GroupRecord]:
    """Return the groups of these names as ``groups_of_new`` does; without names it costs no statement."""
    return groups_of_new(actor, names, groups.groups_named(tx, actor.tenant_id, names)) if names else ()


def refusals(tx: Connection, tenant_id: str, wanted: Mapping[str, Collection[GroupRecord]]) -> dict[str, PortalError]:
    """Lock the groups of new devices, and return why devices cannot be put into them, by their ids.

    ``wanted`` are the groups of each device as they were read before. Call it before other rows are locked, and before
    the generation is advanced, as whoever changes a group does. Without groups it costs no statement.
    """
    names = {group.name for of_device in wanted.values() for group in of_device}
    if not names:
        return {}
    held = groups.groups_named(tx, tenant_id, names, for_update=True)
    room = {name: MAX_MEMBERS - group.members for name, group in held.items()}
    refused: dict[str, PortalError] = {}
    for device_id, of_device in wanted.items():
        if not all(_is_same(group, held.get(group.name)) for group in of_device):
            refused[device_id] = StateConflict("The device's groups have been changed meanwhile; try again.")
        elif full := [group.name for group in of_device if room[group.name] < 1]:
            refused[device_id] = QuotaReached(
                f"The group {full[0]} has {MAX_MEMBERS} members, as many as a group can have; leave it out."
            )
        else:
            for group in of_device:
                room[group.name] -= 1
    return refused


def _is_same(before: GroupRecord, now: GroupRecord | None) -> bool:
    """Return whether a group is there still, and sets the same."""
    names = ("id", "filter", "pairs", "validity_days", "attestation_policy_id")
    return now is not None and all(getattr(before, name) == getattr(now, name) for name in names)


def put_into_groups(
    tx: Connection, tenant_id: str, wanted: Mapping[str, Collection[GroupRecord]], *, now: datetime
) -> None:
    """Make new devices, which were created ``now``, members of their groups, which ``refusals`` has locked."""
    for group, device_ids in _by_group(wanted):
        groups.add_members(tx, group, dict.fromkeys(device_ids, now))
        groups.update_group(tx, tenant_id, group.id, {"updated_at": now})


def record_put(tx: Connection, actor: Actor, wanted: Mapping[str, Collection[GroupRecord]], *, now: datetime) -> None:
    """Write event and audit entry about each group that new devices were put into: late, as all audit entries."""
    for group, device_ids in _by_group(wanted):
        record_change(tx, actor, "group:members", group.name, now, added=sorted(device_ids))


def record_change(tx: Connection, actor: Actor, action: str, name: str, now: datetime, **detail: Any) -> None:
    """Write event and audit entry about a group, of which the ``action`` says what was changed."""
    changed = action.partition(":")[2]
    events.record(tx, actor.tenant_id, EventType.GROUP_CHANGED, None, at=now, group=name, change=changed, by=actor.name)
    audit.record(tx, actor, action, f"group:{name}", at=now, **detail)


def _by_group(wanted: Mapping[str, Collection[GroupRecord]]) -> Iterable[tuple[GroupRecord, Sequence[str]]]:
    members: dict[str, list[str]] = {}
    by_name = {group.name: group for of_device in wanted.values() for group in of_device}
    for device_id, of_device in wanted.items():
        for group in of_device:
            members.setdefault(group.name, []).append(device_id)
    return [(by_name[name], members[name]) for name in sorted(members)]
