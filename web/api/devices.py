"""Devices: register, list, show, change."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from core.roles import Permission
from core.states import AttestationVerdict, DeviceStatus, renewable_from
from core.topics import Access
from pki.csr import read_csr
from pki.profiles import DEFAULT
from store.certificates import CertificateRecord
from store.devices import DeviceFilter, DeviceRecord
from web.api.evidence import AttestationModel, RegisteredEvidence
from web.api.fields import (
    BundleFormatName,
    BundlePassword,
    Cursor,
    DeviceId,
    ExternalId,
    Fingerprint,
    GroupName,
    GroupNames,
    Hex,
    KeyTypeName,
    Limit,
    Metadata,
    MetadataPair,
    Name,
    Place,
    ProfileName,
    ShortText,
    StatusName,
    Time,
    WholeNumber,
)
from web.api.routing import AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp
from workflows.connections import DeviceConnection, connection_of
from workflows.credentials import DeviceRequest
from workflows.devices import DeviceDetails, Page
from workflows.groups import CONNECTED

ROUTES = Routes("Devices")


_LEVEL = r"[ !\"$&-*,-.0-~]+"
# What core/topics.py checks of a filter alone, without the levels that the settings allow.
_SYNTAX: Any = {"pattern": rf"^(?! )(?!.* $)((\+|{_LEVEL})/)*(\+|#|{_LEVEL})$"}


class TopicModel(RequestModel):
    """A topic filter with what the device may do there; `{id}` stands for its id."""

    filter: Annotated[str, Field(min_length=1, max_length=256, examples=["devices/{id}/#"], json_schema_extra=_SYNTAX)]
    access: Literal["read", "write", "readwrite"]


Topics = Annotated[list[TopicModel], Field(min_length=1, max_length=32)]


BrokerState = Literal["pending", "enforced", "closed"]
BrokerProblem = Annotated[
    str, Field(description="Why the broker denies a client in use everything: its topics do not fit the settings")
]


class PendingRequest(RequestModel):
    """A device that is expected to enrol by itself later."""

    name: Name
    type: ShortText
    location: Place
    firmware: ShortText
    metadata: Metadata = Field(default_factory=dict)
    topics: Topics | None = None
    profile: ProfileName | None = None
    external_id: ExternalId | None = None
    groups: GroupNames | None = None


class RegisterRequest(PendingRequest):
    """A device to register. With a `csr` the device keeps its own key, and no bundle is made."""

    csr: Annotated[str, Field(max_length=16384, description="PEM, PKCS#10")] | None = None
    key_type: KeyTypeName | None = None
    validity_days: Annotated[int, Field(ge=1, le=36500), WholeNumber] | None = None
    bundle_password: BundlePassword | None = None
    bundle_format: BundleFormatName | None = None


class RegistrationRequest(RegisterRequest):
    """A device to register, with evidence for the key of its `csr` or without."""

    attestation: RegisteredEvidence | None = None

    @model_validator(mode="after")
    def _is_about_the_key(self) -> Self:
        if self.attestation is not None and self.csr is None:
            raise ValueError("attestation goes with a csr: evidence is about the device's own key")
        return self


class OfDevice(AnswerModel):
    """An answer about a device."""

    device_id: DeviceId


class IssuedAnswer(AnswerModel):
    """A certificate that was issued, with a link and a bundle password or, for a `csr`, itself and its chain."""

    omit_none = True

    fingerprint: Fingerprint
    serial_number: Hex
    issued_at: Timestamp
    expires_at: Timestamp
    download_url: str | None = None
    download_expires_at: Timestamp | None = None
    bundle_password: str | None = None
    certificate: str | None = None
    chain: str | None = None


class RegisteredAnswer(IssuedAnswer):
    """What is registered, with a download link and a bundle password or, for a `csr`, its certificate and chain."""

    name: str
    status: StatusName


class RegisterAnswer(RegisteredAnswer, OfDevice):
    """The new device, with a download link and a bundle password or, for a `csr`, its certificate and chain.

    `broker` is present while topics of the device wait for a restart of the broker, under the control `files`: until
    then it may connect, and not use them.
    """

    broker: Literal["pending"] | None = None


def of_changes(schema: dict[str, Any]) -> None:
    """Say in the JSON schema of a change that it has a field at least, and which do not go together."""
    schema["minProperties"] = 1
    if "metadata_changes" in schema["properties"]:
        both = {"required": ["metadata", "metadata_changes"]}
        frees = {"required": ["external_id"], "properties": {"external_id": {"type": "null"}}, "minProperties": 2}
        schema["not"] = {"anyOf": [both, frees]}
    for field in schema["properties"].values():
        field.pop("default", None)  # a field that is left out stays as it is


class ChangesRequest(RequestModel):
    """Fields to change; those that are left out stay as they are."""

    model_config = ConfigDict(json_schema_extra=of_changes)

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("name at least one field to change")
        return self


class PatchRequest(ChangesRequest):
    """Fields of a device to change; `topics: null` restores the default topics.

    A new `profile`, and new values that its names are made of, count from the next certificate on. `metadata` replaces
    all of it; `metadata_changes` sets some keys, and removes those that are null.

    `external_id: null`, alone, frees the external id of a revoked device for its successor.
    """

    external_id: ExternalId | None = None
    name: Name = ""
    type: ShortText = ""
    location: Place = ""
    firmware: ShortText = ""
    metadata: Metadata = Field(default_factory=dict)
    metadata_changes: Metadata = Field(default_factory=dict)
    topics: Topics | None = None
    profile: ProfileName = "default"

    @model_validator(mode="after")
    def _alone(self) -> Self:
        if self.frees_external_id and len(self.model_fields_set) > 1:
            raise ValueError("external_id: null goes with no other field")
        if {"metadata", "metadata_changes"} <= self.model_fields_set:
            raise ValueError("give either metadata or metadata_changes")
        return self

    @property
    def frees_external_id(self) -> bool:
        """Whether the external id is to be freed."""
        return "external_id" in self.model_fields_set and self.external_id is None


class BrokerAddressModel(AnswerModel):
    """Where a broker is, as devices reach it."""

    host: str
    port: int


class CertificateModel(AnswerModel):
    """A certificate of a device."""

    serial_number: Hex
    fingerprint: Fingerprint
    status: Literal["active", "replaced", "held", "revoked"]
    not_before: Timestamp
    not_after: Timestamp
    issued_at: Timestamp
    revoked_at: Timestamp | None
    revocation_reason: str | None
    certificate: str


class ConnectionModel(AnswerModel):
    """Whether a device is connected to the broker; null if that is not known now, as is always so under `files`.

    `since` is when it connected or, if it is not connected, when it was last seen; null if `connected` is. `last_seen`
    is the last time at which the broker is known to have had it, null if none is.
    """

    connected: bool | None
    since: Timestamp | None
    last_seen: Timestamp | None


class DeviceSummary(AnswerModel):
    """A device in a list. From `renewable_from` on it may renew its certificate by itself.

    `connection` is null for a device that was never connected, `attested` for one that has shown no evidence.
    """

    device_id: DeviceId
    external_id: str | None
    name: str
    type: str
    location: str
    firmware: str
    status: StatusName
    created_at: Timestamp
    updated_at: Timestamp
    revoked_at: Timestamp | None
    revocation_reason: str | None
    profile: str
    expires_at: Timestamp | None
    renewable_from: Timestamp | None
    broker_problem: BrokerProblem | None
    connection: ConnectionModel | None
    attested: AttestationVerdict | None
    metadata: dict[str, Any]
    topics: list[TopicModel]
    groups: list[str]


class DeviceModel(DeviceSummary):
    """A device with its certificate, its topics, and whether the broker enforces its newest state.

    `broker` is `closed` if it does, and that is to deny it everything: see `broker_problem`. `brokers` is where it
    connects; `topics_group` is the group whose topics it has, null if it has its own, or the default ones.
    """

    topics_group: str | None

    former_external_id: str | None
    broker: BrokerState
    brokers: list[BrokerAddressModel]
    certificate: CertificateModel | None
    attestation: AttestationModel | None


class DevicePage(AnswerModel):
    """Devices, in the order of the list. Only a null `next_cursor` marks the last page.

    A page before it can be short, or even empty: with `q` or with several filters a request stops after it has looked
    at a limited number of devices.
    """

    devices: list[DeviceSummary]
    next_cursor: str | None


class CertificateList(AnswerModel):
    """Every certificate a device has had, newest first."""

    certificates: list[CertificateModel]


SearchText = Annotated[
    Place, Field(description="A part of the name, of the external id or of the metadata, or a whole id")
]


class DeviceConditions(RequestModel):
    """Which devices."""

    status: StatusName | None = None
    name: Name | None = None
    type: ShortText | None = None
    location: Place | None = None
    q: SearchText | None = None
    metadata: MetadataPair | None = None
    expires_before: Time | None = None
    external_id: ExternalId | None = None
    profile: ProfileName | None = None
    group: GroupName | None = None
    attested: (
        Annotated[
            Literal["passed", "failed", "outdated", "none"],
            Field(description="The verdict about their evidence; none: they have shown none"),
        ]
        | None
    ) = None


class DeviceQuery(DeviceConditions):
    """Filters of the list of devices, and its order."""

    connected: (
        Annotated[
            Literal["true", "false", "never"],
            Field(
                description="false: devices that were seen before and are not connected now; never: that were never"
                " seen. Devices whose broker is not heard are left out; refused if no broker is heard"
            ),
        ]
        | None
    ) = None
    sort: (
        Annotated[
            Literal["created", "name", "-name", "expires", "last_seen", "-last_seen"],
            Field(
                description="created: the oldest first; name, -name: by name, forward and back; expires: whose"
                " certificate expires first, without those that have none; last_seen: devices that were never seen,"
                " then those that were seen longest ago, at last those that are connected; -last_seen: the other way"
                " round, which is the order with connected alone"
            ),
        ]
        | None
    ) = None
    named: (
        Annotated[
            Place,
            Field(
                description="The devices that this text may mean: a whole id, the beginning of one (4 digits or more),"
                " a name, or an external id; one page of them, by id, without a cursor"
            ),
        ]
        | None
    ) = None
    limit: Limit = 50
    cursor: Cursor | None = None


@ROUTES.add(
    "POST",
    "/register",
    Permission.CHANGE,
    Answers(
        "The device is registered and durably recorded",
        model=RegisterAnswer,
        status=201,
        headers={"Location": "The device's path"},
    ),
    errors=(404, 409),
    idempotency_key=True,
)
def register(call: Call, body: RegistrationRequest) -> Reply:
    """Register a device: create its key and certificate, or sign its CSR."""
    registered = call.portal.registrations.register(call.actor, registration_of(body), call.idempotency_key)
    location = {"Location": f"/devices/{registered.device_id}"}
    waits = call.portal.inventory.waits_for_broker(call.actor.tenant_id, registered.device_id, registered.generation)
    return Reply(RegisterAnswer.of(registered, broker="pending" if waits else None), headers=location)


@ROUTES.add("GET", "/devices", Permission.READ, errors=(404, 409))
def list_devices(call: Call, query: DeviceQuery) -> DevicePage:
    """List devices, newest first; with `expires_before`, those that expire soonest first, unless `sort` says else."""
    inventory, tenant_id = call.portal.inventory, call.actor.tenant_id
    filters = DeviceFilter(
        **query.model_dump(exclude={"limit", "cursor", "connected", "named"}),
        connected=None if query.connected is None else CONNECTED[query.connected],
    )
    if query.named is not None:
        return _page(call, inventory.named(tenant_id, query.named, filters, limit=query.limit))
    return _page(call, inventory.devices(tenant_id, filters, limit=query.limit, cursor=query.cursor))


def _page(call: Call, page: Page) -> DevicePage:
    summaries = [
        DeviceSummary.of(
            one.device,
            device_id=one.device.id,
            **_dates(call, one.device, one.not_before, one.not_after),
            broker_problem=page.problems.get(one.device.id),
            connection=connection_model(connection_of(one.presence, page.contacts)),
            topics=[
                TopicModel(filter=pattern, access=Access(access).value)
                for pattern, access in page.topics.get(one.device.id, page.default_topics)
            ],
            groups=list(page.groups.get(one.device.id, ())),
        )
        for one in page.devices
    ]
    return DevicePage(devices=summaries, next_cursor=page.cursor)


@ROUTES.add("GET", "/devices/{device_id}", Permission.READ)
def show_device(call: Call, device_id: str) -> DeviceModel:
    """Show a device with its current certificate, its topics and its broker state."""
    return _device_model(call, call.portal.inventory.device(call.actor.tenant_id, device_id))


@ROUTES.add("PATCH", "/devices/{device_id}", Permission.CHANGE, errors=(409,))
def update_device(call: Call, device_id: str, body: PatchRequest) -> DeviceModel:
    """Change a device's description or topics."""
    if body.frees_external_id:
        call.portal.registrations.free_external_id(call.actor, device_id)
        return _device_model(call, call.portal.inventory.device(call.actor.tenant_id, device_id))
    values = body.model_dump(exclude_unset=True, exclude={"topics"})
    topics = pairs(body.topics) if "topics" in body.model_fields_set else ...
    call.portal.registrations.update(call.actor, device_id, values, topics)
    return _device_model(call, call.portal.inventory.device(call.actor.tenant_id, device_id))


