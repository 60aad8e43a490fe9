"""The commands about webhooks, which send events to other systems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from commands.completing import Listed
from commands.context import (
    YES,
    Number,
    Remote,
    command,
    confirm,
    create_with_secret,
    group,
    paging_options,
    short_id,
)
from commands.errors import CliError
from commands.output import Cell, date_of, status_of, text, time_of

EVENTS = (
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
)


WEBHOOK_ID = short_id("portal webhook list", Listed("/webhooks", "webhooks", "webhook_id", "name"))


@group("webhook")
def webhook() -> None:
    """Webhooks: send events to other systems."""


@command("list", webhook, examples=["portal webhook list"])
def webhook_list(portal: Remote) -> None:
    """List webhooks, oldest first.

    When piped, prints tab-separated lines: id, name, events, waiting, waiting since, dead, URL. Dead events are those
    whose delivery was given up.
    """
    answer = portal.client.get("/webhooks")
    portal.out.table(
        answer,
        "webhooks",
        {
            "id": "webhook_id",
            "name": "name",
            "events": _events,
            "waiting": "waiting",
            "since": date_of("oldest_waiting_at"),
            "dead": _dead,
            "url": "url",
        },
        empty="No webhooks yet.",
        spare=("since", "url"),
    )


def _events(row: Mapping[str, Any]) -> Cell:
    return text(" ".join(map(str, row.get("events") or ("all",))))


def _dead(row: Mapping[str, Any]) -> Cell:
    dead = row.get("dead")
    return Cell(str(dead), style="red") if dead else text(dead)


@command(
    "add",
    webhook,
    examples=[
        "portal webhook add inventory --target https://example.com/portal-events",
        "portal webhook add alarm --target https://… --event revoked --secret-out alarm.secret",
    ],
)
@click.argument("name", help="Name of the webhook.")
@click.option("--target", "url_", metavar="URL", required=True, help="URL that events are posted to.")
@click.option(
    "--event",
    "events",
    type=click.Choice(EVENTS),
    multiple=True,
    help="Event to send. Repeatable.  [default: all]",
)
@click.option("--secret-out", metavar="FILE", help="Write the signing secret to FILE (new, 0600).")
def webhook_create(portal: Remote, name: str, url_: str, events: tuple[str, ...], secret_out: str | None) -> None:
    """Create a webhook; its signing secret is shown once."""
    body = {"name": name, "url": url_} | ({"events": list(events)} if events else {})
    answer = create_with_secret(
        portal,
        "/webhooks",
        body,
        shown_once="secret",
        save_in=secret_out,
        done=f"Created the webhook {name}",
        fields=lambda made: {
            "webhook_id": text(made["webhook_id"]),
            "url": text(made.get("url")),
            "events": _events(made),
        },
        needs=("webhook_id",),
    )
    portal.out.next_step(f"portal webhook test {answer['webhook_id']}")


@command("remove", webhook, examples=["portal webhook remove 1e66977361d81fe2"])
@click.argument("webhook_id", metavar="ID", type=WEBHOOK_ID, help="The full webhook id.")
@YES
def webhook_remove(portal: Remote, webhook_id: str, yes: bool) -> None:
    """Remove a webhook and its waiting events."""
    confirm(f"Remove the webhook {webhook_id} and its waiting events?", yes=yes)
    answer = portal.client.call("DELETE", f"/webhooks/{webhook_id}").json()
    portal.out.result(answer, done=f"Removed the webhook {answer.get('name') or webhook_id}")
    if answer.get("waiting") or answer.get("dead"):
        portal.out.note(f"{answer.get('waiting', 0)} waiting and {answer.get('dead', 0)} dead events were deleted.")


@command("deliveries", webhook, examples=["portal webhook deliveries 1e66977361d81fe2 --status dead"])
@click.argument("webhook_id", metavar="ID", type=WEBHOOK_ID, help="The full webhook id.")
@click.option("--status", type=click.Choice(("waiting", "delivered", "dead")), help="Only events with this status.")
@paging_options
def webhook_deliveries(
    portal: Remote, webhook_id: str, status: str | None, limit: int, all_: bool, cursor: str | None
) -> None:
    """List the events of a webhook, newest first.

    When piped, prints tab-separated lines: id, time, event, device, status, attempts, next attempt, problem.
    """
    portal.out.table(
        portal.client.read_pages(
            f"/webhooks/{webhook_id}/deliveries",
            "deliveries",
            limit=None if all_ else limit,
            cursor=cursor,
            status=status,
        ),
        "deliveries",
        {
            "id": "delivery_id",
            "time": time_of("created_at"),
            "event": "type",
            "device": lambda row: text(row.get("device_id") or row.get("application_id")),
            "status": status_of,
            "attempts": "attempts",
            "next": time_of("next_at"),
            "problem": "last_problem",
        },
        empty="No matching events." if status else "No events for this webhook yet.",
        spare=("attempts", "next"),
        whole=("time", "event", "device", "status"),
    )


@command(
    "redeliver",
    webhook,
    examples=["portal webhook redeliver 1e66977361d81fe2", "portal webhook redeliver 1e66977361d81fe2 17 18"],
)
@click.argument("webhook_id", metavar="ID", type=WEBHOOK_ID, help="The full webhook id.")
@click.argument("delivery", type=Number(1), nargs=-1, help="Ids of events.  [default: all dead events]")
def webhook_redeliver(portal: Remote, webhook_id: str, delivery: tuple[int, ...]) -> None:
    """Send dead events, or the given ones, again."""
    body = {"delivery_ids": list(delivery)} if delivery else {}
    answer = portal.client.call("POST", f"/webhooks/{webhook_id}/redeliver", body=body).json()
    count = answer.get("redelivered") or 0
    portal.out.result(answer, done=f"Queued {count} event{'s' * (count != 1)} to be sent again" if count else "")
    if not count:
        portal.out.note("No events to send again.")


@command("test", webhook, examples=["portal webhook test 1e66977361d81fe2"])
@click.argument("webhook_id", metavar="ID", type=WEBHOOK_ID, help="The full webhook id.")
def webhook_test(portal: Remote, webhook_id: str) -> None:
    """Send a test event now and show the result."""
    with portal.out.working("Sending…"):
        answer = portal.client.call("POST", f"/webhooks/{webhook_id}/test").json()
    if portal.out.as_json:
        portal.out.json(answer)
    if not answer.get("delivered"):
        raise CliError(str(answer.get("problem") or "The receiver did not accept the event."))
    portal.out.done(f"The receiver accepted the event ({answer.get('status')}, {answer.get('milliseconds')} ms)")
