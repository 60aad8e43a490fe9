"""Devices that enrol by themselves, as operators manage them: expected devices, approvals, tokens, manufacturers."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import ConfigDict, Field, model_validator

from core.roles import Permission
from core.states import Approval, ManufacturerStatus, RepeatedSerial
from pki.profiles import DEFAULT
from store.enrolment import EnrolmentProfile, EnrolmentTokenRecord, ManufacturerRecord
from web.api.devices import ChangesRequest, PendingRequest, registration_of
from web.api.evidence import AttestationPolicyModel, AttestationPolicyRequest
from web.api.fields import (
    DeviceId,
    Fingerprint,
    KeyTypeName,
    Name,
    Place,
    ProfileName,
    ShortText,
    StatusName,
    WholeNumber,
    given,
)
from web.api.routing import AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp
from workflows.attestation.policies import PolicyRequest

ROUTES = Routes("Enrolment")
MANUFACTURERS = Routes("Manufacturers")

ApprovalName = Literal["at_once", "operator"]
RepeatedSerialName = Literal["operator", "same_device", "new_device"]
KeyTypes = Annotated[list[KeyTypeName], Field(min_length=1, max_length=len(get_args(KeyTypeName)))]
Days = Annotated[int, Field(ge=1, le=36500), WholeNumber]
_COLUMN_OF = {"profile": "certificate_profile"}  # the enrolment profile is called so elsewhere
Pem = Annotated[str, Field(min_length=1, max_length=16384, description="One certificate in PEM")]


class DecisionAnswer(AnswerModel):
    """The state of a device after an operator's decision."""

    device_id: DeviceId
    status: StatusName


class ApproveRequest(RequestModel):
    """The key to approve: without `key_fingerprint`, the one of the device's latest request."""

    key_fingerprint: Fingerprint | None = None


class RejectRequest(RequestModel):
    """`why` a device is rejected, for the audit record. With `key_fingerprint` only a request for that key is."""

    key_fingerprint: Fingerprint | None = None
    why: Place | None = None


class EnrolmentModel(AnswerModel):
    """The latest enrolment request of a device; compare `key_fingerprint`, the SHA-256 of its key, with the device's.

    `again`: the device has a certificate already, and has requested one for another key.
    """

    device_id: DeviceId
    enrolment_token_id: str | None
    manufacturer_id: str | None
    key_fingerprint: Fingerprint
    status: Literal["waiting", "approved", "issued", "rejected"]
    again: bool


class AskingModel(AnswerModel):
    """A device that waits for an operator; `again`: it has a certificate, and requests one for another key."""

    device_id: DeviceId
    name: str
    again: bool
    key_fingerprint: Fingerprint
    enrolment_token_id: str | None
    manufacturer_id: str | None
    asked_at: Timestamp


class AskingList(AnswerModel):
    """The 1,000 devices that have waited longest."""

    enrolments: list[AskingModel]


class EnrolmentProfileRequest(RequestModel):
    """How devices are registered when they enrol: in `name_template`, `{serial}` is the serial number of a device."""

    type: ShortText = "device"
    location: Place = "unknown"
    firmware: ShortText = "unknown"
    name_template: Name = "{serial}"
    key_types: KeyTypes = Field(default_factory=lambda: list(get_args(KeyTypeName)))
    validity_days: Days | None = None
    approval: ApprovalName = "at_once"
    repeated_serial: RepeatedSerialName = "operator"
    profile: ProfileName = "default"
    attestation: AttestationPolicyRequest | None = None


def _one_device_counts_once(schema: dict[str, Any]) -> None:
    of_one = {"properties": {"count": {"const": 1}, "profile": {"const": "default"}}}
    schema["anyOf"] = [{"properties": {"device_id": {"type": "null"}}}, of_one]


class EnrolmentTokenRequest(EnrolmentProfileRequest):
    """A token for the pending device `device_id`, or for `count` new devices; in names, `{number}` counts them.

    `repeated_serial`: what becomes of a device that comes with another key than before, and the same serial number in
    its request (the subject's serialNumber, else its common name): an `operator` decides whether it is the
    `same_device`, or it is that at once and its older certificates end, or it is a `new_device`. The pending device
    `device_id` has a `profile` of its own.
    """

    model_config = ConfigDict(json_schema_extra=_one_device_counts_once)

    name: ShortText
    device_id: DeviceId | None = None
    count: Annotated[int, Field(ge=1, le=1000000), WholeNumber] = 1
    expires_in_hours: Annotated[int, Field(ge=1, le=8760), WholeNumber] = 24

    @model_validator(mode="after")
    def _one_device_once(self) -> Self:
        if self.device_id is not None and self.count != 1:
            raise ValueError("with a device_id, count must be 1")
        if self.device_id is not None and self.profile != DEFAULT:
            raise ValueError("with a device_id, leave profile out: the device has its own")
        return self


