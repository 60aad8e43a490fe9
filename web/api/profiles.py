"""Certificate profiles: which certificates devices may have, and which names these hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from core.roles import Permission
from pki.profiles import MAX_DAYS, MAX_TEMPLATE, MAX_TEMPLATES, CertificateProfile, Purpose
from web.api.devices import ChangesRequest
from web.api.fields import KeyTypeName, ProfileName, WholeNumber
from web.api.routing import AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp
from workflows.profiles import ListedProfile

ROUTES = Routes("Certificate profiles")

PurposeName = Literal["client_auth", "server_auth"]
_UNIQUE: Any = {"uniqueItems": True}  # which check_profile checks
_FOR_CLIENTS: Any = {"uniqueItems": True, "contains": {"const": "client_auth"}}
KeyTypes = Annotated[
    list[KeyTypeName], Field(min_length=1, max_length=len(get_args(KeyTypeName)), json_schema_extra=_UNIQUE)
]
PURPOSES: tuple[PurposeName, ...] = get_args(PurposeName)
Purposes = Annotated[list[PurposeName], Field(min_length=1, max_length=len(PURPOSES), json_schema_extra=_FOR_CLIENTS)]
Days = Annotated[int, Field(ge=1, le=MAX_DAYS), WholeNumber]
_Text = Annotated[str, Field(min_length=1, max_length=MAX_TEMPLATE)]
DnsNames = Annotated[
    list[_Text], Field(max_length=MAX_TEMPLATES, json_schema_extra=_UNIQUE, examples=[["{name}.devices.example.com"]])
]
Addresses = Annotated[
    list[_Text], Field(max_length=MAX_TEMPLATES, json_schema_extra=_UNIQUE, examples=[["{metadata.ip}"]])
]

if set(PURPOSES) != set(Purpose):
    raise AssertionError("PurposeName must name the values of pki.profiles.Purpose")


class ProfileRequest(RequestModel):
    """A profile to add. What it leaves out is as in `default`.

    In names and attributes `{id}`, `{name}`, `{external_id}`, `{type}`, `{location}`, `{firmware}`, `{metadata.KEY}`
    and `{serial}` (the serial number that a device enrolled with) stand for the device's values.
    """

    name: ProfileName
    default_days: Days | None = None
    max_days: Days | None = None
    key_types: KeyTypes = Field(default_factory=lambda: list(get_args(KeyTypeName)))
    extended_key_usage: Purposes = Field(default_factory=lambda: [PURPOSES[0]])
    dns_names: DnsNames = Field(default_factory=list)
    ip_addresses: Addresses = Field(default_factory=list)
    organization: _Text | None = None
    organizational_unit: _Text | None = None
    serial_number: _Text | None = None


class ProfilePatch(ChangesRequest):
    """Rules of a profile to change; they count for the certificates that are issued from then on, renewals, too."""

    default_days: Days | None = None
    max_days: Days | None = None
    key_types: KeyTypes = Field(default_factory=list)
    extended_key_usage: Purposes = Field(default_factory=list)
    dns_names: DnsNames = Field(default_factory=list)
    ip_addresses: Addresses = Field(default_factory=list)
    organization: _Text | None = None
    organizational_unit: _Text | None = None
    serial_number: _Text | None = None


class ProfileModel(AnswerModel):
    """A certificate profile; a built-in one has no dates, and cannot be changed.

    Null in `default_days` and `max_days` stands for what the settings say, and for no limit.
    """

    name: str
    built_in: bool
    default_days: int | None
    max_days: int | None
    key_types: list[KeyTypeName]
    extended_key_usage: list[PurposeName]
    dns_names: list[str]
    ip_addresses: list[str]
    organization: str | None
    organizational_unit: str | None
    serial_number: str | None
    created_at: Timestamp | None
    updated_at: Timestamp | None


class ProfileList(AnswerModel):
    """Every profile: first `default`, then the others by name."""

    profiles: list[ProfileModel]


@ROUTES.add("GET", "/profiles", Permission.READ)
def list_profiles(call: Call) -> ProfileList:
    """List certificate profiles."""
    listed = call.portal.profiles.profiles(call.actor.tenant_id)
    return ProfileList(profiles=[_model(profile) for profile in listed])


@ROUTES.add(
    "POST",
    "/profiles",
    Permission.PROFILES,
    Answers("The profile", model=ProfileModel, status=201, headers={"Location": "The profile's path"}),
    errors=(409,),
)
def add_profile(call: Call, body: ProfileRequest) -> Reply:
    """Add a certificate profile."""
    added = call.portal.profiles.add(call.actor, CertificateProfile(**_values(body.model_dump())))
    return Reply(_model(added), headers={"Location": f"/profiles/{body.name}"})


@ROUTES.add("GET", "/profiles/{profile}", Permission.READ)
def show_profile(call: Call, profile: str) -> ProfileModel:
    """Show a certificate profile."""
    return _model(call.portal.profiles.profile(call.actor.tenant_id, profile))


@ROUTES.add("PATCH", "/profiles/{profile}", Permission.PROFILES, errors=(409,))
def update_profile(call: Call, profile: str, body: ProfilePatch) -> ProfileModel:
    """Change a certificate profile; certificates that were issued stay as they are."""
    return _model(call.portal.profiles.update(call.actor, profile, _values(body.model_dump(exclude_unset=True))))


@ROUTES.add("DELETE", "/profiles/{profile}", Permission.PROFILES, Answers("The profile is removed"), errors=(409,))
def remove_profile(call: Call, profile: str) -> ProfileModel:
    """Remove a certificate profile that no device, enrolment token or manufacturer has any more."""
    return _model(call.portal.profiles.remove(call.actor, profile))


def _values(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _model(listed: ListedProfile) -> ProfileModel:
    return ProfileModel.of(listed.profile, listed, built_in=listed.created_at is None)
