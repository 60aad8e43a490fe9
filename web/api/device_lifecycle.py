"""A device's way through its life: renewed, suspended, resumed."""

from __future__ import annotations

from core.roles import Permission
from web.api.lifecycle_models import RenewAnswer, RenewRequest, SuspensionAnswer
from web.api.routing import Answers, Call, Reply, Routes
from workflows.credentials import Wanted
from workflows.renewal import Renewal
from workflows.suspension import Suspended

device_lifecycle = Routes("Devices")


@device_lifecycle.route(
    "POST",
    "/devices/{device_id}/renew",
    permission=Permission.CHANGE,
    body=RenewRequest,
    body_optional=True,
    answers=Answers(RenewAnswer, status=201, description="The new certificate is recorded, durably"),
    errors=(404, 409, 503),
    idempotency_key=True,
)
def renew(call: Call) -> Reply:
    """Give a device a new certificate; the one before goes on for a while."""
    asked: RenewRequest = call.body
    renewal = Renewal(
        Wanted(asked.csr, asked.key_type, asked.validity_days, asked.bundle_password, asked.bundle_format),
        asked.overlap_hours,
        when_used=asked.revoke_previous == "when_used",
    )
    renewed = call.portal.renewals.renew(call.actor, call.path["device_id"], renewal, call.idempotency_key)
    fields = {name: getattr(renewed, name) for name in RenewAnswer.model_fields if hasattr(renewed, name)}
    broker = None if not renewed.ended else "enforced" if renewed.problem is None else "pending"
    return Reply(RenewAnswer(**fields, broker=broker, broker_problem=renewed.problem), status=201, omit_none=True)


@device_lifecycle.route(
    "POST",
    "/devices/{device_id}/suspend",
    permission=Permission.CHANGE,
    answers=Answers(SuspensionAnswer, description="The device is suspended, durably; a repeat answers the same"),
    errors=(404, 409),
)
def suspend(call: Call) -> Reply:
    """Put a device out until it is resumed (certificateHold)."""
    return _reply(call.portal.suspensions.suspend(call.actor, call.path["device_id"]))


@device_lifecycle.route(
    "POST",
    "/devices/{device_id}/resume",
    permission=Permission.CHANGE,
    answers=Answers(SuspensionAnswer, description="The device is in again, durably; a repeat answers the same"),
    errors=(404, 409),
)
def resume(call: Call) -> Reply:
    """Let a suspended device back in."""
    return _reply(call.portal.suspensions.resume(call.actor, call.path["device_id"]))


def _reply(answer: Suspended) -> Reply:
    return Reply(
        SuspensionAnswer(
            device_id=answer.device_id,
            status="suspended" if answer.suspended_at else "active",
            suspended_at=answer.suspended_at,
            broker="enforced" if answer.enforced else "pending",
            broker_problem=answer.problem,
        )
    )