class EnrolmentTokenPatch(RequestModel):
    """What evidence the devices of a token have to show from now on."""

    attestation: AttestationPolicyRequest


class EnrolmentProfileModel(AnswerModel):
    """How devices are registered when they enrol."""

    type: str
    location: str
    firmware: str
    name_template: str
    key_types: list[str]
    validity_days: int | None
    approval: ApprovalName
    repeated_serial: RepeatedSerialName
    profile: str
    attestation: AttestationPolicyModel | None


class EnrolmentTokenModel(EnrolmentProfileModel):
    """An enrolment token without its secret; `operator_token_id` is the operator token that made it."""

    enrolment_token_id: str
    name: str
    device_id: DeviceId | None
    operator_token_id: str | None
    count: int
    uses: int
    created_at: Timestamp
    expires_at: Timestamp
    revoked_at: Timestamp | None


class NewEnrolmentTokenModel(EnrolmentTokenModel):
    """A new enrolment token, with its secret, which is shown only once."""

    token: str


class EnrolmentTokenList(AnswerModel):
    """The newest 1,000 tokens, newest first."""

    enrolment_tokens: list[EnrolmentTokenModel]


class ManufacturerRequest(EnrolmentProfileRequest):
    """A CA that issues factory certificates (IDevIDs); `{serial}` is the serialNumber or common name in them.

    `repeated_serial`: what becomes of a device with the serial number of another one and another key in its factory
    certificate: an `operator` decides whether it is the `same_device`, or it is that at once, or it is a `new_device`.
    With `same_device` a device that enrols again gets its certificate at once, too, and its older ones end.
    """

    name: ShortText
    certificate: Pem


class ManufacturerPatch(ChangesRequest):
    """The name or the enrolment profile of a manufacturer to change, for the devices that enrol from now on.

    `certificate`: a renewed one of the same CA, of the same key and subject.
    """

    name: ShortText = ""
    certificate: Pem = ""
    type: ShortText = ""
    location: Place = ""
    firmware: ShortText = ""
    name_template: Name = ""
    key_types: KeyTypes = Field(default_factory=list)
    validity_days: Days | None = None
    approval: ApprovalName = "at_once"
    repeated_serial: RepeatedSerialName = "operator"
    profile: ProfileName = "default"
    attestation: AttestationPolicyRequest = Field(default=AttestationPolicyRequest())


def _one_of_two(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [given("certificate"), given("signature")]


class ProofRequest(RequestModel):
    """Proof of possession of the CA's key: a certificate for the nonce as common name, or a signature of the nonce."""

    model_config = ConfigDict(json_schema_extra=_one_of_two)

    certificate: Pem | None = None
    signature: Annotated[str, Field(max_length=4096, description="Of the nonce as text, in Base64")] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.certificate is None) == (self.signature is None):
            raise ValueError("give either a certificate or a signature")
        return self


class ManufacturerModel(EnrolmentProfileModel):
    """A manufacturer. While it is `unproven`, its CA has to sign `nonce`."""

    manufacturer_id: str
    name: str
    status: Literal["unproven", "registered", "removed"]
    fingerprint: Fingerprint
    not_after: Timestamp
    nonce: str | None
    nonce_expires_at: Timestamp | None
    created_at: Timestamp
    proven_at: Timestamp | None
    removed_at: Timestamp | None
    certificate: str


class ManufacturerList(AnswerModel):
    """Every manufacturer, newest first."""

    manufacturers: list[ManufacturerModel]


@ROUTES.add(
    "POST",
    "/devices",
    Permission.CHANGE,
    Answers("The device is pending", model=DecisionAnswer, status=201, headers={"Location": "The device's path"}),
    errors=(409,),
)
def expect_device(call: Call, body: PendingRequest) -> Reply:
    """Register a device that will enrol by itself."""
    device_id = call.portal.approvals.expect(call.actor, registration_of(body))
    headers = {"Location": f"/devices/{device_id}"}
    return Reply(DecisionAnswer(device_id=device_id, status="pending"), headers=headers)


@ROUTES.add("GET", "/devices/{device_id}/enrolment", Permission.READ)
def show_enrolment(call: Call, device_id: str) -> EnrolmentModel:
    """Show the latest enrolment request of a device, with the fingerprint of its key."""
    first, again = call.portal.approvals.request_of(call.actor.tenant_id, device_id)
    return EnrolmentModel.of(again or first, first, enrolment_token_id=first.token_id, again=again is not None)


