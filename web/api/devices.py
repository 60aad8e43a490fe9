"""Devices: register, list, show, change, revoke."""

from __future__ import annotations

import ssl
from datetime import datetime
from typing import Any

from core.device_status import DeviceStatus, renewable_from
from core.roles import Permission
from store.certificates import CertificateRecord
from store.device_lists import DeviceFilter
from store.devices import DeviceRecord
from web.api.device_models import (
    CertificateList,
    CertificateModel,
    DeviceModel,
    DevicePage,
    DeviceQuery,
    DeviceSummary,
    PatchRequest,
    RegisterAnswer,
    RegisterRequest,
    RevokeAnswer,
    RevokeRequest,
    TopicModel,
)
from web.api.routing import Answers, Call, Reply, Routes
from workflows.devices import DeviceDetails
from workflows.terms import Registration

devices = Routes("Devices")


@devices.route(
    "POST",
    "/register",
    permission=Permission.CHANGE,
    body=RegisterRequest,
    answers=Answers(
        RegisterAnswer,
        status=201,
        description="The device is registered, durably",
        headers={"Location": "The device's path"},
    ),
    errors=(409, 503),
    idempotency_key=True,
)
def register(call: Call) -> Reply:
    """Register a device and make its credentials, or sign its CSR."""
    wanted: RegisterRequest = call.body
    fields = wanted.model_dump(exclude={"topics"})
    registration = Registration(**fields, topics=_pairs(wanted.topics))
    registered = call.portal.onboarding.register(call.actor, registration, call.idempotency_key)
    location = {"Location": f"/devices/{registered.device_id}"}
    answer = RegisterAnswer.model_validate(registered, from_attributes=True)
    return Reply(answer, status=201, headers=location, omit_none=True)


@devices.route("GET", "/devices", permission=Permission.READ, query=DeviceQuery, answers=Answers(DevicePage))
def list_devices(call: Call) -> Reply:
    """List devices, newest first; with `expires_before` those that end soonest first."""
    query: DeviceQuery = call.query
    wanted = DeviceFilter(**query.model_dump(exclude={"limit", "cursor"}))
    page = call.portal.inventory.devices(call.actor.tenant_id, wanted, limit=query.limit, cursor=query.cursor)
    summaries = [
        DeviceSummary(**_dates(call, device, not_before, not_after), **_fields(device))
        for device, not_after, not_before in page.devices
    ]
    return Reply(DevicePage(devices=summaries, next_cursor=page.cursor))


@devices.route("GET", "/devices/{device_id}", permission=Permission.READ, answers=Answers(DeviceModel), errors=(404,))
def show_device(call: Call) -> Reply:
    """Show a device with its current certificate, its topics and its broker state."""
    return Reply(_device_model(call, call.portal.inventory.device(call.actor.tenant_id, call.path["device_id"])))


@devices.route(
    "PATCH",
    "/devices/{device_id}",
    permission=Permission.CHANGE,
    body=PatchRequest,
    answers=Answers(DeviceModel),
    errors=(404, 409),
)
def update_device(call: Call) -> Reply:
    """Change what is known of a device, or its topics."""
    wanted: PatchRequest = call.body
    device_id = call.path["device_id"]
    values = wanted.model_dump(exclude_unset=True, exclude={"topics"})
    topics = {"topics": _pairs(wanted.topics)} if "topics" in wanted.model_fields_set else {}
    call.portal.onboarding.update(call.actor, device_id, values, **topics)
    return Reply(_device_model(call, call.portal.inventory.device(call.actor.tenant_id, device_id)))


@devices.route(
    "GET",
    "/devices/{device_id}/certificates",
    permission=Permission.READ,
    answers=Answers(CertificateList),
    errors=(404,),
)
def list_certificates(call: Call) -> Reply:
    """List every certificate a device has had, newest first."""
    records = call.portal.inventory.certificates(call.actor.tenant_id, call.path["device_id"])
    return Reply(CertificateList(certificates=[_certificate_model(record) for record in records]))


@devices.route(
    "POST",
    "/revoke/{device_id}",
    permission=Permission.CHANGE,
    body=RevokeRequest,
    body_optional=True,
    answers=Answers(RevokeAnswer, description="The device is revoked, durably; a repeat answers the same"),
    errors=(404,),
)
def revoke(call: Call) -> Reply:
    """Revoke a device for good and put it out of the broker."""
    wanted: RevokeRequest = call.body
    revoked = call.portal.onboarding.revoke(call.actor, call.path["device_id"], wanted.reason)
    return Reply(
        RevokeAnswer(
            device_id=revoked.device_id,
            status="revoked",
            revoked_at=revoked.revoked_at,
            reason=revoked.reason,
            broker="enforced" if revoked.enforced else "pending",
            broker_problem=revoked.problem,
        )
    )


def _pairs(topics: list[TopicModel] | None) -> list[tuple[str, str]] | None:
    return None if topics is None else [(topic.filter, topic.access) for topic in topics]


def _fields(record: DeviceRecord) -> dict[str, Any]:
    others = ("device_id", "expires_at", "renewable_from")
    fields = {name: getattr(record, name) for name in DeviceSummary.model_fields if name not in others}
    return fields | {"device_id": record.id}


def _dates(
    call: Call, device: DeviceRecord, not_before: datetime | None, not_after: datetime | None
) -> dict[str, datetime | None]:
    opens = None
    if not_before is not None and not_after is not None and device.status is DeviceStatus.ACTIVE:
        opens = renewable_from(not_before, not_after, from_percent=call.portal.settings.renewal_from)
    return {"expires_at": not_after, "renewable_from": opens}


def _device_model(call: Call, details: DeviceDetails) -> DeviceModel:
    certificate = details.certificate
    not_before, not_after = (certificate.not_before, certificate.not_after) if certificate else (None, None)
    return DeviceModel(
        **_dates(call, details.device, not_before, not_after),
        **_fields(details.device),
        metadata=details.device.metadata,
        topics=[TopicModel(filter=topic.filter, access=topic.access.value) for topic in details.topics],
        broker="applied" if details.applied else "pending",
        certificate=None if certificate is None else _certificate_model(certificate),
    )


def _certificate_model(record: CertificateRecord) -> CertificateModel:
    fields = {name: getattr(record, name) for name in CertificateModel.model_fields if name != "certificate"}
    return CertificateModel(**fields, certificate=ssl.DER_cert_to_PEM_cert(record.der))
