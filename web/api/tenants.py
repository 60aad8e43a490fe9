"""Tenants: several fleets in one installation, each with operators, devices, topics, a CA and an audit record."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from core.roles import Permission
from core.tenants import Quotas, TenantChoices
from store.tenants import TenantRecord
from web.api.devices import ChangesRequest
from web.api.fields import BundleFormatName, KeyTypeName, RoleName, TenantName, TopicPrefix, WholeNumber
from web.api.routing import NDJSON, AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp, in_parts
from workflows.tenant_life import NewTenant, TenantState

ROUTES = Routes("Tenants")
_Quota = Annotated[int, Field(ge=1, le=1_000_000_000), WholeNumber]
StatusName = Literal["active", "suspended", "removed"]


class ChoicesRequest(RequestModel):
    """What holds for a tenant in place of the installation's settings, which hold for what is null or left out.

    `device_days` is the life of a certificate, `link_hours` that of a download link; `bundle_format` is that of a
    bundle for which none was asked.
    """

    device_days: Annotated[int, Field(ge=1, le=36500), WholeNumber] | None = None
    key_type: KeyTypeName | None = None
    bundle_format: BundleFormatName | None = None
    link_hours: Annotated[int, Field(ge=1, le=8760), WholeNumber] | None = None


class QuotasRequest(RequestModel):
    """How much a tenant may take of what all share; null or left out for no limit.

    `devices` counts those that are not revoked, `bulk_uploads` those at one time.
    """

    devices: _Quota | None = None
    registrations_per_minute: _Quota | None = None
    bulk_uploads: _Quota | None = None
    webhook_deliveries_per_minute: _Quota | None = None


class TenantRequest(RequestModel):
    """A tenant to add; its topics begin with its name unless `topic_prefix` says what else.

    Its issuing CA is below the root of the installation, or with `own_root` below a root of its own.
    """

    name: TenantName
    topic_prefix: TopicPrefix | None = None
    choices: ChoicesRequest = Field(default_factory=ChoicesRequest)
    quotas: QuotasRequest = Field(default_factory=QuotasRequest)
    own_root: bool = False


class TenantPatch(ChangesRequest):
    """Choices and quotas to change; those that are left out stay, null takes one back."""

    choices: ChoicesRequest = Field(default_factory=ChoicesRequest)
    quotas: QuotasRequest = Field(default_factory=QuotasRequest)


class ChoicesModel(AnswerModel):
    """What a tenant has chosen; null for what the installation's settings say."""

    device_days: int | None
    key_type: KeyTypeName | None
    bundle_format: BundleFormatName | None
    link_hours: int | None


class QuotasModel(AnswerModel):
    """How much a tenant may take; null for no limit."""

    devices: int | None
    registrations_per_minute: int | None
    bulk_uploads: int | None
    webhook_deliveries_per_minute: int | None


class TenantModel(AnswerModel):
    """A tenant; `est_label` is in the path of its devices' enrolment, `changed_at` when its status last changed."""

    name: TenantName
    status: StatusName
    topic_prefix: str
    est_label: str
    choices: ChoicesModel
    quotas: QuotasModel
    created_at: Timestamp
    changed_at: Timestamp | None


class TenantStateModel(TenantModel):
    """`enforced`: the broker was seen to apply the change; `pending`: it is recorded, and not applied yet."""

    broker: Literal["enforced", "pending"]
    broker_problem: str | None


class NewTenantModel(TenantStateModel):
    """A new tenant with its first admin's token, which is shown only once; `ca_problem` says why it has no CA yet."""

    token: str
    token_expires_at: Timestamp
    ca_problem: str | None


class RemovedTenantModel(TenantStateModel):
    """A tenant that was removed: the devices that are still to be revoked, and when all its rows are deleted."""

    devices_left: int
    deleted_after: Timestamp


class RemoveTenantQuery(RequestModel):
    """`confirm` repeats the name of the tenant."""

    confirm: Annotated[str, Field(max_length=64)]


class TenantList(AnswerModel):
    """Every tenant, in the order of their names."""

    tenants: list[TenantModel]


class WhoAmI(AnswerModel):
    """The operator whose token was sent, and its tenant."""

    tenant: str
    role: RoleName
    operator: str


@ROUTES.add("GET", "/whoami", Permission.READ)
def who_am_i(call: Call) -> WhoAmI:
    """Show whose token was sent."""
    return WhoAmI(tenant=call.actor.tenant_id, role=call.actor.role, operator=call.actor.name)


@ROUTES.add("GET", "/tenants", Permission.TENANTS)
def list_tenants(call: Call) -> TenantList:
    """List tenants, those that were removed and are still kept, too."""
    return TenantList(tenants=[_model(record) for record in call.portal.tenants.list()])


