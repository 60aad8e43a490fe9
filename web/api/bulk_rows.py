"""Reads the rows of an upload while they arrive."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import ValidationError
from pydantic_core import from_json

from core.errors import BodyTooLarge, FieldProblem, InputInvalid, PortalError, RowMalformed, TooManyRows
from web.api.device_models import RegisterRequest
from web.api.requests import input_invalid
from workflows.bulk.rows import CsvRows, NdjsonRows, Row, Rows
from workflows.bulk.terms import Candidate
from workflows.terms import Registration

NDJSON, CSV = "application/x-ndjson", "text/csv"
GATHER_SECONDS = 0.02  # for which a batch that is not full waits for more
PART = 64 * 1024
COLUMNS = frozenset(RegisterRequest.model_fields)
REQUIRED = frozenset(name for name, field in RegisterRequest.model_fields.items() if field.is_required())
_JSON_COLUMNS = ("metadata", "topics")


class Body(Protocol):
    """A body while it arrives: see ``serving_streaming.StreamedInput``."""

    def read_some(self, wait: float | None = None) -> bytes | None:
        """What has arrived, empty at the end, ``None`` where nothing comes in ``wait`` seconds."""

    def check(self) -> None:
        """Raise ``PortalStopping`` where no more rows are to be begun."""


class WholeBody:
    """The body under another server than the portal's, which knows its length."""

    def __init__(self, environ: Mapping[str, Any], limit: int) -> None:
        self._file = environ["wsgi.input"]
        self._left = int(environ.get("CONTENT_LENGTH") or 0)
        if self._left > limit:
            raise BodyTooLarge(f"The body of an upload must not be longer than {limit} bytes.")

    def check(self) -> None:
        """Never stop."""

    def read_some(self, wait: float | None = None) -> bytes | None:
        """The next part."""
        part: bytes = self._file.read(min(PART, self._left))
        self._left -= len(part)
        return part


class UploadedRows:
    """The rows of a body, as ``bulk_terms.Source`` has them."""

    def __init__(self, body: Body, media_type: str, *, most: int) -> None:
        self._body = body
        self._csv = CsvRows(COLUMNS, REQUIRED) if media_type == CSV else None
        self._rows: Rows = self._csv or NdjsonRows()
        self._most = most
        self._ready: deque[Row] = deque()
        self._ended = False
        self._failure: PortalError | None = None
        self._taken = 0

    def begin(self) -> None:
        """Read the row that names the columns, where there is one; raises ``InputInvalid``, and what ends a body."""
        if self._csv is None:
            return
        while not self._csv.has_header and not self._ended:
            self._read(None)
        if self._failure is not None:
            raise self._failure
        if not self._csv.has_header:
            raise InputInvalid(
                "The upload is empty; the first row must name the columns.", [FieldProblem("columns", "are missing")]
            )

    @property
    def next_row(self) -> int:
        """The number of the row that comes after all that were taken."""
        return self._taken + 1

    def take(self, most: int, *, wait: bool) -> Sequence[Candidate] | None:
        """At most so many rows; see ``bulk_terms.Source``."""
        self._body.check()
        while len(self._ready) < most and not self._ended:
            patience = None if wait and not self._ready else GATHER_SECONDS if wait else 0
            if not self._read(patience):
                break
        if self._ready:
            rows = [self._ready.popleft() for _ in range(min(most, len(self._ready)))]
            self._taken += len(rows)
            return [candidate_of(row) for row in rows]
        if self._failure is not None:
            raise self._failure
        return () if self._ended else None

    def _read(self, patience: float | None) -> bool:
        """Read what arrives in so many seconds; returns whether anything did."""
        try:
            part = self._body.read_some(patience)
            if part is None:
                return False
            rows = self._rows.feed(part) if part else self._rows.end()
        except PortalError as error:
            self._failure, self._ended = error, True
            return True
        self._ended = not part
        for row in rows:
            if row.number > self._most:
                self._failure, self._ended = TooManyRows(f"An upload has at most {self._most} rows."), True
                break
            self._ready.append(row)
        return True


def candidate_of(row: Row) -> Candidate:
    """A row as the use case wants it: checked by the model of ``POST /register``."""
    if row.problem is not None:
        return Candidate(row.number, None, row.problem)
    try:
        text = row.content if isinstance(row.content, bytes) else _json_of(row.content)
        wanted = RegisterRequest.model_validate_json(text)
    except InputInvalid as error:
        return Candidate(row.number, None, error, _external_id(row.content))
    except ValidationError as error:
        problem: PortalError = input_invalid(error)
        if any(found["type"] == "json_invalid" for found in error.errors(include_input=False, include_url=False)):
            problem = RowMalformed("The row is not JSON in UTF-8.")
        return Candidate(row.number, None, problem, _external_id(row.content))
    return Candidate(row.number, _registration(wanted), external_id=wanted.external_id)


def _registration(wanted: RegisterRequest) -> Registration:
    return Registration(
        name=wanted.name,
        type=wanted.type,
        location=wanted.location,
        firmware=wanted.firmware,
        metadata=wanted.metadata,
        csr=wanted.csr,
        key_type=wanted.key_type,
        validity_days=wanted.validity_days,
        topics=None if wanted.topics is None else [(topic.filter, topic.access) for topic in wanted.topics],
        bundle_password=wanted.bundle_password,
        bundle_format=wanted.bundle_format,
        external_id=wanted.external_id,
    )


def _json_of(cells: Mapping[str, str]) -> str:
    """The cells of a row of CSV as the JSON object that they stand for; raises ``InputInvalid``."""
    values: dict[str, Any] = dict(cells)
    for name in _JSON_COLUMNS:
        if name in values:
            try:
                values[name] = from_json(values[name], allow_inf_nan=False)
            except ValueError:
                raise _bad_cell(name, "must be JSON") from None
    days = values.get("validity_days")
    if days is not None:
        if not days.isascii() or not days.isdigit() or len(days) > 9:
            raise _bad_cell("validity_days", "must be a whole number")
        values["validity_days"] = int(days)
    return json.dumps(values)


def _bad_cell(name: str, message: str) -> InputInvalid:
    return InputInvalid(f"The row has fields to be corrected: {name} ({message}).", [FieldProblem(name, message)])


def _external_id(content: bytes | Mapping[str, str]) -> str | None:
    """The external id of a row that is refused, so that its answer can be told from others."""
    try:
        values = from_json(content) if isinstance(content, bytes) else content
    except ValueError:
        return None
    found = values.get("external_id") if isinstance(values, Mapping) else None
    return found if isinstance(found, str) and len(found) <= 128 and found.isprintable() else None
