"""Finds where an HTTP/1.1 request ends in a stream of bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from web.serving_bodies import Body, ChunkedBody, CountedBody, body_too_large
from web.serving_refusals import RequestRefused, malformed

HEAD_LIMIT = 16 * 1024  # bytes of request line and headers together

# Only what decides where the request ends, or who it is for, is read here; the HTTP parser checks the rest of the head.
_FRAMING_HEADER = re.compile(
    rb"\r\n(content-length|transfer-encoding|expect|host)([ \t]*):[ \t]*([^\r\n]*)", re.IGNORECASE
)
# Line ends other than CRLF are where parsers disagree (RFC 9112 section 2.2), so are other control characters.
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n")
_REQUEST_LINE = re.compile(rb"([^ \r\n]+ (?=[^ \r\n])[^ ?\r\n]*)[^ \r\n]* HTTP/1\.([01])\r\n")


@dataclass(frozen=True, slots=True)
class WholeRequest:
    """The head as it came, with its closing empty line, and the body without transfer coding."""

    head: bytes
    body: bytes
    chunked: bool


@dataclass(frozen=True, slots=True)
class BegunRequest:
    """The head as it came; the body, which is read while the application works, is what ``coming`` takes."""

    head: bytes
    coming: Body
    expects_continue: bool

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return isinstance(self.coming, ChunkedBody)


class RequestScanner:
    """Takes whole requests off the front of a buffer; one scanner serves a connection for its life.

    It is stricter than the HTTP parser that reads the head after it: whatever could be framed in two ways
    (RFC 9112 sections 6.1 and 11.2) is refused, and the connection with it. The work is proportional to
    the bytes that are new, whatever the pieces they arrive in.

    ``streamed`` names the routes, as ``POST /path``, whose bodies are not waited for, each with its limit in bytes.
    """

    def __init__(self, max_body_bytes: int, streamed: Mapping[bytes, int] | None = None) -> None:
        self._max_body = max_body_bytes
        self._streamed = streamed or {}
        self._reset()

    def _reset(self) -> None:
        self._head: bytes | None = None
        self._searched = 0
        self._body: Body = CountedBody(0)
        self._streams = False
        self.wants_continue = False

    @property
    def held(self) -> int:
        """Bytes of an unfinished request that are kept here."""
        return len(self._body.data)

    @property
    def started(self) -> bool:
        """Whether the head of an unfinished request has been taken."""
        return self._head is not None

    def take(self, buffer: bytearray) -> WholeRequest | BegunRequest | None:
        """Remove the first request from ``buffer`` if it is whole; raises ``RequestRefused``.

        Of a streamed one the head alone is removed, and nothing more may be taken after it.
        """
        if self._head is None and not self._take_head(buffer):
            return None
        head = self._head or b""
        request: WholeRequest | BegunRequest
        if self._streams:
            request = BegunRequest(head, self._body, self.wants_continue)
        elif self._body.take(buffer):
            request = WholeRequest(head, bytes(self._body.data), isinstance(self._body, ChunkedBody))
        else:
            return None
        self._reset()
        return request

    def _take_head(self, buffer: bytearray) -> bool:
        if buffer.startswith(b"\r\n") and not self._searched:
            del buffer[:2]  # one empty line before a request is forgiven: RFC 9112 section 2.2
        end = buffer.find(b"\r\n\r\n", self._searched, HEAD_LIMIT)
        if end < 0:
            if len(buffer) >= HEAD_LIMIT:
                raise RequestRefused(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                    "headers_too_large",
                    f"The request line and headers must fit in {HEAD_LIMIT} bytes.",
                )
            self._searched = max(0, len(buffer) - 3)
            return False
        head = bytes(buffer[: end + 4])
        self._read_head(head)
        del buffer[: end + 4]
        self._head = head
        return True

    def _read_head(self, head: bytes) -> None:
        if _FORBIDDEN.search(head):
            raise malformed("The head of the request holds a control character or a line that does not end with CRLF.")
        line = _REQUEST_LINE.match(head)
        if line is None:
            raise malformed("The request line must be a method, a target and HTTP/1.1, with one space between them.")
        modern = line[2] == b"1"
        self._streams = line[1] in self._streamed
        limit = self._streamed.get(line[1], self._max_body)
        fields: dict[bytes, bytes] = {}
        for name, space, value in _FRAMING_HEADER.findall(head):
            if space or name.lower() in fields:
                raise malformed(f"The header {name.decode()} may stand only once, with no space before its colon.")
            fields[name.lower()] = value.strip(b" \t")
        if modern and b"host" not in fields:
            raise malformed("A request in HTTP/1.1 needs a Host header.")  # RFC 9112 section 3.2
        coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
        if coding is None:
            self._body = CountedBody(_checked_length(b"0" if length is None else length, limit))
        elif length is not None:
            raise malformed("A request may have Content-Length or Transfer-Encoding, not both.")
        elif coding.lower() != b"chunked" or not modern:
            raise malformed("The only transfer coding that is read is chunked, in HTTP/1.1.")
        else:
            self._body = ChunkedBody(limit)
        expected = fields.get(b"expect", b"").lower() == b"100-continue"
        self.wants_continue = expected and modern and not self._body.whole


def _checked_length(value: bytes, limit: int) -> int:
    if not value.isdigit() or len(value) > 18:
        raise malformed("Content-Length must be a number of bytes in decimal digits.")
    length = int(value)
    if length > limit:
        raise body_too_large(limit)
    return length
