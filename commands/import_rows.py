"""Reads a file of devices, checking what can be checked here."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from commands.errors import Misused
from commands.files import reason
from commands.registration import KEY_TYPES

REQUIRED = {"name": 128, "type": 64, "location": 128, "firmware": 64}  # with the most characters
OPTIONAL = {"external_id": 128, "csr": 16384, "bundle_password": 128}
JSON_COLUMNS = ("metadata", "topics")
FIELDS = (*REQUIRED, *OPTIONAL, *JSON_COLUMNS, "key_type", "validity_days", "bundle_format")
BUNDLE_FORMATS = ("zip", "p12", "pem")
ROW_MOST = 128 * 1024  # bytes
FORMS = {".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson"}


@dataclass(frozen=True, slots=True)
class FileRow:
    """A device of the file, with the line on which it begins; ``problem`` is what is wrong with it, in words."""

    line: int
    values: Mapping[str, Any]
    problem: str | None = None


def form_of(path: Path, form: str | None) -> str:
    """``csv`` or ``ndjson``: what was said, or else what the name says; raises ``Misused``."""
    found = form or FORMS.get(path.suffix.lower())
    if found is None:
        raise Misused(f"The name of {path} does not say what it holds; add --format csv or --format ndjson.")
    return found


def fingerprint_of(path: Path) -> str:
    """SHA-256 of the file in hex; raises ``Misused`` where it cannot be read."""
    try:
        with path.open("rb") as file:
            digest = sha256()
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise Misused(f"{path} cannot be read: {reason(error)}.") from None
    return digest.hexdigest()


def read_rows(path: Path, form: str) -> Iterator[FileRow]:
    """The devices of a file, one after the other; raises ``Misused`` where it is not of that form at all."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _read_csv(file) if form == "csv" else _read_ndjson(file)
    except UnicodeDecodeError:
        raise Misused(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise Misused(f"{path} cannot be read: {reason(error)}.") from None


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


def _read_csv(lines: Iterator[str]) -> Iterator[FileRow]:
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            began, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells)
            elif len(cells) != len(header):
                yield FileRow(began, {}, f"has {len(cells)} cells, where the first row names {len(header)} columns")
            else:
                yield _row(began, {name: cell for name, cell in zip(header, cells, strict=True) if cell})
    except csv.Error as error:
        raise Misused(f"From line {line} on the file is not CSV (RFC 4180): {error}.") from None
    if header is None:
        raise Misused("The file is empty; its first row must name the columns.")


def _header(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    unknown = [name for name in names if name not in FIELDS]
    missing = [name for name in REQUIRED if name not in names]
    if unknown or missing or len(set(names)) < len(names):
        what = f"{unknown[0]!r} is none" if unknown else f"{missing[0]} is missing" if missing else "one is there twice"
        raise Misused(f"The first row must name the columns: {what}.", hints=[f"There may be {', '.join(FIELDS)}."])
    return names


def _row(line: int, cells: dict[str, str]) -> FileRow:
    values: dict[str, Any] = dict(cells)
    for name in JSON_COLUMNS:
        if name in values:
            try:
                values[name] = json.loads(values[name])
            except (ValueError, RecursionError):
                return FileRow(line, cells, f"{name} is not JSON")
    days = cells.get("validity_days")
    if days is not None:
        if not days.isascii() or not days.isdigit():
            return FileRow(line, cells, "validity_days is not a whole number")
        values["validity_days"] = int(days)
    return FileRow(line, values, _problem(values, sum(map(len, cells.values()))))


def _problem(values: Mapping[str, Any], length: int) -> str | None:
    """What of a row the portal would certainly refuse."""
    if length > ROW_MOST:
        return f"is longer than {ROW_MOST} bytes"
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
    return _problem_of_choice(values)


def _problem_of_choice(values: Mapping[str, Any]) -> str | None:
    days, key_type = values.get("validity_days"), values.get("key_type")
    if days is not None and (not isinstance(days, int) or not 1 <= days <= 36500):
        return "validity_days is not a whole number from 1 to 36500"
    if key_type is not None and key_type not in KEY_TYPES:
        return f"key_type is none of {', '.join(KEY_TYPES)}"
    if values.get("bundle_format") not in (None, *BUNDLE_FORMATS):
        return f"bundle_format is none of {', '.join(BUNDLE_FORMATS)}"
    if not isinstance(values.get("metadata", {}), dict):
        return "metadata is not a JSON object"
    if not isinstance(values.get("topics") or [], list):
        return "topics is not a JSON list"
    return None
