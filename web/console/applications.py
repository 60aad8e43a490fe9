"""Applications in the console: clients of the broker that are no devices, registered, renewed and revoked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from core.errors import Conflict, FieldProblem, InputInvalid
from core.roles import Permission
from core.states import ClientKind, DeviceStatus
from store.devices import DeviceFilter
from web.api.applications import ApplicationRequest
from web.api.devices import pairs
from web.api.fields import Cursor, KeyTypeName, Name
from web.api.routing import RequestModel, input_invalid
from web.console.access import ACCESS, access_values, form_again
from web.console.handover import handed_over
from web.console.pages import Moved, Pages, Shown, Visit
from web.console.registration import Once, new_once
from web.console.watching import watched
from workflows.credentials import DeviceRequest
from workflows.presence import connection_of
from workflows.renewal import RenewalRequest

PAGES = Pages()
APPLICATIONS = f"{ACCESS}/applications"
PATH = f"{APPLICATIONS}/{{application_id}}"
KIND = ClientKind.APPLICATION
PER_PAGE = 50


class ApplicationsQuery(RequestModel):
    """From where on."""

    cursor: Cursor | None = None


class ApplicationForm(RequestModel):
    """An application to register; a form that is sent twice registers one, by ``once``."""

    once: Once
    name: Name
    topics: Annotated[str, Field(max_length=32768)]
    key_type: KeyTypeName | None = None


class RenewForm(RequestModel):
    """A form that is sent twice renews once, by ``once``."""

    once: Once


@PAGES.add("GET", APPLICATIONS, Permission.READ)
def applications(visit: Visit) -> Shown:
    """List the applications, newest first."""
    query = visit.query(ApplicationsQuery)
    page = visit.portal.inventory.devices(
        visit.actor.tenant_id, DeviceFilter(kind=KIND), limit=PER_PAGE, cursor=query.cursor
    )
    applied = visit.portal.enforcements.applied_generation()
    found = [one.device for one in page.devices if one.device.status is DeviceStatus.REVOKED]
    pending = {one.id: one.generation for one in found if one.generation > applied}
    values = {
        "pending": pending,
        **watched(visit, max(pending.values(), default=0)),
        "rows": [(one, connection_of(one.presence, page.contact)) for one in page.devices],
        "topics": page.topics,
        "next": None if page.cursor is None else f"{APPLICATIONS}?cursor={page.cursor}",
        "first": APPLICATIONS if query.cursor else None,
        "once": new_once(),
    }
    return Shown("applications.html", access_values(values))


@PAGES.add("GET", f"{APPLICATIONS}/new", Permission.APPLICATIONS)
def new_application(_visit: Visit) -> Shown:
    """Show the form for an application."""
    return Shown("application_new.html", {"once": new_once(), "given": {}, "problems": {}})


@PAGES.add("POST", f"{APPLICATIONS}/new", Permission.APPLICATIONS)
def register_application(visit: Visit) -> Shown:
    """Register an application, and show its link and password this once."""
    try:
        form = visit.form(ApplicationForm)
        body = _request(form)
        request = DeviceRequest(**{**dict(body), "topics": pairs(body.topics)}, kind=KIND)
        registered = visit.portal.registrations.register(visit.actor, request, form.once)
    except (InputInvalid, Conflict) as error:
        return form_again(visit, "application_new.html", ApplicationForm, error)
    return handed_over(visit, registered, registered.name, back=APPLICATIONS)


def _request(form: ApplicationForm) -> ApplicationRequest:
    lines = [line.strip() for line in form.topics.splitlines() if line.strip()]
    topics = [dict(zip(("filter", "access"), line.rsplit(None, 1), strict=False)) for line in lines]
    values: dict[str, Any] = {"name": form.name, "topics": topics, "key_type": form.key_type}
    try:
        return ApplicationRequest.model_validate(values)
    except ValidationError as error:
        refused = input_invalid(error)
        text = "a line is a topic filter, a space, and read, write or readwrite"
        raise InputInvalid(refused.detail, [FieldProblem("topics", text)]) from None


@PAGES.add("POST", f"{PATH}/renew", Permission.APPLICATIONS)
def renew_application(visit: Visit, application_id: str) -> Shown:
    """Issue new credentials for an application, and show them this once."""
    form = visit.form(RenewForm)
    renewed = visit.portal.renewals.renew(visit.actor, application_id, RenewalRequest(), form.once, kind=KIND)
    return handed_over(visit, renewed, renewed.name, back=APPLICATIONS)


@PAGES.add("POST", f"{PATH}/revoke", Permission.APPLICATIONS)
def revoke_application(visit: Visit, application_id: str) -> Moved:
    """Revoke an application for good; a repeat changes nothing."""
    visit.portal.revocations.revoke(visit.actor, application_id, "unspecified", kind=KIND, waits=False)
    return Moved(APPLICATIONS)
