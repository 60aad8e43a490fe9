"""The commands that list, show and change devices."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from commands.context import DEVICE_ID, Command, Portal, metadata_from, topics_from
from commands.errors import CheckFailed, Unreachable
from commands.files import whole_file
from commands.output import Cell, moment, state, text

STATUSES = ("pending", "active", "suspended", "revoked")
DEFAULT_LIMIT = 50


COLUMNS = (
    "device_id", "external_id", "name", "type", "location", "firmware", "status", "created_at", "updated_at",
    "expires_at", "revoked_at", "revocation_reason",
)  # fmt: skip
Write = Callable[[str], object]


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


@click.command(
    "expiring",
    cls=Command,
    examples=["portal expiring", "portal expiring --within 90d", "portal expiring | cut -f1 | xargs -n1 portal renew"],
)
@click.option("--within", type=Expiry(), default="30d", show_default=True, metavar="TIME", help="Days, date or time.")
@click.pass_obj
def expiring(portal: Portal, within: str) -> None:
    """List the devices whose certificates end soon, soonest first.

    Piped, each is a line of tab-separated columns: id, name, location, expiry, from when it may renew by itself.
    """
    filters: dict[str, str | None] = {"status": "active", "expires_before": within}
    devices, _ = read_pages(portal, "/devices", "devices", most=None, cursor=None, filters=filters)
    devices.sort(key=lambda device: str(device.get("expires_at")))
    if portal.out.as_json:
        portal.out.json({"devices": devices})
        return
    rows = [
        (
            text(device.get("device_id")),
            text(device.get("name")),
            text(device.get("location")),
            moment(device.get("expires_at"), expiry=True, short=True),
            _window(device.get("renewable_from")),
        )
        for device in devices
    ]
    portal.out.table(
        ("id", "name", "location", "expires", "renews"),
        rows,
        empty="No certificate of a device that is in ends that soon.",
        spare=("location", "renews"),
    )
    if rows:
        portal.out.next_step("portal renew ID")


def _window(opens: object) -> Cell:
    """From when a device may renew by itself, for people ``now`` where that time has come."""
    cell = moment(opens, short=True)
    try:
        begun = datetime.fromisoformat(str(opens)) <= datetime.now(UTC)
    except (ValueError, TypeError):
        return cell
    return Cell(cell.plain, "now", "green") if begun else cell


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


@click.command(
    "export",
    cls=Command,
    examples=[
        "portal export --out fleet.csv",
        "portal export --format ndjson --status active | jq -r .device_id",
    ],
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="A file, made 0600; else to standard output."
)
@click.option("--format", "format_", type=click.Choice(["csv", "ndjson"]), help="By the name of FILE; else csv.")
@click.option("--force", is_flag=True, help="Replace FILE where it is there.")
@click.option("--status", type=click.Choice(STATUSES), help="Devices in this state.")
@click.option("--type", "type_", metavar="TYPE", help="Devices of this type.")
@click.option("--location", metavar="PLACE", help="Devices at this place.")
@click.option("--q", metavar="TEXT", help="Look for this in names; or a whole id.")
@click.option("--expires-before", type=Expiry(), metavar="TIME", help="A date, a time, or days from now such as 30d.")
@click.pass_obj
def export(
    portal: Portal,
    out: Path | None,
    format_: str | None,
    force: bool,
    status: str | None,
    type_: str | None,
    location: str | None,
    q: str | None,
    expires_before: str | None,
) -> None:
    """Write the fleet as CSV or NDJSON, page by page.

    A file is put in its place when it is whole, so that an export that broke off leaves none. With --json the answer
    is the number of devices.
    """
    filters = {"status": status, "type": type_, "location": location, "q": q, "expires_before": expires_before}
    as_csv = (format_ or ("ndjson" if out and out.suffix in (".ndjson", ".jsonl") else "csv")) == "csv"
    if out is None:
        _write_devices(portal, filters, sys.stdout.write, as_csv=as_csv)
        return
    if out.exists() and not force:
        raise CheckFailed(f"{out} is there already; --force replaces it.")
    with whole_file(out) as file, portal.out.working("Exporting"):
        count = _write_devices(portal, filters, lambda text: file.write(text.encode()), as_csv=as_csv)
    if portal.out.as_json:
        portal.out.json({"devices": count, "file": str(out.absolute())})
    else:
        portal.out.done(f"{count} device{'s' * (count != 1)} written to {out}")


def _write_devices(portal: Portal, filters: dict[str, str | None], write: Write, *, as_csv: bool) -> int:
    if as_csv:
        write(_line(COLUMNS))
    count = 0
    for page in portal.client.pages("/devices", "devices", most=None, cursor=None, **filters):
        for device in page["devices"]:
            write(_line([device.get(name) for name in COLUMNS]) if as_csv else json.dumps(device) + "\n")
            count += 1
    return count


def _line(values: Any) -> str:
    """A line of CSV (RFC 4180), with an empty text for what is not there."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(["" if value is None else value for value in values])
    return buffer.getvalue()
