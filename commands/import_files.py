"""The file of an import: its rows, checked as far as that is possible without the portal."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.errors import Misused
from commands.import_cells import open_text, read_cells
from commands.vocabulary import FORMATS, KEY_TYPES

REQUIRED = {"name": 128, "type": 64, "location": 128, "firmware": 64}  # maximum number of characters
OPTIONAL = {"external_id": 128, "csr": 16384, "bundle_password": 128, "profile": 63}
JSON_COLUMNS = ("metadata", "topics")
FIELDS = (*REQUIRED, *OPTIONAL, *JSON_COLUMNS, "groups", "key_type", "validity_days", "bundle_format")
MAX_ROW = 128 * 1024  # bytes
WORKBOOK_SUFFIXES = (".xlsx", ".xlsm", ".xls", ".ods")
FORMAT_OF_SUFFIX = {".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson"}


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row of the file, with the line on which it begins; ``problem`` says what is wrong with it."""

    line: int
    values: Mapping[str, Any]
    problem: str | None = None


IDENTITY = ("name", "type", "location", "firmware", "metadata", "topics", "csr")  # what the portal compares, no secret


class ExternalIds:
    """Gives rows without an external id one that says what they describe: the same row always gets the same one.

    So an import is repeatable, also from a file whose rows were corrected, added, removed or moved. Rows of a file that
    describe the same are counted; ``batch`` tells them from rows of other imports.
    """

    def __init__(self, batch: str) -> None:
        self._batch = batch
        self._seen: Counter[bytes] = Counter()

    def of(self, row: FileRow) -> str:
        """Return the external id of the next row of the file."""
        own = row.values.get("external_id")
        if own:
            return str(own)
        said = [self._batch, *(row.values.get(name) for name in IDENTITY)]
        if row.values.get("profile") not in (None, "default"):
            said.append(row.values["profile"])  # else as before there were profiles: an import can be repeated still
        if row.values.get("groups"):
            said.append({"groups": sorted(row.values["groups"])})
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()[:16]
        self._seen[digest] += 1
        return f"import-{digest.hex()}-{self._seen[digest]}"


def format_of(path: Path, form: str | None) -> str:
    """Return ``csv`` or ``ndjson``, by the option or else by the name of the file; raises ``Misused``."""
    found = form or FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if found is None:
        if path.suffix.lower() in WORKBOOK_SUFFIXES:
            raise Misused(f"{path} is a workbook; save the sheet as CSV UTF-8 in the spreadsheet program.")
        raise Misused(f"The format of {path} is unknown; add --format csv or --format ndjson.")
    return found


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file is read; with ``to_metadata`` the cells of unknown columns become metadata, as text."""

    form: str
    encoding: str | None = None
    to_metadata: bool = False


def read_rows(path: Path, how: Reading) -> Iterator[FileRow]:
    """Yield the rows of a file; raises ``Misused`` if it does not have that format at all."""
    with open_text(path, how.encoding) as file:
        yield from _read_csv(file, to_metadata=how.to_metadata) if how.form == "csv" else _read_ndjson(file)


def _read_ndjson(lines: Iterator[str]) -> Iterator[FileRow]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            yield FileRow(number, {}, "is not a JSON object")
        else:
            yield FileRow(number, values, _problem(values, len(line)))


def _read_csv(lines: Iterator[str], *, to_metadata: bool) -> Iterator[FileRow]:
    header: list[str] | None = None
    for line, cells in read_cells(lines, REQUIRED):
        if header is None:
            header = _header(cells, to_metadata=to_metadata)
        elif len(cells) != len(header):
            yield FileRow(line, {}, f"has {len(cells)} cells, but the first row names {len(header)} columns")
        else:
            yield _row(line, {name: cell for name, cell in zip(header, cells, strict=True) if cell})
    if header is None:
        raise Misused("The file is empty; its first row must name the columns.")


def _header(cells: list[str], *, to_metadata: bool) -> list[str]:
    """Return the names of the columns: of fields in lower case, of others as they are."""
    names = [cell.strip() for cell in cells]
    names = [name.lower() if name.lower() in FIELDS else name for name in names]
    unknown = [name for name in names if name not in FIELDS and not (to_metadata and name)]
    missing = [name for name in REQUIRED if name not in names]
    counts = Counter(name.casefold() for name in names)
    repeated = [name for name in names if counts[name.casefold()] > 1]
    if unknown or missing or repeated:
        what = f"{unknown[0]!r} is unknown" if unknown else f"{missing[0]} is missing" if missing else ""
        what = what or f"{repeated[0]!r} is repeated"
        hints = [f"Columns: {', '.join(FIELDS)}."]
        if unknown and not missing:
            hints.append("Add --metadata-columns to keep the cells of other columns as metadata.")
        raise Misused(f"The first row must name the columns: {what}.", hints=hints)
    return names


def _row(line: int, cells: dict[str, str]) -> FileRow:
    others = {name: cell for name, cell in cells.items() if name not in FIELDS}
    cells = {name: cell for name, cell in cells.items() if name in FIELDS}
    values: dict[str, Any] = dict(cells)
    for name in JSON_COLUMNS:
        if name in values:
            try:
                values[name] = json.loads(values[name])
            except (ValueError, RecursionError):
                return FileRow(line, cells, f"{name} is not JSON")
    if "groups" in values:
        values["groups"] = values["groups"].split()
    days = cells.get("validity_days")
    if days is not None:
        if not days.isascii() or not days.isdigit():
            return FileRow(line, cells, "validity_days is not a whole number")
        values["validity_days"] = int(days)
    if others:
        metadata = values.setdefault("metadata", {})
        if not isinstance(metadata, dict) or not metadata.keys().isdisjoint(others):
            return FileRow(line, cells, "metadata is not a JSON object, or has a key that is a column, too")
        metadata |= others
    return FileRow(line, values, _problem(values, sum(map(len, (cells | others).values()))))


def _problem(values: Mapping[str, Any], length: int) -> str | None:
    """Return a problem for which the portal would refuse the row, if there is one."""
    if length > MAX_ROW:
        return f"is longer than {MAX_ROW} bytes"
    for name in values:
        if name not in FIELDS:
            return f"{name[:64]!r} is not a field"
    for name in REQUIRED:
        if not values.get(name):
            return f"{name} is missing"
    for name, most in {**REQUIRED, **OPTIONAL}.items():
        value = values.get(name)
        if value is not None and (not isinstance(value, str) or not 0 < len(value) <= most):
            return f"{name} is not a text of 1 to {most} characters"
    if "PRIVATE KEY" in (values.get("csr") or ""):
        return "csr holds a private key, which must not be sent; give the CSR alone"
    return _problem_of_choice(values)


def _problem_of_choice(values: Mapping[str, Any]) -> str | None:
    days, key_type = values.get("validity_days"), values.get("key_type")
    if days is not None and (not isinstance(days, int) or not 1 <= days <= 36500):
        return "validity_days is not a whole number from 1 to 36500"
    if key_type is not None and key_type not in KEY_TYPES:
        return f"key_type is not one of {', '.join(KEY_TYPES)}"
    if values.get("bundle_format") not in (None, *FORMATS):
        return f"bundle_format is not one of {', '.join(FORMATS)}"
    if not isinstance(values.get("metadata", {}), dict):
        return "metadata is not a JSON object"
    if not isinstance(values.get("topics") or [], list):
        return "topics is not a JSON list"
    groups = values.get("groups") or []
    if not isinstance(groups, list) or not all(isinstance(name, str) for name in groups):
        return "groups is not a list of names"
    return None
