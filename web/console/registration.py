"""Registers a device on the fleet's page, and hands over link and password once, with a QR code of the link."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from core.errors import Conflict, Forbidden, InputInvalid
from core.roles import Permission
from web.api.devices import RegisterRequest, registration_of
from web.api.fields import (
    BundleFormatName,
    ExternalId,
    GroupNames,
    IntegerText,
    KeyTypeName,
    Name,
    Place,
    ProfileName,
    ShortText,
)
from web.api.problems import status_of
from web.api.routing import IDEMPOTENCY_KEY, RequestModel, input_invalid
from web.console.handover import handed_over
from web.console.pages import Pages, Shown, Visit
from web.console.text_fields import CsrText, Lines, check_own_key, csr_of, metadata_of, topics_of
from workflows.credentials import DeviceRequest

PAGES = Pages()
PATH = "/ui/devices/register"
Once = Annotated[str, Field(pattern=IDEMPOTENCY_KEY, max_length=64)]


class RegisterForm(RequestModel):
    """A device to register; a form that is sent twice registers one, by ``once``."""

    once: Once
    name: Name
    type: ShortText
    location: Place
    firmware: ShortText
    external_id: ExternalId | None = None
    key_type: KeyTypeName | None = None
    bundle_format: BundleFormatName | None = None
    groups: GroupNames = Field(default_factory=list)
    profile: ProfileName | None = None
    validity_days: Annotated[int, Field(ge=1, le=36500), IntegerText] | None = None
    metadata: Lines = ""
    topics: Lines = ""
    csr: CsrText | None = None

    def request(self, csr: str | None) -> DeviceRequest:
        """Return the device to register; raises ``InputInvalid`` (``CsrInvalid``, ``KeyRefused``)."""
        check_own_key(csr, self.key_type, self.bundle_format)
        others = {"once", "metadata", "topics", "csr"}
        values = self.model_dump(exclude=others, exclude_none=True, exclude_defaults=True)
        if csr is not None:
            values["csr"] = csr
        if self.metadata:
            values["metadata"] = metadata_of(self.metadata)
        if self.topics:
            values["topics"] = topics_of(self.topics)
        try:
            return registration_of(RegisterRequest.model_validate(values))
        except ValidationError as error:
            raise input_invalid(error) from None


def new_once() -> str:
    """Return what makes a form's second sending a repeat."""
    return secrets.token_urlsafe(18)


@PAGES.add("GET", PATH, Permission.CHANGE)
def ask(visit: Visit) -> Shown:
    """Show the form to register a device."""
    return Shown("register.html", {"once": new_once(), "problems": {}, "given": {}, **_choices(visit)})


@PAGES.add("POST", PATH, Permission.CHANGE)
def register(visit: Visit) -> Shown:
    """Register a device, and show its link and password this once."""
    try:
        form = visit.form(RegisterForm, many=("groups",))
        request = form.request(csr_of(visit.request, form.csr))
        registered = visit.portal.registrations.register(visit.actor, request, form.once)
    except (InputInvalid, Conflict, Forbidden) as error:
        return _again(visit, error)
    return handed_over(visit, registered, registered.name)


def _choices(visit: Visit) -> dict[str, list[str]]:
    """Return the names of the groups and certificate profiles to choose from."""
    tenant_id = visit.actor.tenant_id
    return {
        "groups": [one.name for one in visit.portal.groups.groups(tenant_id) if one.filter is None],
        "profiles": [one.profile.name for one in visit.portal.profiles.profiles(tenant_id)],
    }


def _again(visit: Visit, error: InputInvalid | Conflict | Forbidden) -> Shown:
    found = error.errors if isinstance(error, InputInvalid) else ()
    problems: Mapping[str, str] = {one.field.partition(".")[0]: one.message for one in found}
    given: dict[str, Any] = {name: visit.request.form.get(name, "") for name in RegisterForm.model_fields}
    given["groups"] = visit.request.form.getlist("groups")
    shown = problems if problems.keys() & given.keys() - {"once"} else {"": error.detail}
    values = {"once": new_once(), "problems": shown, "given": given, **_choices(visit)}
    return Shown("register.html", values, status=status_of(error))
