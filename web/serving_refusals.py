"""What is answered to a request that the application never sees."""

from __future__ import annotations

import json
from http import HTTPStatus


class RequestRefused(Exception):
    """The request is not read any further: it is answered with ``status``, and the connection closed."""

    def __init__(self, status: HTTPStatus, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail

    def response(self, request_id: str) -> bytes:
        """The whole response, with a body as RFC 9457 has it."""
        problem = {
            "type": "about:blank",
            "title": self.status.phrase,
            "status": self.status.value,
            "detail": self.detail,
            "code": self.code,
        }
        body = json.dumps(problem).encode()
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\nConnection: close\r\n"
            f"Content-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n"
            f"Cache-Control: no-store\r\nX-Request-Id: {request_id}\r\n"
        )
        if self.status is HTTPStatus.SERVICE_UNAVAILABLE:
            head += "Retry-After: 1\r\n"
        return f"{head}\r\n".encode() + body


def malformed(detail: str) -> RequestRefused:
    """A request that no parser should have to interpret."""
    return RequestRefused(HTTPStatus.BAD_REQUEST, "malformed_request", detail)


def busy(detail: str) -> RequestRefused:
    """There is no room for this request now; its answer says when to try again."""
    return RequestRefused(HTTPStatus.SERVICE_UNAVAILABLE, "busy", detail)
