"""Applications: clients of the broker that are not devices, such as a back end or a dashboard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from core.roles import Permission
from core.states import ClientKind
from core.topics import Access
from pki.csr import read_csr
from store.devices import DeviceFilter
from web.api.devices import (
    BrokerProblem,
    BrokerState,
    CertificateModel,
    ChangesRequest,
    ConnectionModel,
    RegisteredAnswer,
    TopicModel,
    broker_state,
    certificate_model,
    connection_model,
    pairs,
)
from web.api.fields import (
    BundleFormatName,
    BundlePassword,
    Cursor,
    DeviceId,
    KeyTypeName,
    Limit,
    Name,
    Place,
    ReasonName,
    Time,
    WholeNumber,
)
from web.api.lifecycle import RenewedAnswer, RenewRequest, RevokedAnswer, outcome_of, renewal_of, state_of
from web.api.routing import AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp
from workflows.connections import connection_of
from workflows.credentials import DeviceRequest

ROUTES = Routes("Applications")
KIND = ClientKind.APPLICATION

ApplicationStatus = Literal["active", "revoked"]


class ApplicationTopicModel(TopicModel):
    """A topic filter with what the application may do there; a wildcard may stand where devices' ids are."""

    filter: Annotated[str, Field(min_length=1, max_length=256, examples=["devices/+/telemetry"])]


ApplicationTopics = Annotated[list[ApplicationTopicModel], Field(min_length=1, max_length=64)]


class ApplicationRequest(RequestModel):
    """An application to register. With a `csr` it keeps its own key, and no bundle is made."""

    name: Name
    topics: ApplicationTopics
    csr: Annotated[str, Field(max_length=16384, description="PEM, PKCS#10")] | None = None
    key_type: KeyTypeName | None = None
    validity_days: Annotated[int, Field(ge=1, le=36500), WholeNumber] | None = None
    bundle_password: BundlePassword | None = None
    bundle_format: BundleFormatName | None = None


class ApplicationChanges(ChangesRequest):
    """What to change of an application; `topics` replaces all of them."""

    name: Name = ""
    topics: ApplicationTopics = Field(default_factory=list)


class ApplicationQuery(RequestModel):
    """Filters of the list of applications."""

    status: ApplicationStatus | None = None
    q: Place | None = None
    expires_before: Time | None = None
    limit: Limit = 50
    cursor: Cursor | None = None


class RevocationQuery(RequestModel):
    """Why an application is revoked (RFC 5280 section 5.3.1)."""

    reason: ReasonName = "unspecified"


class OfApplication(AnswerModel):
    """An answer about an application."""

    application_id: DeviceId


class ApplicationAnswer(RegisteredAnswer, OfApplication):
    """The new application, with a download link and a bundle password or, for a `csr`, its certificate and chain."""


class ApplicationRenewAnswer(RenewedAnswer, OfApplication):
    """The new certificate of an application; as that of a device."""


class ApplicationRevokeAnswer(RevokedAnswer, OfApplication):
    """`enforced`: the broker was seen to refuse the application; `pending`: it is revoked, and not refused yet."""


class ApplicationSummary(OfApplication):
    """An application in a list."""

    name: str
    status: ApplicationStatus
    created_at: Timestamp
    updated_at: Timestamp
    revoked_at: Timestamp | None
    revocation_reason: str | None
    expires_at: Timestamp | None
    topics: list[ApplicationTopicModel]
    broker_problem: BrokerProblem | None
    connection: ConnectionModel | None


class ApplicationModel(ApplicationSummary):
    """An application with its certificate, and whether the broker applies its newest state.

    `broker` is `closed` if it does, and that is to deny it everything: see `broker_problem`.
    """

    broker: BrokerState
    certificate: CertificateModel | None


class ApplicationPage(AnswerModel):
    """Applications, newest first. Only a null `next_cursor` marks the last page."""

    applications: list[ApplicationSummary]
    next_cursor: str | None


