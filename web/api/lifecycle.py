"""A device's certificate over time: renew, suspend, resume, revoke."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.roles import Permission
from pki.csr import read_csr
from web.api.fields import (
    BundleFormatName,
    BundlePassword,
    DeviceId,
    Fingerprint,
    Hex,
    KeyTypeName,
    ReasonName,
    WholeNumber,
)
from web.api.routing import AnswerModel, Answers, Call, RequestModel, Routes, Timestamp
from workflows.renewal import RenewalRequest
from workflows.revocation import Suspended

ROUTES = Routes("Devices")


class SuspensionAnswer(AnswerModel):
    """`enforced`: the broker was seen to apply the change; `pending`: it is recorded, and not applied yet."""

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


class RenewAnswer(AnswerModel):
    """The new certificate, with a download link and a bundle password or, for a `csr`, itself and its chain.

    `previous_valid_until` says how long the previous certificate, if there is one, stays valid. `broker` is present if
    older certificates were revoked at once: `enforced` if the broker was seen to refuse them.
    """

    omit_none = True

    device_id: DeviceId
    fingerprint: Fingerprint
    serial_number: Hex
    issued_at: Timestamp
    expires_at: Timestamp
    previous_valid_until: Timestamp | None = None
    download_url: str | None = None
    download_expires_at: Timestamp | None = None
    bundle_password: str | None = None
    certificate: str | None = None
    chain: str | None = None
    broker: Literal["enforced", "pending"] | None = None
    broker_problem: str | None = None


class RevokeRequest(RequestModel):
    """Why a device is revoked (RFC 5280 section 5.3.1)."""

    reason: ReasonName = "unspecified"


class RevokeAnswer(AnswerModel):
    """`enforced`: the broker was seen to refuse the device; `pending`: it is revoked, and not refused yet."""

    device_id: DeviceId
    status: Literal["revoked"]
    revoked_at: Timestamp
    reason: str
    broker: Literal["enforced", "pending"]
    broker_problem: str | None = None


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
    when_used = body.revoke_previous == "when_used"
    csr = None if body.csr is None else read_csr(body.csr)
    renewal = RenewalRequest(**body.model_dump(exclude={"revoke_previous", "csr"}), csr=csr, when_used=when_used)
    renewed = call.portal.renewals.renew(call.actor, device_id, renewal, call.idempotency_key)
    broker = None if not renewed.ended else "enforced" if renewed.problem is None else "pending"
    return RenewAnswer.of(renewed, broker=broker, broker_problem=renewed.problem)


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
    Answers("The device is revoked; a repeat gets the same answer"),
    body_optional=True,
)
def revoke(call: Call, device_id: str, body: RevokeRequest) -> RevokeAnswer:
    """Revoke a device permanently and disconnect it from the broker."""
    revoked = call.portal.revocations.revoke(call.actor, device_id, body.reason)
    return RevokeAnswer.of(
        revoked,
        status="revoked",
        broker="enforced" if revoked.enforced else "pending",
        broker_problem=revoked.problem,
    )


def _suspension(answer: Suspended) -> SuspensionAnswer:
    return SuspensionAnswer.of(
        answer,
        status="suspended" if answer.suspended_at else "active",
        broker="enforced" if answer.enforced else "pending",
        broker_problem=answer.problem,
    )
