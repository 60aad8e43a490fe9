"""Runs the WSGI application for one whole request."""

from __future__ import annotations

import io
from http import HTTPStatus
from typing import Any

from gunicorn.http import errors, get_parser, wsgi
from gunicorn.http.body import ChunkedReader, LengthReader

from web.serving_bodies import CountedBody
from web.serving_connection import Connection
from web.serving_framing import BegunRequest, WholeRequest
from web.serving_refusals import RequestRefused, malformed
from web.serving_streaming import StreamedInput

INTERNAL_ERROR = RequestRefused(
    HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "Something went wrong in the portal; its log says what."
)


_REFUSALS = (
    (errors.LimitRequestLine, RequestRefused(HTTPStatus.REQUEST_URI_TOO_LONG, "uri_too_long", "The URL is too long.")),
    (
        errors.LimitRequestHeaders,
        RequestRefused(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            "headers_too_large",
            "A header is too long, or there are more than 100.",
        ),
    ),
    (
        errors.ExpectationFailed,
        RequestRefused(HTTPStatus.EXPECTATION_FAILED, "expectation_failed", "The only Expect header is 100-continue."),
    ),
)


class ClientGone(Exception):
    """The connection broke, or its reader is too slow; there is nobody to answer."""


def respond(worker: Any, connection: Connection, request: WholeRequest | BegunRequest) -> bool:
    """Queue the application's response on the connection; returns whether another request may follow.

    Raises ``RequestRefused`` where the HTTP parser does not accept the head, or the application failed before it
    began its response, and ``ClientGone``.
    """
    parsed = _parse(worker.cfg, connection, request)
    response, environ = wsgi.create(parsed, connection, connection.client, connection.server, worker.cfg)
    response.version = "portal"  # what the Server header says
    environ["portal.listener"] = connection.listener
    environ["gunicorn.socket"] = connection.sock
    environ["wsgi.multithread"] = True
    if isinstance(request, BegunRequest):
        timeout = worker.settings.request_timeout
        environ["wsgi.input"] = StreamedInput(connection, request, timeout=timeout, wanted=lambda: worker.alive)
        environ["wsgi.input_terminated"] = True
        response.force_close()  # whatever is left of the body must not be taken for a request
    else:
        environ["wsgi.input"] = io.BytesIO(request.body)
        if request.chunked:
            environ["CONTENT_LENGTH"] = str(len(request.body))
            del environ["HTTP_TRANSFER_ENCODING"]
    try:
        _run(worker, connection, response, environ)
    except (ClientGone, ConnectionError):
        raise ClientGone from None
    except Exception:
        worker.log.exception("The application failed.")
        if response.headers_sent:
            raise ClientGone from None  # a response that breaks off must not look complete
        raise INTERNAL_ERROR from None
    return not response.should_close()


def _parse(cfg: Any, connection: Connection, request: WholeRequest | BegunRequest) -> Any:
    """Parse the head; what the parser makes of the framing must be what the scanner made of it."""
    try:
        parsed = next(get_parser(cfg, [request.head], connection.client))
    except errors.ParseException as error:
        for kind, refusal in _REFUSALS:
            if isinstance(error, kind):
                raise refusal from None
        raise malformed("The head of the request is not valid HTTP/1.1.") from None
    except (StopIteration, errors.NoMoreData):
        raise malformed("The head of the request is not complete.") from None
    reader = parsed.body.reader
    length = _length(request)
    agreed = (
        isinstance(reader, ChunkedReader)
        if length is None
        else isinstance(reader, LengthReader) and reader.length == length
    )
    if not agreed or parsed.unreader.take_buffered():
        raise malformed("The end of the request is not clear.")
    parsed.scheme = "https" if connection.tls else "http"
    parsed._expected_100_continue = False  # answered already, before the body was read
    return parsed


def _length(request: WholeRequest | BegunRequest) -> int | None:
    """How long the head says that the body is; ``None`` for one in chunks."""
    if isinstance(request, BegunRequest):
        return request.coming.length if isinstance(request.coming, CountedBody) else None
    return None if request.chunked else len(request.body)


def _run(worker: Any, connection: Connection, response: Any, environ: dict[str, Any]) -> None:
    """Call the application (PEP 3333) and send what it yields, each piece at once."""
    pieces = worker.wsgi(environ, response.start_response)
    connection.when_done = environ.get("portal.when_done")
    if connection.when_done is not None:
        response.force_close()
    try:
        for piece in pieces:
            _send(connection, worker.settings.request_timeout)
            if not worker.alive:
                response.force_close()
            response.write(piece)
        response.close()
    finally:
        if hasattr(pieces, "close"):
            pieces.close()
    _send(connection, None)


def _send(connection: Connection, patience: float | None) -> None:
    """Send what is queued; with ``patience``, in seconds, not more than a little is left unsent afterwards."""
    try:
        connection.flush()
        if patience is not None:
            connection.wait_for_room(patience)
    except OSError:
        raise ClientGone from None
