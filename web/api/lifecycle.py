"""A device's certificate over time: renew, suspend, resume, revoke; the last three for many devices at once, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from core.roles import Permission
from pki.csr import read_csr
from store.devices import DeviceFilter
from web.api.devices import DeviceConditions, IssuedAnswer, OfDevice
from web.api.fields import (
    BundleFormatName,
    BundlePassword,
    DeviceId,
    KeyTypeName,
    ReasonName,
    WholeNumber,
    given,
)
from web.api.routing import NDJSON, AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp
from workflows.renewal import RenewalRequest, Renewed
from workflows.revocation import Action, ActionRefused, Revoked, Suspended

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


def _ids_or_filter(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [given("ids"), given("filter")]


class ActionRequest(RequestModel):
    """What to do to which devices: those of `ids`, or all that `filter` finds now. `reason` is for `revoke`."""

    model_config = ConfigDict(json_schema_extra=_ids_or_filter)

    action: Literal["revoke", "suspend", "resume"]
    ids: Annotated[list[DeviceId], Field(min_length=1, max_length=1000)] | None = None
    filter: ActionFilter | None = None
    reason: ReasonName = "unspecified"

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("give either ids or a filter")
        return self


class ActionAnswer(AnswerModel):
    """A device as it is now, with what the broker was seen to do, or in `code` and `detail` why it is as it was.

    `repeated` is there, and true, for one that was revoked, suspended or active before, as was asked for.
    """

    device_id: DeviceId
    status: Literal["revoked", "suspended", "active"] | None = None
    revoked_at: Timestamp | None = None
    reason: str | None = None
    suspended_at: Timestamp | None = None
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
        "One line for each device, once the broker was seen to obey or has failed to; to repeat it does no harm",
        model=ActionAnswer,
        media_type=NDJSON,
    ),
    errors=(404,),
)
def act_on_devices(call: Call, body: ActionRequest) -> Reply:
    """Revoke, suspend or resume many devices, which the broker learns at once."""
    device_ids = body.ids or []
    if body.filter is not None:
        device_ids = call.portal.inventory.found(call.actor.tenant_id, DeviceFilter(**body.filter.model_dump()))
    answers = call.portal.revocations.act(call.actor, Action(body.action), device_ids, body.reason)
    return Reply(content=_lines(answers), media_type=NDJSON)


def _lines(answers: Iterator[Revoked | Suspended | ActionRefused]) -> bytes:
    models = (_action_answer(answer) for answer in answers)
    return b"".join(model.model_dump_json(exclude_none=True).encode() + b"\n" for model in models)


def _action_answer(answer: Revoked | Suspended | ActionRefused) -> ActionAnswer:
    if isinstance(answer, ActionRefused):
        return ActionAnswer.of(answer.error, device_id=answer.device_id)
    status = "revoked" if isinstance(answer, Revoked) else answer.status
    broker = "enforced" if answer.enforced else "pending"
    repeated = True if answer.repeated else None
    return ActionAnswer.of(answer, status=status, broker=broker, broker_problem=answer.problem, repeated=repeated)
