"""The files of an import: the rows of the input, and the folder of results."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from commands.bundle import FORMATS
from commands.errors import CheckFailed, Misused
from commands.files import Folder, NewFile, defused, reason, replace_file, undefused, write_new, writing
from commands.registration import KEY_TYPES

REQUIRED = {"name": 128, "type": 64, "location": 128, "firmware": 64}  # maximum number of characters
OPTIONAL = {"external_id": 128, "csr": 16384, "bundle_password": 128}
JSON_COLUMNS = ("metadata", "topics")
FIELDS = (*REQUIRED, *OPTIONAL, *JSON_COLUMNS, "key_type", "validity_days", "bundle_format")
MAX_ROW = 128 * 1024  # bytes
FORMAT_OF_SUFFIX = {".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson"}


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row of the file, with the line on which it begins; ``problem`` says what is wrong with it."""

    line: int
    values: Mapping[str, Any]
    problem: str | None = None


def format_of(path: Path, form: str | None) -> str:
    """Return ``csv`` or ``ndjson``, by the option or else by the name of the file; raises ``Misused``."""
    found = form or FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if found is None:
        raise Misused(f"The format of {path} is unknown; add --format csv or --format ndjson.")
    return found


def fingerprint_of(path: Path) -> str:
    """Return the SHA-256 of the file in hex; raises ``Misused`` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Misused(f"{path} cannot be read: {reason(error)}.") from None


def read_rows(path: Path, form: str) -> Iterator[FileRow]:
    """Yield the rows of a file; raises ``Misused`` if it does not have that format at all."""
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
                yield FileRow(began, {}, f"has {len(cells)} cells, but the first row names {len(header)} columns")
            else:
                yield _row(began, {name: cell for name, cell in zip(header, cells, strict=True) if cell})
    except csv.Error as error:
        raise Misused(f"The file is not valid CSV (RFC 4180) from line {line} on: {error}.") from None
    if header is None:
        raise Misused("The file is empty; its first row must name the columns.")


def _header(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    unknown = [name for name in names if name not in FIELDS]
    missing = [name for name in REQUIRED if name not in names]
    if unknown or missing or len(set(names)) < len(names):
        what = f"{unknown[0]!r} is unknown" if unknown else f"{missing[0]} is missing" if missing else "one is repeated"
        raise Misused(f"The first row must name the columns: {what}.", hints=[f"Columns: {', '.join(FIELDS)}."])
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
    return None


STATE, RESULTS, BUNDLES, CERTIFICATES = "import.json", "results.csv", "bundles", "certificates"
COLUMNS = (
    "line", "external_id", "name", "result", "device_id", "fingerprint", "serial_number", "expires_at",
    "download_url", "download_expires_at", "bundle_password", "code", "detail",
)  # fmt: skip
GIVEN = ("external_id", "name", "code", "detail")  # texts that come from the file or the answer
DONE = ("registered", "repeated")


class Results:
    """The folder of an import: ``results.csv`` (0600) with a row for each device, bundles and certificates."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Create the folder or continue in it; raises ``CheckFailed``, ``Misused`` if it belongs to another file."""
        self.folder = Folder(folder, (), force=True).path
        self.path = self.folder / RESULTS
        self.done: set[str] = set()
        state = self._state(fingerprint)
        self._prefix = state["prefix"]
        self._file: TextIO | None = None

    def _state(self, fingerprint: str) -> dict[str, str]:
        path = self.folder / STATE
        if not os.path.lexists(path):
            if os.path.lexists(self.path):
                raise CheckFailed(f"{self.folder} contains a {RESULTS} of something else; choose another folder.")
            state = {"file_sha256": fingerprint, "prefix": secrets.token_hex(8)}
            write_new(path, NewFile(json.dumps(state).encode(), 0o600), force=False)
            return state
        try:
            state = json.loads(path.read_bytes())
            state = {name: str(state[name]) for name in ("file_sha256", "prefix")}
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckFailed(f"{path} is damaged; choose another folder.") from None
        if state["file_sha256"] != fingerprint:
            raise Misused(
                f"{self.folder} contains the import of another file, or of this file before it was changed.",
                hints=["Choose another folder. A row with an external_id never registers a second device."],
            )
        return state

    def external_id(self, line: int) -> str:
        """Return the external id for a row without one: always the same for the same line."""
        return f"import-{self._prefix}-{line}"

    def __enter__(self) -> Self:
        """Open the file to add results; keeps earlier results except failures."""
        with writing(self.path):
            if os.path.lexists(self.path):
                self._file = self._rewrite()
            else:
                self._file = _open(self.path)
                csv.writer(self._file).writerow(COLUMNS)
        return self

    def _rewrite(self) -> TextIO:
        fresh = self.path.with_name(f".{RESULTS}.{secrets.token_hex(6)}.tmp")
        file = _open(fresh)
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in self.rows():
            if row["result"] in DONE:
                self.done.add(undefused(row["external_id"]))
                writer.writerow([row[name] for name in COLUMNS])
        file.flush()
        os.fsync(file.fileno())
        os.replace(fresh, self.path)
        return file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None  # the rows can still be read

    def sync(self) -> None:
        """Make durable what was added; raises ``CheckFailed``."""
        if self._file is not None:
            with writing(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def add(self, line: int, external_id: str, name: str, answer: Mapping[str, Any]) -> None:
        """Add the answer to a row."""
        if self._file is None:
            raise CheckFailed(f"{self.path} is not open.")
        row = {column: str(answer.get(column) or "") for column in COLUMNS}
        failed = "device_id" not in answer
        row |= {"line": str(line), "external_id": external_id, "name": name}
        row["result"] = "failed" if failed else "repeated" if answer.get("repeated") else "registered"
        with writing(self.path):
            if isinstance(answer.get("chain"), str):
                self._keep_certificate(str(answer["device_id"]), answer["chain"])
            csv.writer(self._file).writerow([defused(row[name]) if name in GIVEN else row[name] for name in COLUMNS])
        if not failed:
            self.done.add(external_id)

    def _keep_certificate(self, device_id: str, chain: str) -> None:
        if not _is_id(device_id):
            raise CheckFailed("The portal's answer contains an invalid device_id.")
        folder = self.folder / CERTIFICATES
        folder.mkdir(mode=0o700, exist_ok=True)
        replace_file(folder / f"{device_id}.pem", chain.encode(), mode=0o644)

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield every complete row of the file."""
        if self._file is not None:
            self._file.flush()
        with self.path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if None not in row and all(isinstance(value, str) for value in row.values()):  # else it was truncated
                    yield row

    def bundle_path(self, device_id: str, content: bytes) -> Path:
        """Return the path for the bundle of a device, a ZIP or a PKCS#12 file, in a folder of mode 0700."""
        return self._bundles(device_id) / f"{device_id}{'.zip' if content.startswith(b'PK') else '.p12'}"

    def has_bundle(self, device_id: str) -> bool:
        """Return whether the bundle of a device was downloaded."""
        folder = self._bundles(device_id)
        return any((folder / f"{device_id}{suffix}").exists() for suffix in (".zip", ".p12"))

    def _bundles(self, device_id: str) -> Path:
        if not _is_id(device_id):
            raise CheckFailed(f"{self.path} contains an invalid device_id.")
        folder = self.folder / BUNDLES
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder


def _is_id(text: str) -> bool:
    return len(text) == 36 and all(letter in "0123456789abcdef-" for letter in text)


def _open(path: Path) -> TextIO:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    return open(descriptor, "w", encoding="utf-8", newline="")