@ROUTES.add("GET", "/enrolments", Permission.READ)
def list_enrolments(call: Call) -> AskingList:
    """List the devices that wait for an operator, longest wait first."""
    found = call.portal.approvals.asking(call.actor.tenant_id)
    return AskingList(enrolments=[AskingModel.of(item, enrolment_token_id=item.token_id) for item in found])


@ROUTES.add(
    "POST",
    "/devices/{device_id}/approve",
    Permission.CHANGE,
    Answers("The device gets its certificate at its next request"),
    body_optional=True,
    errors=(409,),
)
def approve(call: Call, device_id: str, body: ApproveRequest) -> DecisionAnswer:
    """Approve the enrolment of a device; a repeat gets the same answer."""
    status = call.portal.approvals.approve(call.actor, device_id, body.key_fingerprint)
    return DecisionAnswer(device_id=device_id, status=status)


@ROUTES.add(
    "POST",
    "/devices/{device_id}/reject",
    Permission.CHANGE,
    Answers("The device, or its request for another key, is rejected"),
    body_optional=True,
    errors=(409,),
)
def reject(call: Call, device_id: str, body: RejectRequest) -> DecisionAnswer:
    """Reject a pending device permanently, or an active device's request for another key."""
    status = call.portal.approvals.reject(call.actor, device_id, body.key_fingerprint, why=body.why)
    return DecisionAnswer(device_id=device_id, status=status)


# --- Tokens -------------------------------------------------------------------------------------------------------


@ROUTES.add("GET", "/enrolment-tokens", Permission.READ)
def list_enrolment_tokens(call: Call) -> EnrolmentTokenList:
    """List enrolment tokens, newest first, without their secrets."""
    records = call.portal.enrolment_tokens.tokens(call.actor.tenant_id)
    return EnrolmentTokenList(enrolment_tokens=_tokens(call, records))


@ROUTES.add(
    "POST",
    "/enrolment-tokens",
    Permission.CHANGE,
    Answers("The token with its secret, which is shown only once", status=201),
    errors=(404, 409),
    idempotency_key=True,
)
def create_enrolment_token(call: Call, body: EnrolmentTokenRequest) -> NewEnrolmentTokenModel:
    """Create a token with which devices enrol; its secret is in this answer only."""
    secret, record = call.portal.enrolment_tokens.create(
        call.actor,
        body.name,
        _profile(body),
        device_id=body.device_id,
        count=body.count,
        life=timedelta(hours=body.expires_in_hours),
        attestation=_wanted(body),
        idempotency_key=call.idempotency_key,
    )
    [shown] = _tokens(call, [record])
    return NewEnrolmentTokenModel.of(shown, token=secret)


@ROUTES.add("PATCH", "/enrolment-tokens/{enrolment_token_id}", Permission.TOKENS)
def update_enrolment_token(call: Call, enrolment_token_id: str, body: EnrolmentTokenPatch) -> EnrolmentTokenModel:
    """Change what evidence the devices of a token have to show."""
    record = call.portal.enrolment_tokens.set_attestation(call.actor, enrolment_token_id, body.attestation.wanted())
    [shown] = _tokens(call, [record])
    return shown


@ROUTES.add(
    "DELETE",
    "/enrolment-tokens/{enrolment_token_id}",
    Permission.CHANGE,
    Answers("The token is revoked at once; a repeat gets the same answer"),
)
def revoke_enrolment_token(call: Call, enrolment_token_id: str) -> EnrolmentTokenModel:
    """Revoke an enrolment token; devices that have enrolled with it stay active."""
    record = call.portal.enrolment_tokens.revoke(call.actor, enrolment_token_id)
    [shown] = _tokens(call, [record])
    return shown


def _profile(body: EnrolmentProfileRequest) -> EnrolmentProfile:
    names = EnrolmentProfileRequest.model_fields.keys() - {"attestation"}
    fields = {_COLUMN_OF.get(name, name): getattr(body, name) for name in names}
    fields |= {"key_types": tuple(body.key_types), "approval": Approval(body.approval)}
    return EnrolmentProfile(**fields | {"repeated_serial": RepeatedSerial(body.repeated_serial)})


def _wanted(body: EnrolmentProfileRequest) -> PolicyRequest | None:
    return None if body.attestation is None else body.attestation.wanted()


