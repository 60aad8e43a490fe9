"""Bulk registration: reads rows while they arrive, answers each as soon as it is recorded."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import from_json

from core.errors import BodyTooLarge, BodyTooSlow, FieldProblem, InputInvalid, PortalError, RowMalformed, TooManyRows
from core.roles import Permission
from web.api.devices import RegisterRequest, registration_of
from web.api.fields import DeviceId, Fingerprint, Flag, Hex
from web.api.problems import FieldErrorModel
from web.api.routing import (
    NDJSON,
    AnswerModel,
    Answers,
    Call,
    Reply,
    RequestModel,
    Routes,
    RowBody,
    Timestamp,
    input_invalid,
    is_no_json,
)
from workflows.bulk.batch import Candidate, RowChecked, RowDone, RowFailed
from workflows.bulk.rows import CsvRows, NdjsonRows, Row, Rows

ROUTES = Routes("Devices")


class RowAnswer(AnswerModel):
    """The device of a row, or in `code` and `detail` what is wrong with it; `stopped`: the rows after it were not read.

    `repeated`: the device existed already. Link and password, or certificate and chain, are present if the row made new
    ones: for an existing device only if its bundle had not been fetched yet, and its previous link no longer works.
    `dry_run`: the row was only checked, and would be registered or, with `repeated`, is that of an existing device.
    """

    row: int
    device_id: DeviceId | None = None
    fingerprint: Fingerprint | None = None
    serial_number: Hex | None = None
    expires_at: Timestamp | None = None
    external_id: str | None = None
    download_url: str | None = None
    download_expires_at: Timestamp | None = None
    bundle_password: str | None = None
    certificate: str | None = None
    chain: str | None = None
    repeated: Literal[True] | None = None
    dry_run: Literal[True] | None = None
    code: str | None = None
    detail: str | None = None
    errors: list[FieldErrorModel] | None = None
    stopped: Literal[True] | None = None


CSV = "text/csv"
GATHER_SECONDS = 0.02  # that a batch which is not full waits for more rows
PART = 64 * 1024
COLUMNS = frozenset(RegisterRequest.model_fields)
REQUIRED = frozenset(name for name, field in RegisterRequest.model_fields.items() if field.is_required())
_JSON_COLUMNS = ("metadata", "topics")


class UploadBody:
    """The body of an upload, of at most ``limit`` bytes; read in blocks under a server other than the portal's."""

    def __init__(self, environ: Mapping[str, Any], limit: int) -> None:
        self._stream = environ["wsgi.input"]
        self._limit = limit
        self._length = int(environ.get("CONTENT_LENGTH") or 0)
        self._received = 0
        self._check_length(self._length)

    def check(self) -> None:
        """Raise ``PortalStopping`` where the server is being stopped, so that no more rows are begun."""
        if hasattr(self._stream, "check"):
            self._stream.check()

    def read_some(self, wait: float | None = None) -> bytes | None:
        """Return a part as ``web.listeners.RequestBody.read_some`` does; raises ``BodyTooLarge``, too."""
        part: bytes | None
        if hasattr(self._stream, "read_some"):
            part = self._stream.read_some(wait)
        else:
            part = self._stream.read(min(PART, self._length - self._received))
        self._received += len(part or b"")
        self._check_length(self._received)
        return part

    def _check_length(self, length: int) -> None:
        if length > self._limit:
            raise BodyTooLarge(f"The body must not be longer than {self._limit} bytes; see PORTAL_BULK_MAX_BYTES.")


class UploadedRows:
    """The rows of a body, as ``workflows.bulk.upload.Source`` describes them."""

    def __init__(self, body: UploadBody, media_type: str, *, most: int) -> None:
        self._body = body
        self._csv = CsvRows(COLUMNS, REQUIRED) if media_type == CSV else None
        self._rows: Rows = self._csv or NdjsonRows()
        self._most = most
        self._ready: deque[Row] = deque()
        self._ended = False
        self._failure: PortalError | None = None
        self._taken = 0

    def begin(self) -> None:
        """Read the row of a CSV that names the columns; raise ``InputInvalid``, or the error that ended the body."""
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
        """Return the number of the next row to be taken, from 1 on."""
        return self._taken + 1

    def take(self, limit: int, *, wait: bool) -> Sequence[Candidate] | None:
        """Return at most ``limit`` rows; see ``Source``."""
        self._body.check()
        while len(self._ready) < limit and not self._ended:
            patience = None if wait and not self._ready else GATHER_SECONDS if wait else 0
            if not self._read(patience):
                break
        if self._ready:
            rows = [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]
            self._taken += len(rows)
            return [candidate_of(row) for row in rows]
        if self._failure is not None:
            raise self._failure
        return () if self._ended else None

    def _read(self, patience: float | None) -> bool:
        """Read what arrives in ``patience`` seconds; return whether anything did."""
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
    """Return a row checked by the model of ``POST /register``."""
    if row.problem is not None:
        return Candidate(row.number, None, row.problem)
    try:
        text = row.content if isinstance(row.content, bytes) else _json_of(row.content)
        wanted = RegisterRequest.model_validate_json(text)
        registration = registration_of(wanted)
    except InputInvalid as error:
        return Candidate(row.number, None, error, _external_id(row.content))
    except ValidationError as error:
        problem: PortalError = input_invalid(error)
        if is_no_json(error):
            problem = RowMalformed("The row is not JSON in UTF-8.")
        return Candidate(row.number, None, problem, _external_id(row.content))
    return Candidate(row.number, registration, external_id=wanted.external_id)


