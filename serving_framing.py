"""Finds where an HTTP/1.1 request ends in a stream of bytes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from http import HTTPStatus

HEAD_LIMIT = 16 * 1024  # bytes of request line and headers together
CHUNK_LINE_LIMIT = 256  # bytes of a chunk-size line
CHUNK_OVERHEAD = 64 * 1024  # bytes of chunk framing that are free; beyond it, a quarter of the body

# Only what decides where the request ends, or who it is for, is read here; the HTTP parser checks the rest of the head.
_FRAMING_HEADER = re.compile(
    rb"\r\n(content-length|transfer-encoding|expect|host)([ \t]*):[ \t]*([^\r\n]*)", re.IGNORECASE
)
# Line ends other than CRLF are where parsers disagree (RFC 9112 section 2.2), so are other control characters.
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n")
_REQUEST_LINE = re.compile(rb"[^ \r\n]+ ([^ \r\n]+) HTTP/1\.([01])\r\n")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~]*)?")


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


@dataclass(frozen=True, slots=True)
class WholeRequest:
    """The head as it came, with its closing empty line, and the body without transfer coding."""

    head: bytes
    body: bytes
    chunked: bool


class RequestScanner:
    """Takes whole requests off the front of a buffer; one scanner serves a connection for its life.

    It is stricter than the HTTP parser that reads the head after it: whatever could be framed in two ways
    (RFC 9112 sections 6.1 and 11.2) is refused, and the connection with it. The work is proportional to
    the bytes that are new, whatever the pieces they arrive in.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body = max_body_bytes
        self._body = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._head: bytes | None = None
        self._searched = 0
        self._length: int | None = None  # None: chunked
        self._chunk_left = 0
        self._chunk_overhead = 0
        self._body = bytearray()
        self.wants_continue = False

    @property
    def held(self) -> int:
        """Bytes of an unfinished request that are kept here."""
        return len(self._body)

    @property
    def started(self) -> bool:
        """Whether the head of an unfinished request has been taken."""
        return self._head is not None

    def take(self, buffer: bytearray) -> WholeRequest | None:
        """Remove the first request from ``buffer`` if it is whole; raises ``RequestRefused``."""
        if self._head is None and not self._take_head(buffer):
            return None
        if self._length is None:
            if not self._take_chunks(buffer):
                return None
            body, chunked = bytes(self._body), True
        else:
            if len(buffer) < self._length:
                return None
            body, chunked = bytes(buffer[: self._length]), False
            del buffer[: self._length]
        head = self._head or b""
        self._reset()
        return WholeRequest(head, body, chunked)

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
        fields: dict[bytes, bytes] = {}
        for name, space, value in _FRAMING_HEADER.findall(head):
            if space or name.lower() in fields:
                raise malformed(f"The header {name.decode()} may stand only once, with no space before its colon.")
            fields[name.lower()] = value.strip(b" \t")
        if modern and b"host" not in fields:
            raise malformed("A request in HTTP/1.1 needs a Host header.")  # RFC 9112 section 3.2
        coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
        if coding is None:
            self._length = self._checked_length(b"0" if length is None else length)
        elif length is not None:
            raise malformed("A request may have Content-Length or Transfer-Encoding, not both.")
        elif coding.lower() != b"chunked" or not modern:
            raise malformed("The only transfer coding that is read is chunked, in HTTP/1.1.")
        else:
            self._length = None
        expected = fields.get(b"expect", b"").lower() == b"100-continue"
        self.wants_continue = expected and modern and self._length != 0

    def _checked_length(self, value: bytes) -> int:
        if not value.isdigit() or len(value) > 18:
            raise malformed("Content-Length must be a number of bytes in decimal digits.")
        length = int(value)
        if length > self._max_body:
            raise self._too_large()
        return length

    def _too_large(self) -> RequestRefused:
        return RequestRefused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "body_too_large",
            f"The body of a request must not be longer than {self._max_body} bytes.",
        )

    def _take_chunks(self, buffer: bytearray) -> bool:
        """Move the chunks that have arrived into the body (RFC 9112 section 7.1); trailers are refused."""
        position, more = 0, True
        while more:
            if self._chunk_left:
                position, more = self._take_data(buffer, position)
                continue
            end = buffer.find(b"\r\n", position, position + CHUNK_LINE_LIMIT)
            if end < 0:
                if len(buffer) - position >= CHUNK_LINE_LIMIT:
                    raise malformed("The size line of a chunk is too long.")
                break
            line = _CHUNK_LINE.fullmatch(buffer, position, end)
            if line is None:
                raise malformed("A chunk of the body does not begin with its size in hexadecimal digits.")
            size = int(line[1], 16)
            if not size:
                return self._take_end(buffer, position, end + 2)
            self._chunk_overhead += end + 4 - position
            wasteful = self._chunk_overhead > CHUNK_OVERHEAD + len(self._body) // 4
            if wasteful or len(self._body) + size > self._max_body:
                raise self._too_large()
            self._chunk_left = size + 2
            position = end + 2
        del buffer[:position]
        return False

    def _take_data(self, buffer: bytearray, position: int) -> tuple[int, bool]:
        """Take what is there of a chunk's data with its CRLF; returns where it ends and whether the chunk is whole."""
        if self._chunk_left > 2:
            data = buffer[position : position + self._chunk_left - 2]
            self._body += data
            self._chunk_left -= len(data)
            position += len(data)
        if self._chunk_left > 2 or len(buffer) < position + 2:
            return position, False
        if buffer[position : position + 2] != b"\r\n":
            raise malformed("A chunk of the body is longer than its size says.")
        self._chunk_left = 0
        return position + 2, True

    @staticmethod
    def _take_end(buffer: bytearray, line: int, position: int) -> bool:
        if len(buffer) < position + 2:
            del buffer[:line]  # the line of the last chunk stays, to be read again
            return False
        if buffer[position : position + 2] != b"\r\n":
            raise malformed("Trailer fields after a chunked body are not read.")
        del buffer[: position + 2]
        return True
