"""The use cases of groups: named sets of devices, which can set something for those that are in them.

A group has members, or a saved filter, which finds devices when they are asked for. What a group sets for its members
is said by ``workflows/memberships.py``. A device is in at most one group that sets the same thing.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import EllipsisType
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import db
from config import Settings
from core.errors import (
    DeviceNotFound,
    FieldProblem,
    GroupInUse,
    GroupsDisagree,
    InputInvalid,
    QuotaReached,
    StateConflict,
)
from core.failpoints import failpoint
from core.states import PresenceState
from core.topics import Access, Topic, default_topics, reads_less
from store import groups
from store.audit import Actor
from store.database import Database
from store.devices import DeviceFilter
from store.groups import GroupRecord
from workflows import memberships
from workflows.admission import checked_topics
from workflows.attestation.policies import PolicyRequest, check_policy, in_audit, set_policy
from workflows.memberships import SET_FOR_MEMBERS, check_admin, record_change, sets
from workflows.reconciliation import Reconciler
from workflows.tenants import TenantDirectory, TenantTerms

EXPIRES_WITHIN_DAYS = "expires_within_days"  # a condition of a saved filter, which counts from when it is asked
CONNECTED = {
    "true": PresenceState.CONNECTED,
    "false": PresenceState.OFFLINE,
    "never": PresenceState.NEVER_SEEN,
}
MAX_GROUPS = 1000  # of a tenant
CHANGED_AT_ONCE = 1000  # members, each of which is a parameter of a statement
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class GroupChanged:
    """A group after a change, with the devices that were added and removed.

    ``enforced`` is ``None`` if the broker had nothing to learn, else whether it was seen to obey; ``problem`` says why
    not.
    """

    group: GroupRecord
    added: int = 0
    removed: int = 0
    enforced: bool | None = None
    problem: str | None = None


@dataclass(eq=False, repr=False)
class Groups:
    """Adds, changes and removes groups, and who is in them."""

    _settings: Settings
    _database: Database
    _tenants: TenantDirectory
    _reconciler: Reconciler
    _clock: Callable[[], datetime]

    def groups(self, tenant_id: str) -> Sequence[GroupRecord]:
        """Return every group, by name."""
        with self._database.snapshot() as tx:
            return groups.list_groups(tx, tenant_id)

    def group(self, tenant_id: str, name: str) -> GroupRecord:
        """Return a group; raises ``NotFound``."""
        with self._database.snapshot() as tx:
            return groups.get_group(tx, tenant_id, name)

    def add(
        self,
        actor: Actor,
        name: str,
        description: str,
        *,
        saved: Mapping[str, Any] | None,
        topics: Pairs | None,
        validity_days: int | None,
    ) -> GroupRecord:
        """Add a group, without members yet, or with a ``saved`` filter.

        Raises ``GroupInUse`` for a name that is taken, ``QuotaReached``, ``TopicRefused``, and ``StateConflict`` for a
        filter together with what is set for members.
        """
        now, tenant = self._clock(), self._tenants.of(actor.tenant_id)
        own = self._checked(tenant, topics)
        record = GroupRecord(
            secrets.token_hex(8), tenant.id, name, description, saved, own, validity_days, None, 0, now, now
        )
        _check_filter(record)
        try:
            with self._database.transaction() as tx:
                if groups.count_groups(tx, tenant.id) >= MAX_GROUPS:
                    raise QuotaReached(f"There are {MAX_GROUPS} groups, as many as a tenant can have; remove one.")
                groups.add_group(tx, record)
                record_change(tx, actor, "group:add", name, now, **_shown(record))
        except IntegrityError:
            raise GroupInUse(f"There is a group {name} already; choose another name.") from None
        return record

    def update(
        self, actor: Actor, name: str, changes: Mapping[str, Any], policy: PolicyRequest | EllipsisType | None = ...
    ) -> GroupChanged:
        """Change what a group says, by the names of its fields; the answer comes once the broker obeys.

        ``policy`` is left out to keep the appraisal policy, ``None`` to have none; it takes an admin.

        Its members that have no topics of their own have other topics from the commit on, all at one generation. Raises
        ``NotFound``, ``TopicRefused``, ``StateConflict`` for a filter of a group with members or that sets something,
        ``GroupsDisagree`` if a member is in another group that sets the same.
        """
        now, tenant, generation = self._clock(), self._tenants.of(actor.tenant_id), 0
        if isinstance(policy, PolicyRequest):
            check_policy(actor, policy, now=now)
        elif policy is None:
            check_admin(actor)
        if "topics" in changes:
            changes = {**changes, "topics": self._checked(tenant, changes["topics"])}
        with self._database.transaction() as tx:
            before = groups.get_group(tx, tenant.id, name, for_update=True)
            told = {field: changes[field] for field in sorted(changes)}
            if not isinstance(policy, EllipsisType):
                of_group = (
                    None if policy is None else set_policy(tx, actor, before.attestation_policy_id, policy, now=now)
                )
                changes = {**changes, "attestation_policy_id": of_group}
                told |= in_audit(policy, now=now) or {"attestation": None}
            group = dataclasses.replace(before, **changes, updated_at=now)
            _check_filter(group)
            if group.filter is not None and group.members:
                raise StateConflict(f"The group {name} has members; remove them before it gets a filter.")
            newly = [one for one in SET_FOR_MEMBERS if sets(group, one) and not sets(before, one)]
            if newly:
                groups.lock_members(tx, group)
                _check_others(tx, group, newly, None)
            groups.update_group(tx, tenant.id, group.id, {**changes, "updated_at": now})
            if group.pairs != before.pairs and group.members:
                generation = db.next_generation(tx, at=now)
                narrowed = _reads_less(tenant, before.pairs, group.pairs)
                change = groups.take_topics if group.pairs is None else groups.give_topics
                change(tx, group, among=None, generation=generation, narrowed=narrowed, at=now)
            record_change(tx, actor, "group:update", name, now, **told)
        return self._enforced(GroupChanged(group), generation)

    def change_members(
        self, actor: Actor, name: str, add: Collection[str], remove: Collection[str] = ()
    ) -> GroupChanged:
        """Add devices to a group and remove others, all or none; those in it already, or not in it, stay so.

        Raises ``NotFound``, ``DeviceNotFound``, ``StateConflict`` for a group with a filter, ``QuotaReached``, and
        ``GroupsDisagree`` if a device is in another group that sets the same.
        """
        now, tenant, generation = self._clock(), self._tenants.of(actor.tenant_id), 0
        with self._database.transaction() as tx:
            group = groups.get_group(tx, tenant.id, name, for_update=True)
            if group.filter is not None:
                raise StateConflict(f"Who is in the group {name} follows from its filter; change that.")
            if group.attestation_policy_id is not None:
                check_admin(actor)
            created = groups.lock_devices(tx, tenant.id, {*add, *remove})
            for device_id in sorted({*add, *remove} - set(created)):
                raise DeviceNotFound(f"There is no device {device_id}; nothing was changed.")
            there = groups.members_among(tx, tenant.id, group.id, created)
            new, gone = {one: created[one] for one in sorted({*add} - there)}, sorted({*remove} & there)
            if new or gone:
                generation = self._write_members(tx, actor, tenant, group, new, gone, now)
            group = groups.get_group(tx, tenant.id, name)
        return self._enforced(GroupChanged(group, len(new), len(gone)), generation)

    def put(self, actor: Actor, name: str, add: Sequence[str], remove: Sequence[str]) -> GroupChanged:
        """Add and remove any number of devices as ``change_members`` does, some thousand in each transaction."""
        changed = GroupChanged(self.group(actor.tenant_id, name), enforced=None)
        for start in range(0, max(len(add), len(remove)), CHANGED_AT_ONCE):
            part = slice(start, start + CHANGED_AT_ONCE)
            after = self.change_members(actor, name, add[part], remove[part])
            worst = changed if changed.enforced is False else after
            added, removed = changed.added + after.added, changed.removed + after.removed
            changed = GroupChanged(after.group, added, removed, worst.enforced, worst.problem)
        return changed

    def _write_members(
        self,
        tx: Connection,
        actor: Actor,
        tenant: TenantTerms,
        group: GroupRecord,
        new: Mapping[str, datetime],
        gone: Sequence[str],
        now: datetime,
    ) -> int:
        """Write who is in a group; returns the generation that the broker must reach, 0 if it need not learn of it."""
        if group.members + len(new) - len(gone) > memberships.MAX_MEMBERS:
            raise QuotaReached(f"A group can have at most {memberships.MAX_MEMBERS} members; nothing was changed.")
        _check_others(tx, group, [one for one in SET_FOR_MEMBERS if sets(group, one)], new)
        groups.remove_members(tx, group, gone)
        groups.add_members(tx, group, new)
        generation = 0
        if group.pairs is not None:
            generation = db.next_generation(tx, at=now)
            narrowed = _reads_less(tenant, group.pairs, None)
            groups.take_topics(tx, group, among=gone, generation=generation, narrowed=narrowed, at=now)
            narrowed = _reads_less(tenant, None, group.pairs)
            groups.give_topics(tx, group, among=list(new), generation=generation, narrowed=narrowed, at=now)
        groups.update_group(tx, tenant.id, group.id, {"updated_at": now})
        members = {name: ids for name, ids in (("added", list(new)), ("removed", list(gone))) if ids}
        record_change(tx, actor, "group:members", group.name, now, **members)
        return generation

    def remove(self, actor: Actor, name: str) -> GroupRecord:
        """Remove a group; raises ``NotFound``, and ``GroupInUse`` if it sets something for members that it has."""
        now = self._clock()
        with self._database.transaction() as tx:
            group = groups.get_group(tx, actor.tenant_id, name, for_update=True)
            if group.attestation_policy_id is not None:
                check_admin(actor)
            being_set = [words for one, words in SET_FOR_MEMBERS.items() if sets(group, one)]
            if being_set and group.members:
                having = f"{group.members} device{'s' * (group.members != 1)}"
                raise GroupInUse(
                    f"The group {name} sets {' and '.join(being_set)} for {having}; remove them from it, or what it"
                    " sets, before you remove it."
                )
            groups.remove_group(tx, actor.tenant_id, group.id)
            record_change(tx, actor, "group:remove", name, now)
        return group

    def _checked(self, tenant: TenantTerms, topics: Pairs | None) -> list[list[str]] | None:
        """Check the topics of a group; those that are the default ones are none."""
        checked = checked_topics(self._settings, tenant, topics, None)
        return None if checked is None else [[topic.filter, topic.access.value] for topic in checked]

    def _enforced(self, changed: GroupChanged, generation: int) -> GroupChanged:
        """Have the broker obey; return the answer, which says whether it was seen to."""
        failpoint("groups.after_commit")
        if not generation:
            return changed
        outcome = self._reconciler.apply_everywhere(generation)  # taking topics away is a revocation: it does not lag
        self._reconciler.wait_for_restart()
        enforced = outcome.covers(generation)
        return dataclasses.replace(changed, enforced=enforced, problem=None if enforced else outcome.problem)


def _check_filter(group: GroupRecord) -> None:
    if group.filter is not None and any(sets(group, one) for one in SET_FOR_MEMBERS):
        raise StateConflict(
            "A group with a filter sets neither topics nor validity_days: who fits it changes with each device's"
            " description. Use a group with members."
        )


def _check_others(tx: Connection, group: GroupRecord, settings: Sequence[str], among: Collection[str] | None) -> None:
    """Raise ``GroupsDisagree`` if a member, or a device ``among`` some, is in another group with a setting."""
    for setting in settings:
        if (found := groups.members_of_others(tx, group, setting=setting, among=among)) is not None:
            device_id, other = found
            raise GroupsDisagree(
                f"The device {device_id} is in the group {other}, which sets {SET_FOR_MEMBERS[setting]} for it, too;"
                " remove it from one of them first. Nothing was changed."
            )


def _reads_less(tenant: TenantTerms, before: Pairs | None, after: Pairs | None) -> bool:
    return reads_less(_as_topics(tenant, before), _as_topics(tenant, after))


def _as_topics(tenant: TenantTerms, pairs: Pairs | None) -> Sequence[Topic]:
    if pairs is None:
        return default_topics(tenant.topic_prefix)
    return [Topic(pattern, Access(access)) for pattern, access in pairs]


def _shown(group: GroupRecord) -> dict[str, Any]:
    fields = ("description", "filter", "topics", "validity_days")
    return {name: value for name in fields if (value := getattr(group, name)) not in (None, "")}


# --- What a group stands for in a filter -----------------------------------------------------------------------------


def expanded(tx: Connection, tenant_id: str, wanted: DeviceFilter, *, now: datetime) -> DeviceFilter:
    """Return a filter with what its group stands for: members, or the conditions of its saved filter, ``now``.

    The order stays, whatever the group's conditions are; of two times before which certificates end the earlier counts.
    Raises ``NotFound``, and ``InputInvalid`` for a condition that the saved filter has with another value.
    """
    if wanted.group is None:
        return wanted
    group = groups.get_group(tx, tenant_id, wanted.group)
    if group.filter is None:
        return dataclasses.replace(wanted, member_of=group.id)
    saved: dict[str, Any] = {**group.filter}
    if (days := saved.pop(EXPIRES_WITHIN_DAYS, None)) is not None:
        until = now + timedelta(days=days)
        wanted = dataclasses.replace(
            wanted, expires_before=min(until, wanted.expires_before or until), sort=wanted.order
        )
    if (connected := saved.get("connected")) is not None:
        saved["connected"] = CONNECTED[connected]
    for name, value in saved.items():
        if getattr(wanted, name) not in (None, value):
            rule = f"is another one in the filter of the group {group.name}; leave it out"
            raise InputInvalid(f"{name} {rule}.", [FieldProblem(name, rule)])
    return dataclasses.replace(wanted, **saved, sort=wanted.order)
