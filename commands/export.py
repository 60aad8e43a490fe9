"""The command that writes all devices to a file."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from commands.context import FORCE_HELP, Remote, command
from commands.devices import filter_options
from commands.errors import CheckFailed
from commands.files import whole_file
from commands.listing import COLUMNS, EXPORTS, SUFFIXES, csv_line, csv_line_of


@command(
    "export",
    examples=["portal export --out fleet.csv", "portal export --format ndjson --status active | jq -r .device_id"],
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write to FILE (0600).  [default: standard output]"
)
@click.option("--format", "format_", type=click.Choice(EXPORTS), help="Format.  [default: by the name of FILE, or csv]")
@click.option("--force", is_flag=True, help=FORCE_HELP)
@filter_options
def export(portal: Remote, /, out: Path | None, format_: str | None, force: bool, **filters: str | None) -> None:
    """Write all devices as CSV, NDJSON or JSON.

    FILE appears only when it is complete, so an interrupted export leaves no file. With --json, prints the number of
    devices.
    """
    format_ = format_ or _format_of(out)
    if out is None:
        _write_devices(portal, filters, sys.stdout.write, format_)
        return
    if out.exists() and not force:
        raise CheckFailed(f"{out} already exists; use --force to replace it.")
    with whole_file(out) as file, portal.out.working("Exporting…"):
        count = _write_devices(portal, filters, lambda content: file.write(content.encode()), format_)
    answer = {"devices": count, "file": str(out.absolute())}
    portal.out.result(answer, done=f"Wrote {count} device{'s' * (count != 1)} to {out}")


def _format_of(out: Path | None) -> str:
    suffix = "" if out is None else out.suffix.lower()
    if suffix not in SUFFIXES:
        raise click.UsageError(
            f"The name does not say the format of {out}; add --format, or end it with .csv or .json."
        )
    return SUFFIXES[suffix]


def _write_devices(portal: Remote, filters: dict[str, Any], write: Callable[[str], object], format_: str) -> int:
    """Write devices page by page, however many there are; return their number."""
    pages = portal.client.pages("/devices", "devices", **filters)
    first = next(pages)  # before anything is written, since what cannot be had must not look like an empty fleet
    write({"csv": csv_line(COLUMNS), "json": '{"devices": [\n', "ndjson": ""}[format_])
    count = 0
    for page in itertools.chain([first], pages):
        for device in page["devices"]:
            if format_ == "csv":
                write(csv_line_of(device, COLUMNS))
            else:
                separator = "" if format_ == "ndjson" else ",\n" if count else ""
                write(separator + json.dumps(device) + ("\n" if format_ == "ndjson" else ""))
            count += 1
    write("\n]}\n" if format_ == "json" else "")
    return count
