"""The commands about devices that are registered."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from commands.context import DEVICE_ID, Command, Portal, confirm, metadata_from, require_confirmable, topics_from
from commands.errors import Unreachable
from commands.output import Cell, moment, state, text

STATUSES = ("pending", "active", "suspended", "revoked")
REASONS = (
    "unspecified",
    "key_compromise",
    "affiliation_changed",
    "superseded",
    "cessation_of_operation",
    "privilege_withdrawn",
)
DEFAULT_LIMIT = 50


class Expiry(click.ParamType[str]):
    """A time: a date, an RFC 3339 time, or a distance such as ``30d``."""

    name = "time"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return it as RFC 3339 in UTC."""
        distance = re.fullmatch(r"([0-9]{1,5})d", value)
        if distance is not None:
            at = datetime.now(UTC) + timedelta(days=int(distance[1]))
        else:
            try:
                at = datetime.fromisoformat(value)
            except ValueError:
                self.fail("give a date (2027-01-31), a time (2027-01-31T12:00:00Z) or days from now (30d).", param, ctx)
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


@click.command(
    "list",
    cls=Command,
    examples=[
        "portal list --status active --location 'Hall 2'",
        "portal list --expires-before 30d --all",
        "portal list --all | cut -f1",
        "portal list --json | jq '.devices[].device_id'",
    ],
)
@click.option("--status", type=click.Choice(STATUSES), help="Devices in this state.")
@click.option("--type", "type_", metavar="TYPE", help="Devices of this type.")
@click.option("--location", metavar="PLACE", help="Devices at this place.")
@click.option("--q", metavar="TEXT", help="Look for this in names; or a whole id.")
@click.option("--expires-before", type=Expiry(), metavar="TIME", help="A date, a time, or days from now such as 30d.")
@click.option("--limit", type=click.IntRange(1), default=DEFAULT_LIMIT, show_default=True, help="How many at the most.")
@click.option("--all", "all_", is_flag=True, help="All of them, however many.")
@click.option("--cursor", metavar="CURSOR", help="Go on where an earlier --json answer ended (next_cursor).")
@click.pass_obj
def list_devices(
    portal: Portal,
    status: str | None,
    type_: str | None,
    location: str | None,
    q: str | None,
    expires_before: str | None,
    limit: int,
    all_: bool,
    cursor: str | None,
) -> None:
    """List devices, newest first.

    Piped, each is a line of tab-separated columns: id, name, type, location, status, expiry.
    """
    filters = {"status": status, "type": type_, "location": location, "q": q, "expires_before": expires_before}
    most = None if all_ else limit
    devices, next_cursor = read_pages(portal, "/devices", "devices", most=most, cursor=cursor, filters=filters)
    if portal.out.as_json:
        portal.out.json({"devices": devices, "next_cursor": next_cursor})
        return
    rows = [
        (
            text(device.get("device_id")),
            text(device.get("name")),
            text(device.get("type")),
            text(device.get("location")),
            state(device.get("status")),
            moment(device.get("expires_at"), expiry=device.get("status") != "revoked", short=True),
        )
        for device in devices
    ]
    filtered = any(filters.values())
    portal.out.table(
        ("id", "name", "type", "location", "status", "expires"),
        rows,
        empty="No device fits." if filtered else "There is no device yet.",
        spare=("location", "type"),
    )
    if rows and next_cursor:
        portal.out.note(f"These are the newest {len(rows)}; --all shows all.")
    elif not rows and not filtered:
        portal.out.next_step("portal register NAME --type … --location … --firmware …")


def read_pages(
    portal: Portal, path: str, key: str, *, most: int | None, cursor: str | None, filters: dict[str, str | None]
) -> tuple[list[dict[str, Any]], str | None]:
    """Collect rows from page to page; with the cursor of what follows, if anything does."""
    rows: list[dict[str, Any]] = []
    next_cursor = None
    for page in portal.client.pages(path, key, most=most, cursor=cursor, **filters):
        rows += page[key]
        next_cursor = page.get("next_cursor")
    if not all(isinstance(row, dict) for row in rows):
        raise Unreachable(f"The portal's list of {key} cannot be read; it may be of another version.")
    return rows, next_cursor


@click.command("show", cls=Command, examples=["portal show 0f9d2c4e-5b1a-4c7d-9e8f-102030405060"])
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.pass_obj
def show(portal: Portal, device_id: str) -> None:
    """Show a device: certificate, broker state, topics."""
    device = portal.client.get(f"/devices/{device_id}")
    if portal.out.as_json:
        portal.out.json(device)
        return
    _show(portal, device)


def _show(portal: Portal, device: dict[str, Any]) -> None:
    fields: dict[str, Cell] = {"device_id": text(device.get("device_id"))}
    nested = device.get("certificate")
    certificate: dict[str, Any] = nested if isinstance(nested, dict) else {}
    known = {"device_id", "certificate", "topics", "metadata"}
    for name, value in device.items():
        if name not in known:
            fields[name] = _value(name, value, device)
    for key, value in _items(device.get("metadata")):
        fields[f"metadata.{key}"] = text(value)
    for index, topic in enumerate(device.get("topics") or ()):
        if isinstance(topic, dict):
            fields[f"topics.{index}"] = Cell(f"{topic.get('filter')}:{topic.get('access')}")
    for name, value in certificate.items():
        if name not in ("pem", "certificate", "chain"):
            fields[f"certificate.{name}"] = _value(name, value, device)
    portal.out.fields(fields)


