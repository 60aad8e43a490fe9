"""The shapes of requests about webhooks with those of their answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from web.api.fields import Cursor, Input, Limit, Output, ShortText, Timestamp, WholeNumber
from workflows.events import EventType

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


class WebhookRequest(Input):
    """A receiver to tell of events; without `events` of all of them, those of later versions too."""

    name: ShortText
    url: Annotated[str, Field(min_length=1, max_length=2048, examples=["https://example.com/portal-events"])]
    events: Annotated[list[EventName], Field(min_length=1, max_length=32)] | None = None


class WebhookModel(Output):
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


class WebhookList(Output):
    """Every subscription, oldest first."""

    webhooks: list[WebhookModel]


class WebhookDeliveryQuery(Input):
    """Which deliveries to list."""

    status: DeliveryStatus | None = None
    limit: Limit = 50
    cursor: Cursor | None = None


class WebhookDeliveryModel(Output):
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


class WebhookDeliveryPage(Output):
    """Deliveries, newest first; `next_cursor` is null on the last page."""

    deliveries: list[WebhookDeliveryModel]
    next_cursor: str | None


class RedeliverRequest(Input):
    """What to send again: the deliveries named, if they have ended, or without them all that were given up."""

    delivery_ids: (
        Annotated[list[Annotated[int, Field(ge=1, lt=2**53), WholeNumber]], Field(min_length=1, max_length=200)] | None
    ) = None


class RedeliverAnswer(Output):
    """How many deliveries are sent again, each with the id of its event."""

    redelivered: int


class WebhookTestAnswer(Output):
    """How a test event fared: the status that the receiver answered, or the problem in one sentence."""

    delivered: bool
    status: int | None
    problem: str | None
    milliseconds: int
