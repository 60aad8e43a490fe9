"""The command that writes the fleet to a file."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from commands.context import Command, Portal
from commands.devices import STATUSES, Expiry
from commands.errors import CheckFailed
from commands.files import whole_file

COLUMNS = (
    "device_id", "external_id", "name", "type", "location", "firmware", "status", "created_at", "updated_at",
    "expires_at", "revoked_at", "revocation_reason",
)  # fmt: skip

Write = Callable[[str], object]


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