def _items(value: object) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _value(name: str, value: object, device: dict[str, Any]) -> Cell:
    if name in ("status", "broker"):
        return state(value)
    if name in ("expires_at", "not_after"):
        return moment(value, expiry=device.get("status") != "revoked")
    if name.endswith("_at") or name == "not_before":
        return moment(value)
    return text(value)


@click.command(
    "update",
    cls=Command,
    examples=[
        "portal update 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --firmware 1.5.0",
        "portal update 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --topic 'devices/{id}/#:write' --topic devices/news:read",
    ],
)
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.option("--name", metavar="NAME", help="A new name.")
@click.option("--type", "type_", metavar="TYPE", help="What kind of device it is.")
@click.option("--location", metavar="PLACE", help="Where it stands.")
@click.option("--firmware", metavar="VERSION", help="The firmware that it runs.")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="In place of all that is there; may be repeated.")
@click.option("--no-metadata", is_flag=True, help="Forget the metadata.")
@click.option("--topic", "topics", metavar="FILTER:ACCESS", multiple=True, help="In place of all; may be repeated.")
@click.option("--default-topics", is_flag=True, help="The topics that every device has at first.")
@click.pass_obj
def update(
    portal: Portal,
    device_id: str,
    name: str | None,
    type_: str | None,
    location: str | None,
    firmware: str | None,
    metadata: tuple[str, ...],
    no_metadata: bool,
    topics: tuple[str, ...],
    default_topics: bool,
) -> None:
    """Change what is known of a device, or its topics."""
    if metadata and no_metadata:
        raise click.UsageError("Give --metadata or --no-metadata.")
    if topics and default_topics:
        raise click.UsageError("Give --topic or --default-topics.")
    changes: dict[str, Any] = {"name": name, "type": type_, "location": location, "firmware": firmware}
    changes = {field: value for field, value in changes.items() if value is not None}
    if metadata or no_metadata:
        changes["metadata"] = metadata_from(metadata)
    if topics or default_topics:
        changes["topics"] = topics_from(topics) or None
    if not changes:
        raise click.UsageError("Nothing to change: give at least one of --name, --type, --location, --firmware, …")
    device = portal.client.call("PATCH", f"/devices/{device_id}", body=changes).json()
    if portal.out.as_json:
        portal.out.json(device)
        return
    portal.out.done(f"Changed {', '.join(changes)} of {device.get('name') or device_id}")
    _show(portal, device)


@click.command(
    "revoke",
    cls=Command,
    examples=[
        "portal revoke 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --reason key_compromise",
        "portal revoke 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --yes",
    ],
)
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.option("--reason", type=click.Choice(REASONS), help="Why (RFC 5280); it is published in the CRL.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def revoke(portal: Portal, device_id: str, reason: str | None, yes: bool) -> None:
    """Put a device out, for good.

    Its certificate is revoked, its session at the broker is cut. This cannot be undone.
    """
    name = ""
    if not yes:
        require_confirmable()
        device = portal.client.get(f"/devices/{device_id}")
        name = str(device.get("name") or "")
        if device.get("status") != "revoked":
            portal.out.question({"Name": text(name), "Id": text(device_id)})
            confirm("Revoke this device? It cannot be undone.", yes=False)
    with portal.out.working("Revoking, until the broker obeys…"):
        answer = portal.client.call("POST", f"/revoke/{device_id}", body={"reason": reason} if reason else {}).json()
    if portal.out.as_json:
        portal.out.json(answer)
    else:
        portal.out.done(f"Revoked {name or device_id}")
        portal.out.fields(
            {
                "device_id": text(answer.get("device_id")),
                "status": state(answer.get("status")),
                "revoked_at": moment(answer.get("revoked_at")),
                "reason": text(answer.get("reason")),
                "broker": state(answer.get("broker")),
            }
        )
    if answer.get("broker") != "enforced":
        if answer.get("broker_problem"):
            portal.out.warning(str(answer["broker_problem"]))
        portal.out.warning(
            "THE BROKER DOES NOT ENFORCE THIS YET: the device may still be connected. "
            "The portal goes on trying; see what keeps it with: portal status"
        )
    else:
        portal.out.note("The broker has cut its session, and refuses its certificate.")


@click.command("certificates", cls=Command, examples=["portal certificates 0f9d2c4e-5b1a-4c7d-9e8f-102030405060"])
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.pass_obj
def certificates(portal: Portal, device_id: str) -> None:
    """List a device's certificates, newest first.

    Piped, each is a line: serial number, status, issued, expiry, revoked, reason, fingerprint.
    """
    answer = portal.client.get(f"/devices/{device_id}/certificates")
    if portal.out.as_json:
        portal.out.json(answer)
        return
    rows = [entry for entry in answer.get("certificates") or () if isinstance(entry, dict)]
    portal.out.table(
        ("serial number", "status", "issued", "expires", "revoked", "reason", "fingerprint"),
        [
            (
                text(row.get("serial_number")),
                state(row.get("status")),
                moment(row.get("issued_at"), short=True),
                moment(row.get("not_after"), expiry=row.get("status") == "active", short=True),
                moment(row.get("revoked_at"), short=True),
                text(row.get("revocation_reason")),
                text(row.get("fingerprint")),
            )
            for row in rows
        ],
        empty="This device has no certificate.",
        spare=("reason", "fingerprint"),
    )
