"""Webhooks: subscribe a receiver to events, see what it was sent, send it again."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.errors import FieldProblem, InputInvalid
from core.roles import Permission
from core.states import EventDeliveryStatus
from store.webhooks import Backlog, EventDeliveryRecord, WebhookRecord
from web.api.fields import AnswerModel, Cursor, Limit, RequestModel, ShortText, Timestamp, WholeNumber
from web.api.routing import Answers, Call, Reply, Route, tagged
from workflows.events import EventType
from workflows.webhooks.subscriptions import NOTHING

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
]
DeliveryStatus = Literal["waiting", "delivered", "dead"]

if set(EventName.__args__) != set(EventType):  # type: ignore[attr-defined]
    raise AssertionError("the interface's types of events must be those of the room below")


class WebhookRequest(RequestModel):
    """A receiver to tell of events; without `events` of all of them, those of later versions too."""

    name: ShortText
    url: Annotated[str, Field(min_length=1, max_length=2048, examples=["https://example.com/portal-events"])]
    events: Annotated[list[EventName], Field(min_length=1, max_length=32)] | None = None


class WebhookModel(AnswerModel):
    """A subscription; `events` is empty where it is to all. `oldest_waiting_at` is null where nothing waits."""

    webhook_id: str
    name: str
    url: str
    events: list[EventName]
    created_at: Timestamp
    waiting: int
    oldest_waiting_at: Timestamp | None
    dead: int


class NewWebhookModel(WebhookModel):
    """A new subscription, with the secret that signs what is sent, shown this once."""

    secret: str


class WebhookList(AnswerModel):
    """Every subscription, oldest first."""

    webhooks: list[WebhookModel]


class WebhookDeliveryQuery(RequestModel):
    """Which deliveries to list."""

    status: DeliveryStatus | None = None
    limit: Limit = 50
    cursor: Cursor | None = None


class WebhookDeliveryModel(AnswerModel):
    """An event on its way to the receiver: `dead` is what was given up, `next_at` when a waiting one is tried again."""

    delivery_id: int
    event_id: str
    type: EventName
    device_id: str | None
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
    """What to send again: the deliveries named, if they have ended, or without them all that were given up."""

    delivery_ids: (
        Annotated[list[Annotated[int, Field(ge=1, lt=2**53), WholeNumber]], Field(min_length=1, max_length=200)] | None
    ) = None


class RedeliverAnswer(AnswerModel):
    """How many deliveries are sent again, each with the id of its event."""

    redelivered: int


class WebhookTestAnswer(AnswerModel):
    """How a test event fared: the status that the receiver answered, or the problem in one sentence."""

    delivered: bool
    status: int | None
    problem: str | None
    milliseconds: int


def list_webhooks(call: Call) -> Reply:
    """List webhooks, oldest first, with what waits for each."""
    found = call.portal.webhooks.all(call.actor.tenant_id)
    return Reply(WebhookList(webhooks=[_webhook(record, backlog) for record, backlog in found]))


def create_webhook(call: Call, body: WebhookRequest) -> Reply:
    """Send events to a receiver from now on."""
    types = [EventType(name) for name in body.events or ()]
    secret, record = call.portal.webhooks.create(call.actor, body.name, body.url, types)
    return Reply(NewWebhookModel.of(_webhook(record, NOTHING), secret=secret), status=201)


def delete_webhook(call: Call, webhook_id: str) -> Reply:
    """Send nothing more to a receiver."""
    return Reply(_webhook(*call.portal.webhooks.delete(call.actor, webhook_id)))


def list_webhook_deliveries(call: Call, webhook_id: str, query: WebhookDeliveryQuery) -> Reply:
    """List what was or is to be sent to a receiver, newest first."""
    if query.cursor is not None and not (query.cursor.isdigit() and len(query.cursor) < 19):
        problem = FieldProblem("cursor", "must be the next_cursor of the page before")
        raise InputInvalid("The cursor is not one that a page gave; begin again without it.", [problem])
    found = call.portal.webhooks.deliveries(
        call.actor.tenant_id,
        webhook_id,
        limit=query.limit + 1,
        before=None if query.cursor is None else int(query.cursor),
        status=query.status,
    )
    page = [_delivery(record) for record in found[: query.limit]]
    more = len(found) > query.limit
    return Reply(WebhookDeliveryPage(deliveries=page, next_cursor=str(page[-1].delivery_id) if more else None))


def redeliver(call: Call, webhook_id: str, body: RedeliverRequest) -> Reply:
    """Send again what was given up, or what is named."""
    count = call.portal.webhooks.redeliver(call.actor, webhook_id, body.delivery_ids)
    return Reply(RedeliverAnswer(redelivered=count))


def try_webhook(call: Call, webhook_id: str) -> Reply:
    """Send a receiver a test event now, once."""
    sent = call.portal.webhooks.test(call.actor, webhook_id)
    return Reply(WebhookTestAnswer.of(sent, milliseconds=round(sent.seconds * 1000)))


def _webhook(record: WebhookRecord, backlog: Backlog) -> WebhookModel:
    return WebhookModel.of(record, backlog, webhook_id=record.id, oldest_waiting_at=backlog.oldest)


def _delivery(record: EventDeliveryRecord) -> WebhookDeliveryModel:
    next_at = record.next_at if record.status is EventDeliveryStatus.WAITING else None
    return WebhookDeliveryModel.of(record, delivery_id=record.id, next_at=next_at)


ROUTES = tagged(
    "Webhooks",
    Route("GET", "/webhooks", list_webhooks, Permission.WEBHOOKS, Answers(WebhookList)),
    Route(
        "POST",
        "/webhooks",
        create_webhook,
        Permission.WEBHOOKS,
        Answers(NewWebhookModel, status=201, description="The webhook, with its secret, shown this once"),
        errors=(409,),
    ),
    Route(
        "DELETE",
        "/webhooks/{webhook_id}",
        delete_webhook,
        Permission.WEBHOOKS,
        Answers(WebhookModel, description="The webhook that is gone, with all that was on its way to it"),
        errors=(404,),
    ),
    Route(
        "GET",
        "/webhooks/{webhook_id}/deliveries",
        list_webhook_deliveries,
        Permission.WEBHOOKS,
        Answers(WebhookDeliveryPage),
        errors=(404,),
    ),
    Route(
        "POST",
        "/webhooks/{webhook_id}/redeliver",
        redeliver,
        Permission.WEBHOOKS,
        Answers(RedeliverAnswer),
        body_optional=True,
        errors=(404,),
    ),
    Route(
        "POST",
        "/webhooks/{webhook_id}/test",
        try_webhook,
        Permission.WEBHOOKS,
        Answers(WebhookTestAnswer, description="How it ended; an event of the type test was sent, or was to be"),
        errors=(404, 503),
    ),
)