def _json_of(cells: Mapping[str, str]) -> str:
    """Return the cells of a row of CSV as a JSON object; raise ``InputInvalid``."""
    values: dict[str, Any] = dict(cells)
    for name in _JSON_COLUMNS:
        if name in values:
            try:
                values[name] = from_json(values[name], allow_inf_nan=False)
            except ValueError:
                raise _bad_cell(name, "must be JSON") from None
    if "groups" in values:
        values["groups"] = values["groups"].split()
    days = values.get("validity_days")
    if days is not None:
        if not days.isascii() or not days.isdigit() or len(days) > 9:
            raise _bad_cell("validity_days", "must be a whole number")
        values["validity_days"] = int(days)
    return json.dumps(values)


def _bad_cell(name: str, message: str) -> InputInvalid:
    return InputInvalid(f"The row has invalid fields: {name} ({message}).", [FieldProblem(name, message)])


def _external_id(content: bytes | Mapping[str, str]) -> str | None:
    """Return the external id of a refused row, which distinguishes its answer from others."""
    try:
        values = from_json(content) if isinstance(content, bytes) else content
    except ValueError:
        return None
    found = values.get("external_id") if isinstance(values, Mapping) else None
    return found if isinstance(found, str) and len(found) <= 128 and found.isprintable() else None


class BulkQuery(RequestModel):
    """With `dry_run` the rows are checked as they would be to register them, and nothing is written."""

    dry_run: Flag = False


@ROUTES.add(
    "POST",
    "/register/bulk",
    Permission.CHANGE,
    Answers(
        "One line for each row, in their order, each sent once its result is durably recorded",
        model=RowAnswer,
        media_type=NDJSON,
    ),
    rows=RowBody(RegisterRequest, (NDJSON, CSV), _JSON_COLUMNS),
)
def register_bulk(call: Call, query: BulkQuery) -> Reply:
    """Register a device for each row of NDJSON or CSV."""
    portal = call.portal
    body = UploadBody(call.environ, portal.settings.bulk_max_bytes)
    media_type = call.headers["Content-Type"].partition(";")[0].strip().lower()
    with contextlib.ExitStack() as stack:
        stack.enter_context(portal.bulk.place(call.actor.tenant_id))
        source = UploadedRows(body, media_type, most=portal.settings.bulk_max_rows)
        try:
            source.begin()
        except ConnectionError as error:  # so nobody reads this error
            raise BodyTooSlow("The connection broke before the first row.") from error
        handled = portal.bulk.check if query.dry_run else portal.bulk.register
        answers = handled(call.actor, source)
        stack.enter_context(contextlib.closing(answers))
        lines = _Lines(answers, stack.pop_all(), dry_run=query.dry_run)
        return Reply(content=lines, media_type=NDJSON)


_Answer = RowDone | RowFailed | RowChecked


class _Lines(Iterator[bytes]):
    """The answers, one line each; the server iterates over them and closes them."""

    def __init__(self, answers: Iterator[Sequence[_Answer]], stack: contextlib.ExitStack, *, dry_run: bool) -> None:
        self._answers = answers
        self._stack = stack
        self._dry_run = dry_run

    def __next__(self) -> bytes:
        return b"".join(line_of(answer, dry_run=self._dry_run) for answer in next(self._answers))

    def close(self) -> None:
        """End the upload, complete or not."""
        self._stack.close()


def line_of(answer: _Answer, *, dry_run: bool = False) -> bytes:
    """Return an answer as a line of JSON, without the fields that are null."""
    if isinstance(answer, RowFailed):
        errors = [FieldErrorModel.of(problem) for problem in answer.errors]
        model = RowAnswer.of(answer, errors=errors or None, stopped=answer.stopped or None, dry_run=dry_run or None)
    else:
        model = RowAnswer.of(answer, repeated=answer.repeated or None, dry_run=dry_run or None)
    return model.model_dump_json(exclude_none=True).encode() + b"\n"
