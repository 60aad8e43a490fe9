"""Takes the body of a request off a buffer, without its transfer coding."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Protocol

from web.serving_refusals import RequestRefused, malformed

CHUNK_LINE_LIMIT = 256  # bytes of a chunk-size line
CHUNK_OVERHEAD = 64 * 1024  # bytes of chunk framing that are free; beyond it, a quarter of the body

_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~]*)?")


class Body(Protocol):
    """A body on its way in: ``data`` is what has been taken of it, and may be emptied at any time."""

    data: bytearray

    @property
    def whole(self) -> bool:
        """Whether all of it has been taken."""

    def take(self, buffer: bytearray) -> bool:
        """Move what has arrived from ``buffer`` to ``data``; returns whether that was the end.

        Raises ``RequestRefused``.
        """


class CountedBody:
    """A body whose length the head has said."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.data = bytearray()
        self._left = length

    @property
    def whole(self) -> bool:
        """Whether all of it has been taken."""
        return not self._left

    def take(self, buffer: bytearray) -> bool:
        """Move what has arrived of it; see ``Body``."""
        part = buffer[: self._left]
        self.data += part
        self._left -= len(part)
        del buffer[: len(part)]
        return self.whole


class ChunkedBody:
    """A body in chunks (RFC 9112 section 7.1) of at most ``limit`` bytes together; trailers are refused."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.whole = False
        self._limit = limit
        self._begun = 0  # bytes of data in the chunks that have begun
        self._left = 0  # bytes of the present chunk, with the CRLF after it
        self._overhead = 0

    def take(self, buffer: bytearray) -> bool:
        """Move the data of the chunks that have arrived; see ``Body``."""
        position, more = 0, True
        while more:
            if self._left:
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
            self._overhead += end + 4 - position
            wasteful = self._overhead > CHUNK_OVERHEAD + self._begun // 4
            self._begun += size
            if wasteful or self._begun > self._limit:
                raise body_too_large(self._limit)
            self._left = size + 2
            position = end + 2
        del buffer[:position]
        return False

    def _take_data(self, buffer: bytearray, position: int) -> tuple[int, bool]:
        """Take what is there of a chunk's data with its CRLF; returns where it ends and whether the chunk is whole."""
        if self._left > 2:
            data = buffer[position : position + self._left - 2]
            self.data += data
            self._left -= len(data)
            position += len(data)
        if self._left > 2 or len(buffer) < position + 2:
            return position, False
        if buffer[position : position + 2] != b"\r\n":
            raise malformed("A chunk of the body is longer than its size says.")
        self._left = 0
        return position + 2, True

    def _take_end(self, buffer: bytearray, line: int, position: int) -> bool:
        if len(buffer) < position + 2:
            del buffer[:line]  # the line of the last chunk stays, to be read again
            return False
        if buffer[position : position + 2] != b"\r\n":
            raise malformed("Trailer fields after a chunked body are not read.")
        del buffer[: position + 2]
        self.whole = True
        return True


def body_too_large(limit: int) -> RequestRefused:
    """A body beyond its limit, in bytes."""
    return RequestRefused(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body_too_large",
        f"The body of a request must not be longer than {limit} bytes.",
    )
