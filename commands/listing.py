"""How devices are listed: columns, formats, and the export of all of them to a file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from commands.context import option_group
from commands.files import defused
from commands.output import Cell, state, text

EXPORTS = ("csv", "ndjson", "json")
SUFFIXES = {"": "csv", ".csv": "csv", ".json": "json", ".ndjson": "ndjson", ".jsonl": "ndjson"}
TIMES = ("created_at", "updated_at", "expires_at", "revoked_at", "renewable_from", "connected_since", "last_seen")
COLUMNS = (
    "device_id", "external_id", "name", "type", "location", "firmware", "status", "created_at", "updated_at",
    "expires_at", "revoked_at", "revocation_reason", "profile", "attested", "connected", "connected_since", "last_seen",
    "metadata", "topics", "groups",
)  # fmt: skip

FIELDS = (*COLUMNS, "renewable_from", "broker_problem")
TITLES = {"id": "device_id", "expires": "expires_at", "seen": "last_seen"}  # of the table without --columns


class Columns(click.ParamType[tuple[str, ...]]):
    """Names of columns, separated by commas."""

    name = "columns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names; each is a field of a device, or a key of its metadata."""
        given = (name.strip() for name in value.split(","))
        names = tuple(TITLES.get(name.lower(), name) for name in given)
        unknown = [name for name in names if name not in FIELDS and not re.fullmatch("metadata[.].+", name)]
        if unknown:
            self.fail(f"{unknown[0]!r} is not a column; there are: {', '.join(FIELDS)}, metadata.KEY.", param, ctx)
        if twice := [name for name in names if names.count(name) > 1]:
            self.fail(f"{twice[0]!r} is there twice; name each column only once.", param, ctx)
        return names


output_options = option_group(
    click.option("--columns", type=Columns(), metavar="NAME,…", help="Show these columns, in this order."),
    click.option("--wide", is_flag=True, help="Cut nothing off and leave no column out, however wide it gets."),
    click.option(
        "-o", "--output", "format_", type=click.Choice(("table", *EXPORTS)), help="Format.  [default: table, or lines]"
    ),
)


def connection_in_words(device: Mapping[str, Any]) -> dict[str, Any]:
    """Return in words whether a device is connected (yes, no, never, unknown), with since when and when last seen."""
    connection = device.get("connection", {})
    if connection is None:
        return {"connected": "never", "connected_since": None, "last_seen": None}
    known = connection if isinstance(connection, dict) else {}
    connected = {"True": "yes", "False": "no"}.get(str(known.get("connected")), "unknown")
    since = known.get("since") if connected == "yes" else None
    return {"connected": connected, "connected_since": since, "last_seen": known.get("last_seen")}


def values_of(device: Mapping[str, Any]) -> dict[str, Any]:
    """Return a device as columns show it: with its connection in words, and topics as --topic takes them."""
    topics = [f"{one.get('filter')}:{one.get('access')}" for one in device.get("topics") or () if isinstance(one, dict)]
    groups = device.get("groups") or ()
    return {**device, **connection_in_words(device), "topics": " ".join(topics), "groups": " ".join(map(str, groups))}


def column(name: str) -> Callable[[Mapping[str, Any]], Cell]:
    """Return a column of a table with a field of a device, or with a key of its metadata."""

    def cell(device: Mapping[str, Any]) -> Cell:
        value = _value(values_of(device), name)
        if name == "status":
            return state(value)
        return (
            text(value)
            if name not in TIMES or not value
            else Cell(str(value), f"{str(value)[:19].replace('T', ' ')} UTC")
        )

    return cell


def _value(values: Mapping[str, Any], name: str) -> Any:
    if not name.startswith("metadata."):
        return values.get(name)
    metadata = values.get("metadata")
    return metadata.get(name.partition(".")[2]) if isinstance(metadata, dict) else None


def lines_of(devices: Iterable[Mapping[str, Any]], format_: str, columns: Sequence[str]) -> Iterator[str]:
    """Yield devices as lines: CSV with a header, or NDJSON with all fields."""
    if format_ == "csv":
        yield csv_line(columns)
    for device in devices:
        yield csv_line_of(device, columns) if format_ == "csv" else json.dumps(device) + "\n"


def csv_line_of(device: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Return a device as a line of CSV; what is no text or number is JSON."""
    values = values_of(device)
    cells = (_value(values, name) for name in columns)
    return csv_line(json.dumps(cell, ensure_ascii=False) if isinstance(cell, dict | list) else cell for cell in cells)


def csv_line(values: Iterable[Any]) -> str:
    """Return a line of CSV (RFC 4180), without formulas, and with an empty cell for ``None``."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(["" if value is None else defused(value) for value in values])
    return buffer.getvalue()
