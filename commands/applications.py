"""The commands about applications: clients of the broker that are not devices."""

from __future__ import annotations

from typing import Any

import click

from commands.context import YES, Remote, command, group, paging_options, topics_from
from commands.devices import seen, show_client, topics_in_words
from commands.lifecycle import REASON, confirmed, say_whether_enforced, show_outcome
from commands.names import ApplicationName
from commands.output import moment, status_of, text
from commands.registration import Operation, issue, issuing_options
from commands.times import OVERLAP, Time

ABOUT = "application_id"
SHOW = "portal application show"
_ID = click.argument(
    "application_id",
    metavar="APPLICATION",
    type=ApplicationName(),
    help="Name, id, or the beginning of the id.",
)


@group("application")
def application() -> None:
    """Clients that are not devices: add, list, update, revoke."""


@command(
    "add",
    application,
    examples=[
        "portal application add telemetry-store --topic 'devices/+/telemetry:read' --out telemetry-store",
        "portal application add control --topic 'devices/+/command:write' --csr control.csr --out control",
    ],
)
@click.argument("name", help="Name of the application.")
@click.option(
    "--topic",
    "topics",
    metavar="FILTER:ACCESS",
    multiple=True,
    required=True,
    help="MQTT topic filter, and read, write or readwrite; wildcards may stand for devices' ids. Repeatable.",
)
@issuing_options
def application_add(portal: Remote, /, topics: tuple[str, ...], **options: Any) -> None:
    """Register an application, a client that is not a device.

    It needs an admin's token, and the guard in the broker. The credentials are delivered as those of a device.
    """
    options["topics"] = topics_from(topics)
    issue(portal, Operation("/applications", "Registering…", "Registered", "is registered", ABOUT, SHOW), options)


@command(
    "list",
    application,
    examples=[
        "portal application list",
        "portal application list --expires-before 30d",
        "portal application list --json",
    ],
)
@click.option("--status", type=click.Choice(("active", "revoked")), help="Only applications with this status.")
@click.option(
    "--search", "--q", "q", metavar="TEXT", help="Only applications with TEXT in the name, or with exactly this id."
)
@click.option(
    "--expires-before",
    type=Time(),
    metavar="TIME",
    help="Only those whose certificate expires before a date, a time, or 30d from now.",
)
@paging_options
def application_list(portal: Remote, /, limit: int, all_: bool, cursor: str | None, **filters: str | None) -> None:
    """List applications, newest first.

    When piped, prints tab-separated lines: id, name, status, expiry, last seen (now, a time, never, or empty if not
    known), topics separated by spaces.
    """
    wanted = None if all_ else limit
    answer = portal.client.read_pages("/applications", "applications", limit=wanted, cursor=cursor, **filters)
    filtered = any(filters.values())
    portal.out.table(
        answer,
        "applications",
        {
            "id": ABOUT,
            "name": "name",
            "status": status_of,
            "expires": lambda row: moment(row.get("expires_at"), expiry=row.get("status") != "revoked", short=True),
            "seen": seen,
            "topics": lambda row: text(" ".join(topics_in_words(row))),
        },
        spare=("seen", "topics"),
        empty="No matching applications." if filtered else "No applications yet.",
    )
    if not answer["applications"] and not filtered:
        portal.out.next_step("portal application add NAME --topic FILTER:ACCESS")


@command("show", application, examples=["portal application show telemetry-store"])
@_ID
def application_show(portal: Remote, application_id: str) -> None:
    """Show an application: certificate, broker state, topics."""
    show_client(portal, portal.client.get(f"/applications/{application_id}"), about=ABOUT)


@command(
    "update",
    application,
    examples=[
        "portal application update telemetry-store --topic 'devices/+/telemetry:read'",
        "portal application update telemetry-store --name archive",
    ],
)
@_ID
@click.option("--name", metavar="NAME", help="New name.")
@click.option("--topic", "topics", metavar="FILTER:ACCESS", multiple=True, help="Replaces all topics. Repeatable.")
def application_update(portal: Remote, application_id: str, name: str | None, topics: tuple[str, ...]) -> None:
    """Change an application's name or topics.

    What is taken away is refused by the broker at once.
    """
    changes: dict[str, Any] = {} if name is None else {"name": name}
    if topics:
        changes["topics"] = topics_from(topics)
    if not changes:
        raise click.UsageError("Nothing to change: use --name or --topic.")
    with portal.out.working("Changing; waiting for the broker…"):
        answer = portal.client.call("PATCH", f"/applications/{application_id}", body=changes).json()
    done = f"Changed {' and '.join(changes)} of {answer.get('name') or application_id}"
    show_client(portal, answer, done=done, about=ABOUT)
    if answer.get("broker") == "pending":
        portal.out.warning("The broker does not enforce this yet. The portal keeps trying; see: portal status")


@command(
    "renew",
    application,
    examples=["portal application renew telemetry-store --out telemetry-store-new"],
)
@_ID
@OVERLAP
@issuing_options
def application_renew(portal: Remote, /, application_id: str, **options: Any) -> None:
    """Issue a new certificate for an application."""
    path = f"/applications/{application_id}/renew"
    issue(portal, Operation(path, "Renewing…", "Renewed", "is renewed", ABOUT, SHOW, names_known=True), options)


@command(
    "revoke",
    application,
    examples=["portal application revoke telemetry-store --reason key_compromise --yes"],
)
@_ID
@REASON
@YES
def application_revoke(portal: Remote, application_id: str, reason: str | None, yes: bool) -> None:
    """Revoke an application permanently.

    Its certificate is revoked and its broker session is disconnected. This cannot be undone.
    """
    path = f"/applications/{application_id}"
    name = "" if yes else confirmed(portal, path, kind="application")
    with portal.out.working("Revoking; waiting for the broker…"):
        answer = portal.client.call("DELETE", path + (f"?reason={reason}" if reason else "")).json()
    show_outcome(portal, f"Revoked {name or application_id}", answer, "revoked_at", "reason", about=ABOUT)
    enforced = "The broker has disconnected it, and refuses its certificate."
    say_whether_enforced(portal, answer, enforced, kind="application")
