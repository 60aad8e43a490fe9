"""Bulk registration: rows in, answers out, both while they come."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from core.errors import BodyTooSlow
from core.roles import Permission
from web.api.bulk_models import RowAnswer
from web.api.bulk_rows import CSV, NDJSON, Body, UploadedRows, WholeBody
from web.api.device_models import RegisterRequest
from web.api.routing import Answers, Call, Reply, Routes
from workflows.bulk.terms import RowFailed
from workflows.bulk.upload import Answer

bulk = Routes("Devices")

_FIELDS = ("device_id", "fingerprint", "serial_number", "expires_at", "external_id", "download_url",
           "download_expires_at", "bundle_password", "certificate", "chain")  # fmt: skip


@bulk.route(
    "POST",
    "/register/bulk",
    permission=Permission.CHANGE,
    rows=RegisterRequest,
    row_types=(NDJSON, CSV),
    answers=Answers(
        RowAnswer,
        media_type=NDJSON,
        description="An answer for each row, in their order, a line each, as soon as what it says is durable",
    ),
    errors=(503,),
)
def register_bulk(call: Call) -> Reply:
    """Register a device for each row of NDJSON or CSV."""
    portal = call.portal
    stream = call.environ["wsgi.input"]
    body: Body = stream if hasattr(stream, "read_some") else WholeBody(call.environ, portal.settings.bulk_max_bytes)
    media_type = call.headers["Content-Type"].partition(";")[0].strip().lower()
    with contextlib.ExitStack() as stack:
        stack.enter_context(portal.bulk.place())
        source = UploadedRows(body, media_type, most=portal.settings.bulk_max_rows)
        try:
            source.begin()
        except ConnectionError as error:  # nobody reads this any more
            raise BodyTooSlow("The connection broke before the first row.") from error
        answers = portal.bulk.register(call.actor, source)
        stack.enter_context(contextlib.closing(answers))
        return Reply(content=_Lines(answers, stack.pop_all()), media_type=NDJSON)


class _Lines(Iterator[bytes]):
    """The answers, a line each, which the server asks for and closes."""

    def __init__(self, answers: Iterator[Sequence[Answer]], stack: contextlib.ExitStack) -> None:
        self._answers = answers
        self._stack = stack

    def __next__(self) -> bytes:
        return b"".join(map(line_of, next(self._answers)))

    def close(self) -> None:
        """End the upload, however far it has come."""
        self._stack.close()


def line_of(answer: Answer) -> bytes:
    """An answer as a line of JSON; what is not there is left out."""
    values: dict[str, Any] = {"row": answer.row}
    if isinstance(answer, RowFailed):
        values |= {"code": answer.code, "detail": answer.detail}
        if answer.errors:
            values["errors"] = [{"field": problem.field, "message": problem.message} for problem in answer.errors]
        if answer.external_id is not None:
            values["external_id"] = answer.external_id
        if answer.stopped:
            values["stopped"] = True
    else:
        for name in _FIELDS:
            value = getattr(answer, name)
            if value is not None:
                values[name] = value.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if isinstance(value, datetime) else value
        if answer.repeated:
            values["repeated"] = True
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"
