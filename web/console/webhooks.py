"""Webhooks in the console: receivers of events, what was sent to them, and what is sent again."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from pydantic import Field

from core.errors import Conflict, InputInvalid, NotFound, Unavailable
from core.roles import Permission
from store.webhooks import Backlog, WebhookRecord
from web.api.fields import NumericCursor, ShortText
from web.api.problems import status_of
from web.api.routing import RequestModel
from web.api.webhooks import DeliveryStatus, EventName
from web.console.access import form_again, secret_shown
from web.console.pages import Moved, Pages, Shown, Visit
from web.console.record import RECORD, TABS
from web.console.registration import Once, new_once
from workflows.events import EventType, is_of_application

PAGES = Pages()
WEBHOOKS = f"{RECORD}/webhooks"
PATH = f"{WEBHOOKS}/{{webhook_id}}"
PER_PAGE = 50


class WebhookForm(RequestModel):
    """A receiver; without ``events`` it gets all. A form that is sent twice makes one, by ``once``."""

    once: Once
    name: ShortText
    url: Annotated[str, Field(max_length=2048)]
    events: list[EventName] = Field(default_factory=list)


class DeliveriesQuery(RequestModel):
    """Which deliveries, from where on."""

    status: DeliveryStatus | None = None
    cursor: NumericCursor | None = None


class RedeliverForm(RequestModel):
    """The delivery to send again; without it all that were given up."""

    delivery: NumericCursor | None = None


def path_of(webhook_id: str) -> str:
    """Return the path of a webhook's page."""
    return f"{WEBHOOKS}/{webhook_id}"


@PAGES.add("GET", WEBHOOKS, Permission.WEBHOOKS)
def webhooks(visit: Visit) -> Shown:
    """List the webhooks, oldest first."""
    return Shown("webhooks.html", {"tabs": TABS, "webhooks": visit.portal.webhooks.all(visit.actor.tenant_id)})


@PAGES.add("GET", f"{WEBHOOKS}/new", Permission.WEBHOOKS)
def new_webhook(_visit: Visit) -> Shown:
    """Show the form for a webhook."""
    values = {"once": new_once(), "given": {}, "problems": {}, "chosen": (), "events": list(EventType)}
    return Shown("webhook_new.html", values)


@PAGES.add("POST", f"{WEBHOOKS}/new", Permission.WEBHOOKS)
def create_webhook(visit: Visit) -> Shown:
    """Subscribe a receiver, and show the secret that signs this once."""
    try:
        form = visit.form(WebhookForm, many=("events",))
        types = [EventType(name) for name in form.events]
        secret, record = visit.portal.webhooks.create(visit.actor, form.name, form.url, types, form.once)
    except (InputInvalid, Conflict) as error:
        chosen = visit.request.form.getlist("events")
        return form_again(visit, "webhook_new.html", WebhookForm, error, chosen=chosen, events=list(EventType))
    return secret_shown(
        secret,
        title="Webhook",
        name=record.name,
        back=path_of(record.id),
        use="The receiver verifies the signature of each request with it, as docs/webhooks.md says.",
    )


@PAGES.add("GET", PATH, Permission.WEBHOOKS)
def webhook(visit: Visit, webhook_id: str) -> Shown:
    """Show a webhook with its deliveries, newest first."""
    return _page(visit, webhook_id, visit.query(DeliveriesQuery))


def _page(
    visit: Visit, webhook_id: str, query: DeliveriesQuery, *, notice: tuple[str, str] | None = None, status: int = 200
) -> Shown:
    record, backlog = _one(visit, webhook_id)
    found = visit.portal.webhooks.deliveries(
        visit.actor.tenant_id,
        webhook_id,
        limit=PER_PAGE + 1,
        before=None if query.cursor is None else int(query.cursor),
        status=query.status,
    )
    page = found[:PER_PAGE]
    of = {} if query.status is None else {"status": query.status}
    more = urlencode({**of, "cursor": page[-1].id}) if len(found) > PER_PAGE else None
    values = {
        "webhook": record,
        "backlog": backlog,
        "deliveries": page,
        "of_application": is_of_application,
        "query": query,
        "next": None if more is None else f"{path_of(webhook_id)}?{more}",
        "first": f"{path_of(webhook_id)}?{urlencode(of)}" if query.cursor else None,
        "notice": notice,
    }
    return Shown("webhook.html", values, status=status, fragment="webhook_deliveries.html")


@PAGES.add("POST", f"{PATH}/redeliver", Permission.WEBHOOKS)
def redeliver(visit: Visit, webhook_id: str) -> Moved:
    """Send one delivery again, or all that were given up; one that waits is not sent twice."""
    form = visit.form(RedeliverForm)
    visit.portal.webhooks.redeliver(visit.actor, webhook_id, None if form.delivery is None else [int(form.delivery)])
    return Moved(path_of(webhook_id))


@PAGES.add("POST", f"{PATH}/test", Permission.WEBHOOKS)
def try_webhook(visit: Visit, webhook_id: str) -> Shown:
    """Send one test event now, and show what came of it."""
    try:
        sent = visit.portal.webhooks.test(visit.actor, webhook_id)
    except Unavailable as error:
        return _page(visit, webhook_id, DeliveriesQuery(), notice=("warn", error.detail), status=status_of(error))
    milliseconds = round(sent.seconds * 1000)
    notice = ("good", f"The receiver answered {sent.status} after {milliseconds} ms.")
    return _page(visit, webhook_id, DeliveriesQuery(), notice=notice if sent.problem is None else ("bad", sent.problem))


@PAGES.add("POST", f"{PATH}/delete", Permission.WEBHOOKS)
def delete_webhook(visit: Visit, webhook_id: str) -> Moved:
    """Delete a webhook; deliveries that wait are discarded. One that is gone already is what was wanted."""
    visit.portal.webhooks.delete(visit.actor, webhook_id)
    return Moved(WEBHOOKS)


def _one(visit: Visit, webhook_id: str) -> tuple[WebhookRecord, Backlog]:
    found = [one for one in visit.portal.webhooks.all(visit.actor.tenant_id) if one[0].id == webhook_id]
    if not found:
        raise NotFound("No webhook has this id.")
    return found[0]