def _tokens(call: Call, records: Sequence[EnrolmentTokenRecord]) -> list[EnrolmentTokenModel]:
    policies = call.portal.attestation_policies.of_profiles(call.actor.tenant_id, [one.profile for one in records])
    return [
        EnrolmentTokenModel.of(
            record,
            record.profile,
            enrolment_token_id=record.id,
            count=record.uses_allowed,
            profile=record.profile.certificate_profile,
            attestation=AttestationPolicyModel.shown(policies.get(record.profile.attestation_policy_id)),
        )
        for record in records
    ]


# --- Manufacturers ------------------------------------------------------------------------------------------------


@MANUFACTURERS.add("GET", "/manufacturers", Permission.READ)
def list_manufacturers(call: Call) -> ManufacturerList:
    """List manufacturers, newest first."""
    records = call.portal.manufacturers.manufacturers(call.actor.tenant_id)
    return ManufacturerList(manufacturers=_manufacturers(call, records))


@MANUFACTURERS.add(
    "POST",
    "/manufacturers",
    Permission.TOKENS,
    Answers("The CA; it is trusted after proof of possession", status=201),
    errors=(409,),
)
def add_manufacturer(call: Call, body: ManufacturerRequest) -> ManufacturerModel:
    """Add a manufacturer's CA; it is not trusted before proof of possession."""
    record = call.portal.manufacturers.add(call.actor, body.name, body.certificate, _profile(body), _wanted(body))
    return _manufacturer(call, record)


@MANUFACTURERS.add("GET", "/manufacturers/{manufacturer_id}", Permission.READ)
def show_manufacturer(call: Call, manufacturer_id: str) -> ManufacturerModel:
    """Show a manufacturer, with the nonce to be signed while it is unproven."""
    return _manufacturer(call, call.portal.manufacturers.manufacturer(call.actor.tenant_id, manufacturer_id))


@MANUFACTURERS.add("PATCH", "/manufacturers/{manufacturer_id}", Permission.TOKENS, errors=(409,))
def update_manufacturer(call: Call, manufacturer_id: str, body: ManufacturerPatch) -> ManufacturerModel:
    """Change a manufacturer's name, CA certificate or enrolment profile, for the devices that enrol from now on."""
    given = body.model_dump(exclude_unset=True, exclude={"attestation", "certificate"})
    values = {_COLUMN_OF.get(name, name): value for name, value in given.items()}
    record = call.portal.manufacturers.update(
        call.actor,
        manufacturer_id,
        values,
        certificate=body.certificate or None,
        attestation=body.attestation.wanted() if "attestation" in body.model_fields_set else None,
    )
    return _manufacturer(call, record)


@MANUFACTURERS.add(
    "POST",
    "/manufacturers/{manufacturer_id}/proof",
    Permission.TOKENS,
    Answers("The manufacturer is registered; a repeat gets the same answer"),
    errors=(409,),
)
def prove_manufacturer(call: Call, manufacturer_id: str, body: ProofRequest) -> ManufacturerModel:
    """Register a manufacturer by proof of possession of its CA's key."""
    record = call.portal.manufacturers.prove(
        call.actor, manufacturer_id, certificate=body.certificate, signature=body.signature
    )
    return _manufacturer(call, record)


@MANUFACTURERS.add(
    "DELETE",
    "/manufacturers/{manufacturer_id}",
    Permission.TOKENS,
    Answers("The CA is no longer trusted; a repeat gets the same answer"),
)
def remove_manufacturer(call: Call, manufacturer_id: str) -> ManufacturerModel:
    """Stop trusting a manufacturer's CA; devices that have enrolled with it stay active."""
    return _manufacturer(call, call.portal.manufacturers.remove(call.actor, manufacturer_id))


def _manufacturer(call: Call, record: ManufacturerRecord) -> ManufacturerModel:
    [shown] = _manufacturers(call, [record])
    return shown


def _manufacturers(call: Call, records: Sequence[ManufacturerRecord]) -> list[ManufacturerModel]:
    policies = call.portal.attestation_policies.of_profiles(call.actor.tenant_id, [one.profile for one in records])
    return [
        _shown(record, AttestationPolicyModel.shown(policies.get(record.profile.attestation_policy_id)))
        for record in records
    ]


def _shown(record: ManufacturerRecord, policy: AttestationPolicyModel | None) -> ManufacturerModel:
    unproven = record.status is ManufacturerStatus.UNPROVEN
    return ManufacturerModel.of(
        record,
        record.profile,
        manufacturer_id=record.id,
        nonce=record.nonce if unproven else None,
        nonce_expires_at=record.nonce_expires_at if unproven else None,
        profile=record.profile.certificate_profile,
        certificate=ssl.DER_cert_to_PEM_cert(record.der),
        attestation=policy,
    )


ROUTES += MANUFACTURERS
