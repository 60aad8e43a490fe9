"""Applications in the console: clients of the broker that are no devices, registered, renewed and revoked."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from core.errors import Conflict, InputInvalid
from core.roles import Permission
from core.states import ClientKind, DeviceStatus
from pki.csr import read_csr
from store.devices import DeviceFilter
from web.api.applications import ApplicationChanges, ApplicationRequest
from web.api.devices import pairs
from web.api.fields import BundleFormatName, Cursor, IntegerText, KeyTypeName, Name
from web.api.routing import RequestModel, input_invalid
from web.console.access import ACCESS, access_values, form_again
from web.console.handover import handed_over
from web.console.pages import Moved, Pages, Shown, Visit
from web.console.registration import Once, new_once
from web.console.text_fields import CsrText, Lines, check_own_key, csr_of, topics_of
from web.console.watching import watched
from workflows.connections import connection_of
from workflows.credentials import DeviceRequest
from workflows.renewal import RenewalRequest

PAGES = Pages()
APPLICATIONS = f"{ACCESS}/applications"
PATH = f"{APPLICATIONS}/{{application_id}}"
KIND = ClientKind.APPLICATION
PER_PAGE = 50
_M = TypeVar("_M", bound=BaseModel)


class ApplicationsQuery(RequestModel):
    """From where on."""

    cursor: Cursor | None = None


class ApplicationForm(RequestModel):
    """An application to register; a form that is sent twice registers one, by ``once``."""

    once: Once
    name: Name
    topics: Lines
    key_type: KeyTypeName | None = None
    bundle_format: BundleFormatName | None = None
    validity_days: Annotated[int, Field(ge=1, le=36500), IntegerText] | None = None
    csr: CsrText | None = None


class EditForm(RequestModel):
    """What an application is called, and all topics that it has."""

    name: Name
    topics: Lines


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
        "rows": [(one, connection_of(one.presence, page.contacts)) for one in page.devices],
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
        csr = csr_of(visit.request, form.csr)
        check_own_key(csr, form.key_type, form.bundle_format)
        values = form.model_dump(exclude={"once", "topics", "csr"})
        body = _checked(ApplicationRequest, {**values, "topics": topics_of(form.topics)})
        own = None if csr is None else read_csr(csr)
        request = DeviceRequest(**{**dict(body), "csr": own, "topics": pairs(body.topics)}, kind=KIND)
        registered = visit.portal.registrations.register(visit.actor, request, form.once)
    except (InputInvalid, Conflict) as error:
        return form_again(visit, "application_new.html", ApplicationForm, error)
    return handed_over(visit, registered, registered.name, back=APPLICATIONS)


@PAGES.add("GET", f"{PATH}/edit", Permission.APPLICATIONS)
def edit_application(visit: Visit, application_id: str) -> Shown:
    """Show the form for an application's name and topics."""
    details = visit.portal.inventory.device(visit.actor.tenant_id, application_id, kind=KIND)
    topics = "\n".join(f"{topic.filter} {topic.access.value}" for topic in details.topics)
    given = {"name": details.device.name, "topics": topics}
    return Shown("application_edit.html", {"given": given, "problems": {}, "application": details.device})


@PAGES.add("POST", f"{PATH}/edit", Permission.APPLICATIONS)
def change_application(visit: Visit, application_id: str) -> Moved | Shown:
    """Change an application's name and topics; what is taken away is refused by the broker before the answer."""
    details = visit.portal.inventory.device(visit.actor.tenant_id, application_id, kind=KIND)
    try:
        form = visit.form(EditForm)
        wanted = _checked(ApplicationChanges, {"name": form.name, "topics": topics_of(form.topics)})
        before = [(topic.filter, topic.access.value) for topic in details.topics]
        topics = ... if pairs(wanted.topics) == before else pairs(wanted.topics)
        values = {} if form.name == details.device.name else {"name": form.name}
        if values or topics is not ...:
            visit.portal.registrations.update(visit.actor, application_id, values, topics, kind=KIND)
    except (InputInvalid, Conflict) as error:
        return form_again(visit, "application_edit.html", EditForm, error, application=details.device)
    return Moved(APPLICATIONS)


def _checked(model: type[_M], values: dict[str, Any]) -> _M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise input_invalid(error) from None


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