@ROUTES.add("GET", "/devices/{device_id}/certificates", Permission.READ)
def list_certificates(call: Call, device_id: str) -> CertificateList:
    """List every certificate a device has had, newest first."""
    records = call.portal.inventory.certificates(call.actor.tenant_id, device_id)
    return CertificateList(certificates=[certificate_model(record) for record in records])


def registration_of(body: PendingRequest) -> DeviceRequest:
    """Return the device to register, or to expect, with its CSR parsed; raises ``CsrInvalid``, ``KeyRefused``."""
    values = body.model_dump(exclude={"topics", "attestation"})
    if values.get("csr") is not None:
        values["csr"] = read_csr(values["csr"])
    if values.get("profile") == DEFAULT:
        values["profile"] = None  # as if it were left out
    values["groups"] = tuple(sorted({*(body.groups or ())}))
    if isinstance(body, RegistrationRequest) and (evidence := body.attestation) is not None:
        values |= {"evidence": evidence.shown(), "policy_id": evidence.policy_id}
    return DeviceRequest(**{**values, "topics": pairs(body.topics)})


def pairs(topics: Sequence[TopicModel] | None) -> list[tuple[str, str]] | None:
    """Return topics as pairs of filter and access."""
    return None if topics is None else [(topic.filter, topic.access) for topic in topics]


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
    return DeviceModel.of(
        details.device,
        **_dates(call, details.device, not_before, not_after),
        device_id=details.device.id,
        topics=[TopicModel(filter=topic.filter, access=topic.access.value) for topic in details.topics],
        **broker_state(details),
        brokers=[
            BrokerAddressModel(host=one.host, port=one.port)
            for one in call.portal.settings.broker_addresses_of(details.device.tenant_id)
        ],
        connection=connection_model(details.connection),
        groups=list(details.groups),
        topics_group=details.topics_group,
        certificate=None if certificate is None else certificate_model(certificate),
        attestation=None if details.attestation is None else AttestationModel.of(details.attestation),
    )


def broker_state(details: DeviceDetails) -> dict[str, str | None]:
    """Return whether the broker applies the newest state of a device or application, and what is wrong with that."""
    state = "pending" if not details.applied else "enforced" if details.problem is None else "closed"
    return {"broker": state, "broker_problem": details.problem}


def connection_model(connection: DeviceConnection | None) -> ConnectionModel | None:
    """Return what is known of a connection as answers show it."""
    return None if connection is None else ConnectionModel.of(connection)


def certificate_model(record: CertificateRecord) -> CertificateModel:
    """Return a certificate as answers show it."""
    return CertificateModel.of(record, certificate=ssl.DER_cert_to_PEM_cert(record.der))
