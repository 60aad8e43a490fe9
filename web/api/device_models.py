"""The shapes of requests about devices with those of their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from web.api.fields import (
    BundleFormatName,
    BundlePassword,
    Cursor,
    DeviceId,
    ExternalId,
    Fingerprint,
    Hex,
    Input,
    KeyTypeName,
    Limit,
    Metadata,
    Name,
    Output,
    Place,
    ReasonName,
    ShortText,
    StatusName,
    Time,
    Timestamp,
    WholeNumber,
)


class TopicModel(Input):
    """A topic filter with what the device may do there; `{id}` stands for its id."""

    filter: Annotated[str, Field(min_length=1, max_length=256, examples=["devices/{id}/#"])]
    access: Literal["read", "write", "readwrite"]


Topics = Annotated[list[TopicModel], Field(min_length=1, max_length=32)]


class RegisterRequest(Input):
    """A device to register. With a `csr` the device keeps its own key, and no bundle is made."""

    name: Name
    type: ShortText
    location: Place
    firmware: ShortText
    metadata: Metadata = Field(default_factory=dict)
    csr: Annotated[str, Field(max_length=16384, description="PEM, PKCS#10")] | None = None
    key_type: KeyTypeName | None = None
    validity_days: Annotated[int, Field(ge=1, le=36500), WholeNumber] | None = None
    topics: Topics | None = None
    bundle_password: BundlePassword | None = None
    bundle_format: BundleFormatName | None = None
    external_id: ExternalId | None = None


class RegisterAnswer(Output):
    """The new device; a link and a password, or with a `csr` the certificate and its chain."""

    device_id: DeviceId
    name: str
    status: StatusName
    fingerprint: Fingerprint
    serial_number: Hex
    issued_at: Timestamp
    expires_at: Timestamp
    download_url: str | None = None
    download_expires_at: Timestamp | None = None
    bundle_password: str | None = None
    certificate: str | None = None
    chain: str | None = None


def _of_changes(schema: dict[str, Any]) -> None:
    schema["minProperties"] = 1
    for field in schema["properties"].values():
        field.pop("default", None)  # what is left out is kept


class PatchRequest(Input):
    """What to change of a device; `topics: null` gives it the default topics again."""

    model_config = ConfigDict(json_schema_extra=_of_changes)

    name: Name = ""
    type: ShortText = ""
    location: Place = ""
    firmware: ShortText = ""
    metadata: Metadata = Field(default_factory=dict)
    topics: Topics | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("name at least one field to change")
        return self


class CertificateModel(Output):
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


class DeviceSummary(Output):
    """A device as a list shows it; from `renewable_from` on it may renew its certificate by itself."""

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
    expires_at: Timestamp | None
    renewable_from: Timestamp | None


class DeviceModel(DeviceSummary):
    """A device with its certificate, its topics and whether the broker knows its newest state."""

    metadata: dict[str, Any]
    topics: list[TopicModel]
    broker: Literal["pending", "applied"]
    certificate: CertificateModel | None


class DevicePage(Output):
    """Devices, newest first; `next_cursor` is null on the last page, and nothing else shows that it is the last.

    A page is short, or empty, where more than one filter, or `q`, had it look at many devices for few that fit.
    """

    devices: list[DeviceSummary]
    next_cursor: str | None


class CertificateList(Output):
    """Every certificate a device has had, newest first."""

    certificates: list[CertificateModel]


class DeviceQuery(Input):
    """Which devices to list."""

    status: StatusName | None = None
    type: ShortText | None = None
    location: Place | None = None
    q: Place | None = None
    expires_before: Time | None = None
    external_id: ExternalId | None = None
    limit: Limit = 50
    cursor: Cursor | None = None


class RevokeRequest(Input):
    """Why a device is revoked: a reason of RFC 5280 section 5.3.1."""

    reason: ReasonName = "unspecified"


class RevokeAnswer(Output):
    """`enforced`: the broker was seen to refuse it; `pending`: it is revoked, and the broker has yet to be told."""

    device_id: DeviceId
    status: Literal["revoked"]
    revoked_at: Timestamp
    reason: str
    broker: Literal["enforced", "pending"]
    broker_problem: str | None = None