@ROUTES.add(
    "POST",
    "/applications",
    Permission.APPLICATIONS,
    Answers(
        "The application is registered and durably recorded",
        model=ApplicationAnswer,
        status=201,
        headers={"Location": "The application's path"},
    ),
    errors=(409,),
    idempotency_key=True,
)
def register_application(call: Call, body: ApplicationRequest) -> Reply:
    """Register an application: create its key and certificate, or sign its CSR."""
    csr = None if body.csr is None else read_csr(body.csr)
    request = DeviceRequest(**{**dict(body), "csr": csr, "topics": pairs(body.topics)}, kind=KIND)
    registered = call.portal.registrations.register(call.actor, request, call.idempotency_key)
    location = {"Location": f"/applications/{registered.device_id}"}
    return Reply(ApplicationAnswer.of(registered, application_id=registered.device_id), headers=location)


@ROUTES.add("GET", "/applications", Permission.READ)
def list_applications(call: Call, query: ApplicationQuery) -> ApplicationPage:
    """List applications, newest first; with `expires_before`, those that expire soonest first."""
    filters = DeviceFilter(**query.model_dump(exclude={"limit", "cursor"}), kind=KIND)
    page = call.portal.inventory.devices(call.actor.tenant_id, filters, limit=query.limit, cursor=query.cursor)
    summaries = [
        ApplicationSummary.of(
            one.device,
            application_id=one.device.id,
            expires_at=one.not_after,
            topics=_topic_models(page.topics.get(one.device.id, ())),
            broker_problem=page.problems.get(one.device.id),
            connection=connection_model(connection_of(one.presence, page.contacts)),
        )
        for one in page.devices
    ]
    return ApplicationPage(applications=summaries, next_cursor=page.cursor)


def _topic_models(topics: Iterable[tuple[str, str]]) -> list[ApplicationTopicModel]:
    return [ApplicationTopicModel(filter=pattern, access=Access(access).value) for pattern, access in topics]


@ROUTES.add("GET", "/applications/{application_id}", Permission.READ)
def show_application(call: Call, application_id: str) -> ApplicationModel:
    """Show an application with its current certificate, its topics and its broker state."""
    details = call.portal.inventory.device(call.actor.tenant_id, application_id, kind=KIND)
    certificate = details.certificate
    return ApplicationModel.of(
        details.device,
        application_id=application_id,
        expires_at=None if certificate is None else certificate.not_after,
        topics=_topic_models((topic.filter, topic.access) for topic in details.topics),
        **broker_state(details),
        connection=connection_model(details.connection),
        certificate=None if certificate is None else certificate_model(certificate),
    )


@ROUTES.add("PATCH", "/applications/{application_id}", Permission.APPLICATIONS, errors=(409,))
def update_application(call: Call, application_id: str, body: ApplicationChanges) -> ApplicationModel:
    """Change an application's name or topics. What is taken away is refused by the broker before the answer."""
    values = body.model_dump(exclude_unset=True, exclude={"topics"})
    topics = pairs(body.topics) if "topics" in body.model_fields_set else ...
    call.portal.registrations.update(call.actor, application_id, values, topics, kind=KIND)
    return show_application(call, application_id)


@ROUTES.add(
    "POST",
    "/applications/{application_id}/renew",
    Permission.APPLICATIONS,
    Answers("The new certificate is issued and durably recorded", status=201),
    body_optional=True,
    errors=(409,),
    idempotency_key=True,
)
def renew_application(call: Call, application_id: str, body: RenewRequest) -> ApplicationRenewAnswer:
    """Issue a new certificate for an application; the previous one stays valid for a while."""
    renewed = call.portal.renewals.renew(call.actor, application_id, renewal_of(body), call.idempotency_key, kind=KIND)
    return ApplicationRenewAnswer.of(renewed, application_id=application_id, **state_of(renewed))


@ROUTES.add(
    "DELETE",
    "/applications/{application_id}",
    Permission.APPLICATIONS,
    Answers("The application is revoked; a repeat gets the same answer"),
)
def revoke_application(call: Call, application_id: str, query: RevocationQuery) -> ApplicationRevokeAnswer:
    """Revoke an application permanently and disconnect it from the broker."""
    revoked = call.portal.revocations.revoke(call.actor, application_id, query.reason, kind=KIND)
    return ApplicationRevokeAnswer.of(revoked, application_id=application_id, **outcome_of(revoked))
