"""A device's way through its life: suspended, resumed."""

from __future__ import annotations

from access import Permission
from api.lifecycle_models import SuspensionAnswer
from api.routing import Answers, Call, Reply, Routes
from onboarding_suspension import Suspended

device_lifecycle = Routes("Devices")


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
