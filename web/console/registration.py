"""Registers a device on the fleet's page, and hands over link and password once, with a QR code of the link."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from core.errors import Conflict, InputInvalid
from core.roles import Permission
from web.api.devices import RegisterRequest, registration_of
from web.api.fields import BundleFormatName, ExternalId, KeyTypeName, Name, Place, ShortText
from web.api.routing import IDEMPOTENCY_KEY, RequestModel
from web.console.handover import handed_over
from web.console.pages import Pages, Shown, Visit

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


def new_once() -> str:
    """Return what makes a form's second sending a repeat."""
    return secrets.token_urlsafe(18)


@PAGES.add("GET", PATH, Permission.CHANGE)
def ask(_visit: Visit) -> Shown:
    """Show the form to register a device."""
    return Shown("register.html", {"once": new_once(), "problems": {}, "given": {}})


@PAGES.add("POST", PATH, Permission.CHANGE)
def register(visit: Visit) -> Shown:
    """Register a device, and show its link and password this once."""
    try:
        form = visit.form(RegisterForm)
        request = registration_of(RegisterRequest(**form.model_dump(exclude={"once"}, exclude_none=True)))
        registered = visit.portal.registrations.register(visit.actor, request, form.once)
    except (InputInvalid, Conflict) as error:
        return _again(visit, error)
    return handed_over(visit, registered, registered.name)


def _again(visit: Visit, error: InputInvalid | Conflict) -> Shown:
    found = error.errors if isinstance(error, InputInvalid) else ()
    problems: Mapping[str, str] = {one.field: one.message for one in found}
    given: dict[str, Any] = {name: visit.request.form.get(name, "") for name in RegisterForm.model_fields}
    shown = problems if problems.keys() & given.keys() - {"once"} else {"": error.detail}
    values = {"once": new_once(), "problems": shown, "given": given}
    return Shown("register.html", values, status=422 if isinstance(error, InputInvalid) else 409)
