"""A device's certificate over time: renew, suspend, resume, revoke; the last three for many devices at once, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from core.roles import Permission
from pki.csr import read_csr
from store.devices import DeviceFilter
from web.api.devices import ChangesRequest, DeviceConditions, IssuedAnswer, OfDevice, Topics, pairs
from web.api.fields import (
    BundleFormatName,
    BundlePassword,
    DeviceId,
    Fingerprint,
    GroupName,
    Hex,
    KeyTypeName,
    Metadata,
    Place,
    ProfileName,
    ReasonName,
    ShortText,
    WholeNumber,
    given,
)
from web.api.routing import NDJSON, AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp
from workflows.changes import ActionRefused
from workflows.devices import MOST_AT_ONCE, MOST_RENEWED
from workflows.registration import Updated
from workflows.renewal import RenewalRequest, Renewed
from workflows.revocation import Action, Revoked, Suspended

ROUTES = Routes("Devices")


class SuspensionAnswer(AnswerModel):
    """`enforced`: the broker was seen to obey; `pending`: the change is recorded, and not enforced yet."""

    device_id: DeviceId
    status: Literal["suspended", "active"]
    suspended_at: Timestamp | None
    broker: Literal["enforced", "pending"]
    broker_problem: str | None = None


class RenewRequest(RequestModel):
    """How to renew. With a `csr` the device keeps its own key, and no bundle is made.

    The previous certificate stays valid for `overlap_hours`; with `when_used` it is revoked earlier, once the device
    has presented the new one to the portal in a TLS handshake.
    """

    csr: Annotated[str, Field(max_length=16384, description="PEM, PKCS#10")] | None = None
    key_type: KeyTypeName | None = None
    validity_days: Annotated[int, Field(ge=1, le=36500), WholeNumber] | None = None
    bundle_password: BundlePassword | None = None
    bundle_format: BundleFormatName | None = None
    overlap_hours: Annotated[int, Field(ge=0, le=8760), WholeNumber] | None = None
    revoke_previous: Literal["after_overlap", "when_used"] = "after_overlap"


class RenewedAnswer(IssuedAnswer):
    """The new certificate, with a download link and a bundle password or, for a `csr`, itself and its chain.

    `previous_valid_until` says how long the previous certificate, if there is one, stays valid. `broker` is present if
    older certificates were revoked at once: `enforced` if the broker was seen to refuse them.
    """

    name: str
    previous_valid_until: Timestamp | None = None
    broker: Literal["enforced", "pending"] | None = None
    broker_problem: str | None = None


class RenewAnswer(RenewedAnswer, OfDevice):
    """The new certificate of a device."""


class RevokeRequest(RequestModel):
    """Why a device is revoked (RFC 5280 section 5.3.1)."""

    reason: ReasonName = "unspecified"


class RevokedAnswer(AnswerModel):
    """`enforced`: the broker was seen to refuse the client; `pending`: it is revoked, and not refused yet."""

    status: Literal["revoked"]
    revoked_at: Timestamp
    reason: str
    broker: Literal["enforced", "pending"]
    broker_problem: str | None = None


class RevokeAnswer(RevokedAnswer, OfDevice):
    """`enforced`: the broker was seen to refuse the device; `pending`: it is revoked, and not refused yet."""


@ROUTES.add(
    "POST",
    "/devices/{device_id}/renew",
    Permission.CHANGE,
    Answers("The new certificate is issued and durably recorded", status=201),
    body_optional=True,
    errors=(409,),
    idempotency_key=True,
)
def renew(call: Call, device_id: str, body: RenewRequest) -> RenewAnswer:
    """Issue a new certificate for a device; the previous one stays valid for a while."""
    renewed = call.portal.renewals.renew(call.actor, device_id, renewal_of(body), call.idempotency_key)
    return RenewAnswer.of(renewed, **state_of(renewed))


@ROUTES.add(
    "POST",
    "/devices/{device_id}/suspend",
    Permission.CHANGE,
    Answers("The device is suspended; a repeat gets the same answer"),
    errors=(409,),
)
def suspend(call: Call, device_id: str) -> SuspensionAnswer:
    """Suspend a device until it is resumed (certificateHold)."""
    return _suspension(call.portal.revocations.suspend(call.actor, device_id))


@ROUTES.add(
    "POST",
    "/devices/{device_id}/resume",
    Permission.CHANGE,
    Answers("The device is active again; a repeat gets the same answer"),
    errors=(409,),
)
def resume(call: Call, device_id: str) -> SuspensionAnswer:
    """Resume a suspended device."""
    return _suspension(call.portal.revocations.resume(call.actor, device_id))


@ROUTES.add(
    "POST",
    "/revoke/{device_id}",
    Permission.CHANGE,
    Answers("The device is revoked; a repeat gets the same answer, with a worse reason that one"),
    body_optional=True,
)
def revoke(call: Call, device_id: str, body: RevokeRequest) -> RevokeAnswer:
    """Revoke a device permanently and disconnect it from the broker."""
    revoked = call.portal.revocations.revoke(call.actor, device_id, body.reason)
    return RevokeAnswer.of(revoked, **outcome_of(revoked))


def renewal_of(body: RenewRequest) -> RenewalRequest:
    """Return the renewal to make, with its CSR parsed; raises ``CsrInvalid``, ``KeyRefused``."""
    when_used = body.revoke_previous == "when_used"
    csr = None if body.csr is None else read_csr(body.csr)
    return RenewalRequest(**body.model_dump(exclude={"revoke_previous", "csr"}), csr=csr, when_used=when_used)


def state_of(renewed: Renewed) -> dict[str, str | None]:
    """Return what an answer says of older certificates that were revoked at once."""
    broker = None if not renewed.ended else "enforced" if renewed.problem is None else "pending"
    return {"broker": broker, "broker_problem": renewed.problem}


def outcome_of(revoked: Revoked) -> dict[str, str | None]:
    """Return what an answer says of a revocation."""
    broker = "enforced" if revoked.enforced else "pending"
    return {"status": "revoked", "broker": broker, "broker_problem": revoked.problem}


def _suspension(answer: Suspended) -> SuspensionAnswer:
    return SuspensionAnswer.of(
        answer,
        status="suspended" if answer.suspended_at else "active",
        broker="enforced" if answer.enforced else "pending",
        broker_problem=answer.problem,
    )


# --- Many devices at once -----------------------------------------------------------------------------------------


def _narrowed(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [given(name) for name in schema["properties"]]


class ActionFilter(DeviceConditions):
    """Which devices, as in the list of devices; at least one field."""

    model_config = ConfigDict(json_schema_extra=_narrowed)

    @model_validator(mode="after")
    def _not_all(self) -> Self:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError("name at least one field: no filter would mean every device")
        return self


class ManyRenewal(RequestModel):
    """How to renew each of many devices, for which the portal makes a new key and bundle."""

    key_type: KeyTypeName | None = None
    validity_days: Annotated[int, Field(ge=1, le=36500), WholeNumber] | None = None
    bundle_format: BundleFormatName | None = None
    overlap_hours: Annotated[int, Field(ge=0, le=8760), WholeNumber] | None = None
    revoke_previous: Literal["after_overlap", "when_used"] = "after_overlap"


class ManyChanges(ChangesRequest):
    """What to change of each of many devices; `topics: null` restores those of its group, or the default ones.

    `metadata_changes` sets some keys, and removes those that are null. Groups are changed for all devices of a call or
    for none.
    """

    type: ShortText = ""
    location: Place = ""
    firmware: ShortText = ""
    metadata_changes: Metadata = Field(default_factory=dict)
    topics: Topics | None = None
    profile: ProfileName = "default"
    add_to_group: GroupName = ""
    remove_from_group: GroupName = ""


def _of_action(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [given("ids"), given("filter")]
    renewal, changes = given("renewal"), given("changes")
    others = {"properties": {"action": {"enum": ["revoke", "suspend", "resume"]}}}
    schema["anyOf"] = [
        {**others, "not": {"anyOf": [renewal, changes]}},
        {"properties": {"action": {"const": "renew"}}, "not": changes},
        {"properties": {"action": {"const": "update"}}, "not": renewal, "allOf": [changes]},
    ]


class ActionRequest(RequestModel):
    """What to do to which devices: those of `ids`, or all that `filter` finds now.

    `reason` is for `revoke`, `renewal` for `renew`, `changes` are for `update`. Groups of a change are changed first.
    """

    model_config = ConfigDict(json_schema_extra=_of_action)

    action: Literal["revoke", "suspend", "resume", "renew", "update"]
    ids: Annotated[list[DeviceId], Field(min_length=1, max_length=1000)] | None = None
    filter: ActionFilter | None = None
    reason: ReasonName = "unspecified"
    renewal: ManyRenewal | None = None
    changes: ManyChanges | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("give either ids or a filter")
        if (self.changes is not None) != (self.action == "update"):
            raise ValueError("changes go with the action update, and with no other")
        if self.renewal is not None and self.action != "renew":
            raise ValueError("renewal goes with the action renew alone")
        return self


class ActionAnswer(AnswerModel):
    """A device as it is now, with what the broker was seen to do, or in `code` and `detail` why it is as it was.

    `repeated` is there, and true, for one that was revoked, suspended or active before, as was asked for. A renewal
    has the new certificate's dates, and the link and the bundle password, which nobody is told again.
    """

    device_id: DeviceId
    status: Literal["revoked", "suspended", "active"] | None = None
    revoked_at: Timestamp | None = None
    reason: str | None = None
    suspended_at: Timestamp | None = None
    name: str | None = None
    fingerprint: Fingerprint | None = None
    serial_number: Hex | None = None
    issued_at: Timestamp | None = None
    expires_at: Timestamp | None = None
    previous_valid_until: Timestamp | None = None
    download_url: str | None = None
    download_expires_at: Timestamp | None = None
    bundle_password: str | None = None
    broker: Literal["enforced", "pending"] | None = None
    broker_problem: str | None = None
    repeated: Literal[True] | None = None
    code: str | None = None
    detail: str | None = None


@ROUTES.add(
    "POST",
    "/devices/actions",
    Permission.CHANGE,
    Answers(
        "One line for each device, once the broker was seen to obey or has failed to; to repeat it does no harm, a"
        " renewal with the same `Idempotency-Key`",
        model=ActionAnswer,
        media_type=NDJSON,
    ),
    errors=(404, 409),
    idempotency_key=True,
)
def act_on_devices(call: Call, body: ActionRequest) -> Reply:
    """Revoke, suspend, resume, renew or update many devices, which the broker learns at once."""
    device_ids: Sequence[str] = body.ids or []
    if body.filter is not None:
        most = MOST_RENEWED if body.action == "renew" else MOST_AT_ONCE
        found = DeviceFilter(**body.filter.model_dump())
        device_ids = call.portal.inventory.found(call.actor.tenant_id, found, most=most)
    if body.action == "renew":
        renewal = renewal_of(RenewRequest(**(body.renewal or ManyRenewal()).model_dump()))
        answers = call.portal.renewals.renew_many(call.actor, device_ids, renewal, call.idempotency_key)
        return _lines(_renewed_answer(answer) for answer in answers)
    if body.changes is not None:
        return _lines(_updated_answer(answer) for answer in _update_many(call, device_ids, body.changes))
    acted = call.portal.revocations.act(call.actor, Action(body.action), device_ids, body.reason)
    return _lines(_action_answer(answer) for answer in acted)


def _update_many(call: Call, device_ids: Sequence[str], changes: ManyChanges) -> Sequence[Updated | ActionRefused]:
    """Change the groups of devices, of all or of none, and then the devices."""
    outcomes = []
    if changes.add_to_group:
        outcomes.append(call.portal.groups.put(call.actor, changes.add_to_group, device_ids, ()))
    if changes.remove_from_group:
        outcomes.append(call.portal.groups.put(call.actor, changes.remove_from_group, (), device_ids))
    values = changes.model_dump(exclude_unset=True, exclude={"topics", "add_to_group", "remove_from_group"})
    topics = pairs(changes.topics) if "topics" in changes.model_fields_set else ...
    answers: Sequence[Updated | ActionRefused] = [Updated(device_id) for device_id in device_ids]
    if values or topics is not ...:
        answers = list(call.portal.registrations.update_many(call.actor, device_ids, values, topics))
    told = [one for one in outcomes if one.enforced is not None]
    if told and topics is ...:  # else the later change has reached the broker, or has not, with the groups'
        enforced, problem = all(one.enforced for one in told), next((one.problem for one in told if one.problem), None)
        return [Updated(one.device_id, enforced, problem) if isinstance(one, Updated) else one for one in answers]
    return answers


def _lines(models: Iterable[ActionAnswer]) -> Reply:
    content = b"".join(model.model_dump_json(exclude_none=True).encode() + b"\n" for model in models)
    return Reply(content=content, media_type=NDJSON)


def _action_answer(answer: Revoked | Suspended | ActionRefused) -> ActionAnswer:
    if isinstance(answer, ActionRefused):
        return _refused(answer)
    status = "revoked" if isinstance(answer, Revoked) else answer.status
    broker = "enforced" if answer.enforced else "pending"
    repeated = True if answer.repeated else None
    return ActionAnswer.of(answer, status=status, broker=broker, broker_problem=answer.problem, repeated=repeated)


def _renewed_answer(answer: Renewed | ActionRefused) -> ActionAnswer:
    if isinstance(answer, ActionRefused):
        return _refused(answer)
    return ActionAnswer.of(answer, status="active", **state_of(answer))


def _updated_answer(answer: Updated | ActionRefused) -> ActionAnswer:
    if isinstance(answer, ActionRefused):
        return _refused(answer)
    broker = None if answer.enforced is None else "enforced" if answer.enforced else "pending"
    return ActionAnswer.of(answer, broker=broker, broker_problem=answer.problem)


def _refused(answer: ActionRefused) -> ActionAnswer:
    return ActionAnswer.of(answer.error, device_id=answer.device_id)
