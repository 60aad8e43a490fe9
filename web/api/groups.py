"""Groups: named sets of devices, usable wherever a filter is, with what holds for their members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from core.roles import Permission
from store.groups import GroupRecord
from web.api.devices import ChangesRequest, SearchText, TopicModel, Topics, of_changes, pairs
from web.api.evidence import AttestationPolicyModel, AttestationPolicyRequest
from web.api.fields import (
    Description,
    DeviceId,
    GroupName,
    MetadataPair,
    Name,
    Place,
    ProfileName,
    ShortText,
    StatusName,
    WholeNumber,
    given,
)
from web.api.routing import AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp
from workflows.attestation.policies import RegisteredPolicy
from workflows.groups import GroupChanged

ROUTES = Routes("Groups")

Days = Annotated[int, Field(ge=1, le=36500, description="The life of members' certificates"), WholeNumber]
Ids = Annotated[list[DeviceId], Field(max_length=1000)]
_NOT_BOTH: Any = {"not": {"allOf": [given("filter"), {"anyOf": [given("topics"), given("validity_days")]}]}}


def _narrowed(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [given(name) for name in schema["properties"]]


class SavedFilter(RequestModel):
    """Conditions, at least one, as in the list of devices; which devices fit is found out when they are asked for."""

    model_config = ConfigDict(json_schema_extra=_narrowed)

    status: StatusName | None = None
    name: Name | None = None
    type: ShortText | None = None
    location: Place | None = None
    q: SearchText | None = None
    metadata: MetadataPair | None = None
    profile: ProfileName | None = None
    attested: Literal["passed", "failed", "outdated", "none"] | None = None
    connected: Literal["true", "false", "never"] | None = None
    expires_within_days: (
        Annotated[
            int,
            Field(ge=1, le=36500, description="Whose certificate ends within so many days of the request"),
            WholeNumber,
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _not_all(self) -> Self:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError("name at least one field: no filter would mean every device")
        return self

    @property
    def conditions(self) -> dict[str, Any]:
        """Its conditions, by their names."""
        return self.model_dump(exclude_none=True)


class GroupRequest(RequestModel):
    """A group to add, whose members are added then; with a `filter` it has none, and sets nothing for them.

    `topics` are those of members without topics of their own, `validity_days` is the life of their certificates.
    """

    model_config = ConfigDict(json_schema_extra=_NOT_BOTH)

    name: GroupName
    description: Description = ""
    filter: SavedFilter | None = None
    topics: Topics | None = None
    validity_days: Days | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.filter is not None and (self.topics is not None or self.validity_days is not None):
            raise ValueError("a filter goes with neither topics nor validity_days")
        return self


def _of_patch(schema: dict[str, Any]) -> None:
    of_changes(schema)
    schema |= _NOT_BOTH


class GroupPatch(ChangesRequest):
    """What to change of a group; null takes it away. Topics count at once, a life from the next certificate on."""

    model_config = ConfigDict(json_schema_extra=_of_patch)

    description: Description = ""
    filter: SavedFilter | None = None
    topics: Topics | None = None
    validity_days: Days | None = None
    attestation: AttestationPolicyRequest | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.filter is not None and (self.topics is not None or self.validity_days is not None):
            raise ValueError("a filter goes with neither topics nor validity_days")
        return self


def _one_of_them(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [{"required": [name], "properties": {name: {"minItems": 1}}} for name in schema["properties"]]


class MembersRequest(RequestModel):
    """Devices to add to a group, and to remove from it; to repeat it does no harm."""

    model_config = ConfigDict(json_schema_extra=_one_of_them)

    add: Ids = Field(default_factory=list)
    remove: Ids = Field(default_factory=list)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.add and not self.remove:
            raise ValueError("name at least one device to add or to remove")
        return self


class GroupModel(AnswerModel):
    """A group. Its devices are listed with `GET /devices?group=NAME`; `members` counts those that were added."""

    name: str
    description: str
    filter: SavedFilter | None
    topics: list[TopicModel] | None
    validity_days: int | None
    attestation: AttestationPolicyModel | None
    members: int
    created_at: Timestamp
    updated_at: Timestamp


class GroupChangedModel(GroupModel):
    """A group after a change, and how many devices were added and removed.

    `broker` is there if topics have changed: `enforced` if the broker was seen to apply them, else `pending`.
    """

    added: int
    removed: int
    broker: Literal["enforced", "pending"] | None
    broker_problem: str | None


class GroupList(AnswerModel):
    """Every group, by name."""

    groups: list[GroupModel]


@ROUTES.add("GET", "/groups", Permission.READ)
def list_groups(call: Call) -> GroupList:
    """List groups."""
    records = call.portal.groups.groups(call.actor.tenant_id)
    policies = _policies(call, records)
    return GroupList(groups=[GroupModel.of(record, **_values(record, policies)) for record in records])


@ROUTES.add(
    "POST",
    "/groups",
    Permission.CHANGE,
    Answers("The group", model=GroupModel, status=201, headers={"Location": "The group's path"}),
    errors=(409,),
)
def add_group(call: Call, body: GroupRequest) -> Reply:
    """Add a group of devices."""
    saved = None if body.filter is None else body.filter.conditions
    added = call.portal.groups.add(
        call.actor,
        body.name,
        body.description,
        saved=saved,
        topics=pairs(body.topics),
        validity_days=body.validity_days,
    )
    return Reply(_model(call, added), headers={"Location": f"/groups/{body.name}"})


@ROUTES.add("GET", "/groups/{group}", Permission.READ)
def show_group(call: Call, group: str) -> GroupModel:
    """Show a group."""
    return _model(call, call.portal.groups.group(call.actor.tenant_id, group))


@ROUTES.add("PATCH", "/groups/{group}", Permission.CHANGE, errors=(409,))
def update_group(call: Call, group: str, body: GroupPatch) -> GroupChangedModel:
    """Change a group. Topics that members lose are refused by the broker before the answer."""
    changes = body.model_dump(exclude_unset=True, include={"description", "validity_days"})
    if "filter" in body.model_fields_set:
        changes["filter"] = None if body.filter is None else body.filter.conditions
    if "topics" in body.model_fields_set:
        changes["topics"] = pairs(body.topics)
    policy = None if body.attestation is None else body.attestation.wanted()
    given = policy if "attestation" in body.model_fields_set else ...
    return _changed(call, call.portal.groups.update(call.actor, group, changes, given))


@ROUTES.add("DELETE", "/groups/{group}", Permission.CHANGE, Answers("The group is removed"), errors=(409,))
def remove_group(call: Call, group: str) -> GroupModel:
    """Remove a group that sets nothing for members any more; its devices stay as they are."""
    return _model(call, call.portal.groups.remove(call.actor, group))


@ROUTES.add(
    "POST",
    "/groups/{group}/members",
    Permission.CHANGE,
    Answers("All of them are added and removed; a repeat gets the same group"),
    errors=(409,),
)
def change_members(call: Call, group: str, body: MembersRequest) -> GroupChangedModel:
    """Add devices to a group and remove others, all or none."""
    return _changed(call, call.portal.groups.change_members(call.actor, group, body.add, body.remove))


def _policies(call: Call, records: Sequence[GroupRecord]) -> Mapping[str | None, RegisteredPolicy]:
    ids = [record.attestation_policy_id for record in records]
    return call.portal.attestation_policies.of_ids(call.actor.tenant_id, ids) if any(ids) else {}


def _model(call: Call, record: GroupRecord) -> GroupModel:
    return GroupModel.of(record, **_values(record, _policies(call, [record])))


def _changed(call: Call, changed: GroupChanged) -> GroupChangedModel:
    broker = None if changed.enforced is None else "enforced" if changed.enforced else "pending"
    values = _values(changed.group, _policies(call, [changed.group]))
    return GroupChangedModel.of(changed, changed.group, **values, broker=broker, broker_problem=changed.problem)


def _values(record: GroupRecord, policies: Mapping[str | None, RegisteredPolicy]) -> dict[str, Any]:
    topics = None if record.pairs is None else [{"filter": one, "access": access} for one, access in record.pairs]
    policy = AttestationPolicyModel.shown(policies.get(record.attestation_policy_id))
    return {"filter": record.filter and SavedFilter(**record.filter), "topics": topics, "attestation": policy}
