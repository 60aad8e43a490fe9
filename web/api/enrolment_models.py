"""The shapes of requests about devices that enrol by themselves with those of their answers."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from web.api.device_models import Topics
from web.api.fields import (
    DeviceId,
    Fingerprint,
    Input,
    KeyTypeName,
    Metadata,
    Name,
    Output,
    Place,
    ShortText,
    StatusName,
    Timestamp,
    WholeNumber,
)

Approval = Literal["at_once", "operator"]
KeyTypes = Annotated[list[KeyTypeName], Field(min_length=1, max_length=5)]
Days = Annotated[int, Field(ge=1, le=36500), WholeNumber]
Pem = Annotated[str, Field(max_length=16384, description="One certificate in PEM")]


class PendingRequest(Input):
    """A device to be known, which enrols by itself later."""

    name: Name
    type: ShortText
    location: Place
    firmware: ShortText
    metadata: Metadata = Field(default_factory=dict)
    topics: Topics | None = None


class DecisionAnswer(Output):
    """A device about which an operator has decided."""

    device_id: DeviceId
    status: StatusName


class ApproveRequest(Input):
    """Which key to approve; left out, the one that the device has asked with."""

    key_fingerprint: Fingerprint | None = None


class EnrolmentModel(Output):
    """What a device has asked for last: `key_fingerprint` is the SHA-256 of its key, to be compared with the device.

    `again`: the device is in, and has asked for a certificate for another key.
    """

    device_id: DeviceId
    enrolment_token_id: str | None
    manufacturer_id: str | None
    key_fingerprint: Fingerprint
    status: Literal["waiting", "approved", "issued", "rejected"]
    again: bool


class AskingModel(Output):
    """A device that waits for an operator; `again` where it is in and asks for a certificate for another key."""

    device_id: DeviceId
    name: str
    again: bool
    key_fingerprint: Fingerprint
    enrolment_token_id: str | None
    manufacturer_id: str | None
    asked_at: Timestamp


class AskingList(Output):
    """The thousand that have waited longest."""

    enrolments: list[AskingModel]


class TermsRequest(Input):
    """What becomes of the devices: `name_template` is their name, `{serial}` standing for their own number."""

    type: ShortText = "device"
    location: Place = "unknown"
    firmware: ShortText = "unknown"
    name_template: Name = "{serial}"
    key_types: KeyTypes = Field(default_factory=lambda: list(get_args(KeyTypeName)))
    validity_days: Days | None = None
    approval: Approval = "at_once"


class EnrolmentTokenRequest(TermsRequest):
    """A token for the pending device `device_id`, or for `count` new devices; in names `{number}` counts them."""

    name: ShortText
    device_id: DeviceId | None = None
    count: Annotated[int, Field(ge=1, le=1000000), WholeNumber] = 1
    expires_in_hours: Annotated[int, Field(ge=1, le=8760), WholeNumber] = 24

    @model_validator(mode="after")
    def _one_device_once(self) -> Self:
        if self.device_id is not None and self.count != 1:
            raise ValueError("with a device_id the count is 1")
        return self


class TermsModel(Output):
    """What becomes of the devices."""

    type: str
    location: str
    firmware: str
    name_template: str
    key_types: list[str]
    validity_days: int | None
    approval: Approval


class EnrolmentTokenModel(TermsModel):
    """An enrolment token, without its secret."""

    enrolment_token_id: str
    name: str
    device_id: DeviceId | None
    count: int
    uses: int
    created_at: Timestamp
    expires_at: Timestamp
    revoked_at: Timestamp | None


class NewEnrolmentTokenModel(EnrolmentTokenModel):
    """A new enrolment token, with the secret that is shown this once."""

    token: str


class EnrolmentTokenList(Output):
    """The newest thousand tokens, newest first."""

    enrolment_tokens: list[EnrolmentTokenModel]


class ManufacturerRequest(TermsRequest):
    """A CA whose certificates devices are born with; `{serial}` is the serialNumber or common name in them."""

    name: ShortText
    certificate: Pem


class ProofRequest(Input):
    """That somebody has the CA's key: a certificate it has signed, the nonce its common name; or its signature."""

    certificate: Pem | None = None
    signature: Annotated[str, Field(max_length=4096, description="Of the nonce's text, in Base64")] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.certificate is None) == (self.signature is None):
            raise ValueError("give either a certificate or a signature")
        return self


class ManufacturerModel(TermsModel):
    """A manufacturer; `nonce` is what its CA is to sign while it is `unproven`."""

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


class ManufacturerList(Output):
    """Every manufacturer, newest first."""

    manufacturers: list[ManufacturerModel]
