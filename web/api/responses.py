"""Turns what a handler replies into an HTTP response."""

from __future__ import annotations

from typing import Any

from flask import Response

from web.api.routing import Reply


def response_of(reply: Reply) -> Response:
    """A model becomes JSON; bytes, or an iterator of them, stay as they are."""
    content: Any = reply.content
    if reply.model is not None:
        content = reply.model.model_dump_json(exclude_none=reply.omit_none).encode()
    response = Response(content, status=reply.status)
    if reply.media_type:
        response.headers["Content-Type"] = reply.media_type
    else:
        response.headers.pop("Content-Type", None)
    response.headers.update(dict(reply.headers))
    return response
