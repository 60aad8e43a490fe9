"""The commands about webhooks: who is told of events, what was sent, what is sent again."""

from __future__ import annotations

import re
from typing import Any

import click

from commands.context import Command, Portal, confirm, make_with_secret, new_secret_file
from commands.devices import read_pages
from commands.errors import CliError
from commands.output import Cell, moment, state, text

DEFAULT_LIMIT = 50
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
)


class WebhookId(click.ParamType[str]):
    """A webhook's id, in full."""

    name = "id"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the id."""
        text = value.strip().lower()
        if re.fullmatch("[0-9a-f]{16}", text) is None:
            self.fail("an id is given in full, as portal webhook list shows it.", param, ctx)
        return text


WEBHOOK_ID = WebhookId()


@click.group("webhook")
def webhook() -> None:
    """Webhooks: who is told of events."""


@webhook.command("list", cls=Command, examples=["portal webhook list"])
@click.pass_obj
def webhook_list(portal: Portal) -> None:
    """List webhooks, oldest first.

    Piped, each is a line: id, name, events, how many wait, since when, how many were given up, URL.
    """
    answer = portal.client.get("/webhooks")
    if portal.out.as_json:
        portal.out.json(answer)
        return
    rows = [row for row in answer.get("webhooks") or () if isinstance(row, dict)]
    portal.out.table(
        ("id", "name", "events", "waiting", "since", "dead", "url"),
        [
            (
                text(row.get("webhook_id")),
                text(row.get("name")),
                _events(row),
                text(row.get("waiting")),
                moment(row.get("oldest_waiting_at"), short=True),
                _dead(row),
                text(row.get("url")),
            )
            for row in rows
        ],
        empty="There is no webhook yet.",
        spare=("since", "url"),
    )


def _events(row: dict[str, Any]) -> Cell:
    return text(" ".join(map(str, row.get("events") or ("all",))))


def _dead(row: dict[str, Any]) -> Cell:
    dead = row.get("dead")
    return Cell(str(dead), style="red") if dead else text(dead)


@webhook.command(
    "create",
    cls=Command,
    examples=[
        "portal webhook create inventory --target https://example.com/portal-events",
        "portal webhook create alarm --target https://… --event revoked --secret-out alarm.secret",
    ],
)
@click.argument("name", help="What it is for, as the record will show it.")
@click.option("--target", metavar="URL", required=True, help="Where events are posted to.")
@click.option(
    "--event", "events", type=click.Choice(EVENTS), multiple=True, help="What to tell of; all if not given. Repeatable."
)
@click.option("--secret-out", metavar="FILE", help="New file (0600) for the secret that signs what is sent.")
@click.pass_obj
def webhook_create(portal: Portal, name: str, target: str, events: tuple[str, ...], secret_out: str | None) -> None:
    """Send events to a receiver; its secret is shown once."""
    path = new_secret_file(secret_out, "--secret-out", "secret", out=portal.out)
    body = {"name": name, "url": target} | ({"events": list(events)} if events else {})
    answer = make_with_secret(portal, "/webhooks", body, shown_once="secret", into=path, needs=("webhook_id",))
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.done(f"Made the webhook {name}")
    fields = {"webhook_id": text(answer["webhook_id"]), "url": text(answer.get("url")), "events": _events(answer)}
    if path is None:
        fields["secret"] = Cell(str(answer["secret"]), style="bold")
    portal.out.fields(fields)
    portal.out.note(f"The secret is in {path}." if path else "The secret is shown this once.")
    portal.out.next_step(f"portal webhook test {answer['webhook_id']}")


@webhook.command("delete", cls=Command, examples=["portal webhook delete 1e66977361d81fe2"])
@click.argument("webhook_id", metavar="ID", type=WEBHOOK_ID, help="The webhook's id.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def webhook_delete(portal: Portal, webhook_id: str, yes: bool) -> None:
    """Send nothing more; what waits is dropped."""
    confirm(f"Delete the webhook {webhook_id}? What waits to be sent to it is dropped.", yes=yes)
    answer = portal.client.call("DELETE", f"/webhooks/{webhook_id}").json()
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.done(f"Deleted the webhook {answer.get('name') or webhook_id}")
    if answer.get("waiting") or answer.get("dead"):
        portal.out.note(f"{answer.get('waiting', 0)} waiting and {answer.get('dead', 0)} dead events went with it.")


@webhook.command(
    "deliveries",
    cls=Command,
    examples=["portal webhook deliveries 1e66977361d81fe2 --status dead"],
)
@click.argument("webhook_id", metavar="ID", type=WEBHOOK_ID, help="The webhook's id.")
@click.option("--status", type=click.Choice(("waiting", "delivered", "dead")), help="Only these.")
@click.option("--limit", type=click.IntRange(1), default=DEFAULT_LIMIT, show_default=True, help="How many at the most.")
@click.option("--all", "all_", is_flag=True, help="All of them, however many.")
@click.pass_obj
def webhook_deliveries(portal: Portal, webhook_id: str, status: str | None, limit: int, all_: bool) -> None:
    """List what was or is to be sent, newest first.

    Piped, each is a line: id, time, event, device, status, attempts, next attempt, problem.
    """
    path = f"/webhooks/{webhook_id}/deliveries"
    most = None if all_ else limit
    rows, next_cursor = read_pages(portal, path, "deliveries", most=most, cursor=None, filters={"status": status})
    if portal.out.as_json:
        portal.out.json({"deliveries": rows, "next_cursor": next_cursor})
        return
    portal.out.table(
        ("id", "time", "event", "device", "status", "attempts", "next", "problem"),
        [
            (
                text(row.get("delivery_id")),
                moment(row.get("created_at"), short=True),
                text(row.get("type")),
                text(row.get("device_id")),
                state(row.get("status")),
                text(row.get("attempts")),
                moment(row.get("next_at"), short=True),
                text(row.get("last_problem")),
            )
            for row in rows
        ],
        empty="No event fits." if status else "There is no event for this webhook.",
        spare=("attempts", "next", "problem"),
        whole=("status",),
    )
    if next_cursor:
        portal.out.note(f"These are the newest {len(rows)}; --all shows all.")


@webhook.command(
    "redeliver",
    cls=Command,
    examples=["portal webhook redeliver 1e66977361d81fe2", "portal webhook redeliver 1e66977361d81fe2 17 18"],
)
@click.argument("webhook_id", metavar="ID", type=WEBHOOK_ID, help="The webhook's id.")
@click.argument("delivery", type=click.IntRange(1), nargs=-1, help="Deliveries; all dead ones if none is given.")
@click.pass_obj
def webhook_redeliver(portal: Portal, webhook_id: str, delivery: tuple[int, ...]) -> None:
    """Send again what was given up, or what is named."""
    body = {"delivery_ids": list(delivery)} if delivery else {}
    answer = portal.client.call("POST", f"/webhooks/{webhook_id}/redeliver", body=body).json()
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.done(f"{answer.get('redelivered', 0)} events are sent again")


@webhook.command("test", cls=Command, examples=["portal webhook test 1e66977361d81fe2"])
@click.argument("webhook_id", metavar="ID", type=WEBHOOK_ID, help="The webhook's id.")
@click.pass_obj
def webhook_test(portal: Portal, webhook_id: str) -> None:
    """Send a test event now, say how that ended."""
    with portal.out.working("Sending…"):
        answer = portal.client.call("POST", f"/webhooks/{webhook_id}/test", repeatable=False).json()
    if portal.out.as_json:
        portal.out.json(answer)
    if not answer.get("delivered"):
        raise CliError(str(answer.get("problem") or "The receiver did not take the event."))
    if not portal.out.as_json:
        portal.out.done(f"The receiver took it ({answer.get('status')}, {answer.get('milliseconds')} ms)")
