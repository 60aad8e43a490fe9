"""Tenants in the console, for the role system: added, suspended, resumed, and removed for good."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from core.errors import Conflict, InputInvalid, Unavailable
from core.roles import Permission
from core.tenants import Quotas, TenantStatus
from web.api.fields import BundleFormatName, IntegerText, KeyTypeName, TenantName, TopicPrefix
from web.api.routing import RequestModel
from web.console.access import ACCESS, access_values, form_again, secret_shown
from web.console.pages import Moved, Pages, Shown, Visit
from web.console.registration import Once, new_once
from web.console.watching import watched
from workflows.tenant_life import NewTenant

PAGES = Pages()
TENANTS = f"{ACCESS}/tenants"
PATH = f"{TENANTS}/{{tenant}}"
_Quota = Annotated[int, Field(ge=1, le=1_000_000_000), IntegerText]
_CHOICES = ("device_days", "key_type", "bundle_format", "link_hours")


class TenantForm(RequestModel):
    """A tenant to add; a form that is sent twice adds one, by ``once``."""

    once: Once
    name: TenantName
    topic_prefix: TopicPrefix | None = None
    devices: _Quota | None = None
    own_root: Literal["yes"] | None = None


class EditForm(RequestModel):
    """What holds for a tenant, and how much it may take; what is left out is as the settings say, or has no limit."""

    device_days: Annotated[int, Field(ge=1, le=36500), IntegerText] | None = None
    key_type: KeyTypeName | None = None
    bundle_format: BundleFormatName | None = None
    link_hours: Annotated[int, Field(ge=1, le=8760), IntegerText] | None = None
    devices: _Quota | None = None
    registrations_per_minute: _Quota | None = None
    bulk_uploads: _Quota | None = None
    webhook_deliveries_per_minute: _Quota | None = None


class RemoveForm(RequestModel):
    """The name of the tenant again."""

    confirm: Annotated[str, Field(max_length=64)] = ""


@PAGES.add("GET", TENANTS, Permission.TENANTS)
def tenants(visit: Visit) -> Shown:
    """List the tenants, those that were removed and are still kept, too."""
    found, applied = visit.portal.tenants.list(), visit.portal.enforcements.applied_generation()
    kept_out = [one for one in found if one.status is not TenantStatus.ACTIVE]
    pending = {one.id: one.generation for one in kept_out if one.generation > applied}
    values = {"tenants": found, "first": visit.portal.first_tenant, "pending": pending}
    return Shown("all_tenants.html", access_values({**values, **watched(visit, max(pending.values(), default=0))}))


@PAGES.add("GET", f"{TENANTS}/new", Permission.TENANTS)
def new_tenant(_visit: Visit) -> Shown:
    """Show the form for a tenant."""
    return Shown("tenant_new.html", {"once": new_once(), "given": {}, "problems": {}})


@PAGES.add("POST", f"{TENANTS}/new", Permission.TENANTS)
def add_tenant(visit: Visit) -> Shown:
    """Add a tenant, and show its first admin's token this once."""
    try:
        form = visit.form(TenantForm)
        quotas, own_root = Quotas(devices=form.devices), form.own_root is not None
        wanted = NewTenant(form.name, form.topic_prefix, quotas=quotas, own_root=own_root)
        added = visit.portal.tenants.add(visit.actor, wanted, form.once)
    except (InputInvalid, Conflict, Unavailable) as error:
        return form_again(visit, "tenant_new.html", TenantForm, error)
    return secret_shown(
        added.token,
        title="Tenant",
        name=f"first admin of {form.name}",
        back=TENANTS,
        ends=added.token_expires_at,
        problem=added.ca_problem or added.state.problem,
        use="Its first admin logs in with it, and makes tokens for the others.",
    )


@PAGES.add("GET", f"{PATH}/edit", Permission.TENANTS)
def edit_tenant(visit: Visit, tenant: str) -> Shown:
    """Show the form for a tenant's choices and quotas."""
    record = visit.portal.tenants.show(tenant)
    given = {**dataclasses.asdict(record.choices), **dataclasses.asdict(record.quotas)}
    shown = {name: "" if value is None else str(value) for name, value in given.items()}
    return Shown("tenant_edit.html", {"tenant": record, "given": shown, "problems": {}})


@PAGES.add("POST", f"{PATH}/edit", Permission.TENANTS)
def change_tenant(visit: Visit, tenant: str) -> Moved | Shown:
    """Change a tenant's choices and quotas, for what is asked for from then on."""
    record = visit.portal.tenants.show(tenant)
    try:
        wanted = visit.form(EditForm).model_dump()
        before = {**dataclasses.asdict(record.choices), **dataclasses.asdict(record.quotas)}
        changed = {name: value for name, value in wanted.items() if value != before[name]}
        choices = {name: value for name, value in changed.items() if name in _CHOICES}
        quotas = {name: value for name, value in changed.items() if name not in _CHOICES}
        if changed:
            visit.portal.tenants.change(visit.actor, tenant, choices, quotas)
    except (InputInvalid, Conflict) as error:
        return form_again(visit, "tenant_edit.html", EditForm, error, tenant=record)
    return Moved(TENANTS)


@PAGES.add("POST", f"{PATH}/suspend", Permission.TENANTS)
def suspend_tenant(visit: Visit, tenant: str) -> Moved:
    """Serve nobody of a tenant until it is resumed."""
    visit.portal.tenants.suspend(visit.actor, tenant, waits=False)
    return Moved(TENANTS)


@PAGES.add("POST", f"{PATH}/resume", Permission.TENANTS)
def resume_tenant(visit: Visit, tenant: str) -> Moved:
    """Resume a suspended tenant, with all that it had."""
    visit.portal.tenants.resume(visit.actor, tenant)
    return Moved(TENANTS)


@PAGES.add("POST", f"{PATH}/remove", Permission.TENANTS)
def remove_tenant(visit: Visit, tenant: str) -> Moved:
    """Remove a tenant for good, if its name was entered again."""
    visit.portal.tenant_removals.remove(visit.actor, tenant, visit.form(RemoveForm).confirm, waits=False)
    return Moved(TENANTS)