@ROUTES.add(
    "POST",
    "/tenants",
    Permission.TENANTS,
    Answers(
        "The tenant, with its first admin's token, which is shown only once",
        model=NewTenantModel,
        status=201,
        headers={"Location": "The tenant's path"},
    ),
    errors=(409,),
    idempotency_key=True,
)
def add_tenant(call: Call, body: TenantRequest) -> Reply:
    """Add a tenant with a CA, topics and operators of its own; the broker needs the guard."""
    wanted = NewTenant(
        body.name,
        body.topic_prefix,
        TenantChoices(**body.choices.model_dump()),
        Quotas(**body.quotas.model_dump()),
        body.own_root,
    )
    added = call.portal.tenants.add(call.actor, wanted, call.idempotency_key)
    model = NewTenantModel(
        **_values(added.state.record),
        **_outcome(added.state),
        token=added.token,
        token_expires_at=added.token_expires_at,
        ca_problem=added.ca_problem,
    )
    return Reply(model, headers={"Location": f"/tenants/{body.name}"})


@ROUTES.add("GET", "/tenants/{tenant}", Permission.TENANTS)
def show_tenant(call: Call, tenant: str) -> TenantModel:
    """Show a tenant."""
    return _model(call.portal.tenants.show(tenant))


@ROUTES.add("PATCH", "/tenants/{tenant}", Permission.TENANTS, errors=(409,))
def update_tenant(call: Call, tenant: str, body: TenantPatch) -> TenantModel:
    """Change a tenant's choices and quotas, for what is asked for from then on."""
    choices, quotas = (part.model_dump(exclude_unset=True) for part in (body.choices, body.quotas))
    return _model(call.portal.tenants.change(call.actor, tenant, choices, quotas))


@ROUTES.add(
    "POST",
    "/tenants/{tenant}/suspend",
    Permission.TENANTS,
    Answers("The tenant is suspended; a repeat gets the same answer"),
    errors=(409,),
)
def suspend_tenant(call: Call, tenant: str) -> TenantStateModel:
    """Serve nobody of a tenant, and have the broker refuse its devices, until it is resumed."""
    return _state(call.portal.tenants.suspend(call.actor, tenant))


@ROUTES.add(
    "POST",
    "/tenants/{tenant}/resume",
    Permission.TENANTS,
    Answers("The tenant is active again; a repeat gets the same answer"),
    errors=(409,),
)
def resume_tenant(call: Call, tenant: str) -> TenantStateModel:
    """Resume a suspended tenant, with all that it had."""
    return _state(call.portal.tenants.resume(call.actor, tenant))


@ROUTES.add(
    "DELETE",
    "/tenants/{tenant}",
    Permission.TENANTS,
    Answers("The tenant is removed, and the broker refuses its devices; a repeat goes on to revoke them"),
    errors=(409,),
)
def remove_tenant(call: Call, tenant: str, query: RemoveTenantQuery) -> RemovedTenantModel:
    """Remove a tenant for good: revoke all that it has, and after a time of grace delete its rows."""
    removed = call.portal.tenant_removals.remove(call.actor, tenant, query.confirm)
    return RemovedTenantModel(
        **_values(removed.state.record),
        **_outcome(removed.state),
        devices_left=removed.devices_left,
        deleted_after=removed.deleted_after,
    )


@ROUTES.add(
    "GET",
    "/tenants/{tenant}/export",
    Permission.TENANTS,
    Answers(
        "A line for the tenant, for each device, certificate and entry of its audit record, and for its checkpoint",
        media_type=NDJSON,
    ),
    errors=(409,),
)
def export_tenant(call: Call, tenant: str) -> Reply:
    """Export what is known of a tenant that was removed, without keys and bundles."""
    lines = call.portal.tenant_removals.export(call.actor, tenant)
    return Reply(content=in_parts(call.portal, call.actor.tenant_id, lines), media_type=NDJSON)


def _values(record: TenantRecord) -> dict[str, Any]:
    return {
        "name": record.id,
        "status": record.status,
        "topic_prefix": record.topic_prefix,
        "est_label": record.id,
        "choices": ChoicesModel.of(record.choices),
        "quotas": QuotasModel.of(record.quotas),
        "created_at": record.created_at,
        "changed_at": record.changed_at,
    }


def _model(record: TenantRecord) -> TenantModel:
    return TenantModel(**_values(record))


def _outcome(state: TenantState) -> dict[str, Any]:
    return {"broker": "enforced" if state.enforced else "pending", "broker_problem": state.problem}


def _state(state: TenantState) -> TenantStateModel:
    return TenantStateModel(**_values(state.record), **_outcome(state))
