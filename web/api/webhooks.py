"""Webhooks: subscribe a receiver to events, list what was sent to it, send it again."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from core.roles import Permission
from core.states import EventDeliveryStatus
from store.webhooks import Backlog, EventDeliveryRecord, WebhookRecord
from web.api.fields import Limit, NumericCursor, ShortText, WholeNumber
from web.api.routing import AnswerModel, Answers, Call, RequestModel, Routes, Timestamp
from workflows.events import EventType, is_of_application
from workflows.webhooks.subscriptions import NOTHING

ROUTES = Routes("Webhooks")

EventName = Literal[
    "registered",
    "enrolled",
    "renewed",
    "expiring",
    "suspended",
    "resumed",
    "revoked",
    "delivered",
    "broker_pending",
    "broker_enforced",
    "broker_restart",
    "attestation_failed",
    "group_changed",
    "link_reused",
    "application_registered",
    "application_renewed",
    "application_expiring",
    "application_revoked",
    "application_delivered",
    "application_link_reused",
    "application_broker_pending",
    "application_broker_enforced",
]
DeliveryStatus = Literal["waiting", "delivered", "dead"]

if set(get_args(EventName)) != set(EventType):
    raise AssertionError("EventName must name the values of workflows.events.EventType")


class WebhookRequest(RequestModel):
    """A receiver of events; without `events`, of all types, including those of later versions."""

    name: ShortText
    url: Annotated[
        str,
        Field(
            min_length=1,
            max_length=2048,
            examples=["https://example.com/portal-events"],
            json_schema_extra={"pattern": r"^[Hh][Tt][Tt][Pp][Ss]?://[!-\[\]-~]+$"},  # ASCII, as it is sent
        ),
    ]
    events: Annotated[list[EventName], Field(min_length=1, max_length=32)] | None = None


class WebhookModel(AnswerModel):
    """A subscription. `events` is empty if it is to all types; `oldest_waiting_at` is null if no delivery waits."""

    webhook_id: str
    name: str
    url: str
    events: list[EventName]
    created_at: Timestamp
    waiting: int
    oldest_waiting_at: Timestamp | None
    dead: int


class NewWebhookModel(WebhookModel):
    """A new subscription with the secret that signs deliveries, which is shown only once."""

    secret: str


class WebhookList(AnswerModel):
    """Every subscription, oldest first."""

    webhooks: list[WebhookModel]


class WebhookDeliveryQuery(RequestModel):
    """Filters of the list of deliveries."""

    status: DeliveryStatus | None = None
    limit: Limit = 50
    cursor: NumericCursor | None = None


class WebhookDeliveryModel(AnswerModel):
    """The delivery of an event. `dead`: it was given up; `next_at`: when a waiting one is tried again.

    Of `device_id` and `application_id`, the one of the event's type is set.
    """

    delivery_id: int
    event_id: str
    type: EventName
    device_id: str | None
    application_id: str | None
    created_at: Timestamp
    status: DeliveryStatus
    attempts: int
    next_at: Timestamp | None
    last_problem: str | None
    ended_at: Timestamp | None


class WebhookDeliveryPage(AnswerModel):
    """Deliveries, newest first; `next_cursor` is null on the last page."""

    deliveries: list[WebhookDeliveryModel]
    next_cursor: str | None


class RedeliverRequest(RequestModel):
    """The deliveries to send again, if they have ended; without `delivery_ids`, all that were given up."""

    delivery_ids: (
        Annotated[list[Annotated[int, Field(ge=1, lt=2**53), WholeNumber]], Field(min_length=1, max_length=200)] | None
    ) = None


class RedeliverAnswer(AnswerModel):
    """How many deliveries are sent again, each with the id of its event."""

    redelivered: int


class WebhookTestAnswer(AnswerModel):
    """The result of a test event: the status that the receiver answered, or the problem in one sentence."""

    delivered: bool
    status: int | None
    problem: str | None
    milliseconds: int


@ROUTES.add("GET", "/webhooks", Permission.WEBHOOKS)
def list_webhooks(call: Call) -> WebhookList:
    """List webhooks, oldest first, with the number of deliveries that wait."""
    found = call.portal.webhooks.all(call.actor.tenant_id)
    return WebhookList(webhooks=[_webhook(record, backlog) for record, backlog in found])


@ROUTES.add(
    "POST",
    "/webhooks",
    Permission.WEBHOOKS,
    Answers("The webhook with its secret, which is shown only once", status=201),
    errors=(409,),
    idempotency_key=True,
)
def create_webhook(call: Call, body: WebhookRequest) -> NewWebhookModel:
    """Subscribe a receiver to events."""
    types = [EventType(name) for name in body.events or ()]
    secret, record = call.portal.webhooks.create(call.actor, body.name, body.url, types, call.idempotency_key)
    return NewWebhookModel.of(_webhook(record, NOTHING), secret=secret)


@ROUTES.add("DELETE", "/webhooks/{webhook_id}", Permission.WEBHOOKS, Answers("The webhook that was deleted"))
def delete_webhook(call: Call, webhook_id: str) -> WebhookModel:
    """Delete a webhook; deliveries that wait are discarded."""
    return _webhook(*call.portal.webhooks.delete(call.actor, webhook_id))


@ROUTES.add("GET", "/webhooks/{webhook_id}/deliveries", Permission.WEBHOOKS)
def list_webhook_deliveries(call: Call, webhook_id: str, query: WebhookDeliveryQuery) -> WebhookDeliveryPage:
    """List the deliveries of a webhook, newest first."""
    found = call.portal.webhooks.deliveries(
        call.actor.tenant_id,
        webhook_id,
        limit=query.limit + 1,
        before=None if query.cursor is None else int(query.cursor),
        status=query.status,
    )
    page = [_delivery(record) for record in found[: query.limit]]
    more = len(found) > query.limit
    return WebhookDeliveryPage(deliveries=page, next_cursor=str(page[-1].delivery_id) if more else None)


@ROUTES.add("POST", "/webhooks/{webhook_id}/redeliver", Permission.WEBHOOKS, body_optional=True)
def redeliver(call: Call, webhook_id: str, body: RedeliverRequest) -> RedeliverAnswer:
    """Send deliveries again: those that are named, or all that were given up."""
    count = call.portal.webhooks.redeliver(call.actor, webhook_id, body.delivery_ids)
    return RedeliverAnswer(redelivered=count)


@ROUTES.add(
    "POST", "/webhooks/{webhook_id}/test", Permission.WEBHOOKS, Answers("The result; the event has the type `test`")
)
def try_webhook(call: Call, webhook_id: str) -> WebhookTestAnswer:
    """Send one test event now."""
    sent = call.portal.webhooks.test(call.actor, webhook_id)
    return WebhookTestAnswer.of(sent, milliseconds=round(sent.seconds * 1000))


def _webhook(record: WebhookRecord, backlog: Backlog) -> WebhookModel:
    return WebhookModel.of(record, backlog, webhook_id=record.id, oldest_waiting_at=backlog.oldest)


def _delivery(record: EventDeliveryRecord) -> WebhookDeliveryModel:
    next_at = record.next_at if record.status is EventDeliveryStatus.WAITING else None
    of_application = is_of_application(record.type)
    return WebhookDeliveryModel.of(
        record,
        delivery_id=record.id,
        next_at=next_at,
        device_id=None if of_application else record.device_id,
        application_id=record.device_id if of_application else None,
    )
