"""Uploads rows and reads the answers at the same time, over one connection."""

from __future__ import annotations

import http.client
import io
import json
import select
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from commands.client import ANSWER_MOST, ANSWER_SECONDS, CONNECT_SECONDS, Answer, Client
from commands.errors import ConnectionLost, Unreachable
from commands.settings import Settings

PATH = "/register/bulk"
CHUNK = 64 * 1024  # bytes that are sent as one chunk, and read at once
HEAD_MOST = 64 * 1024
LINE_MOST = 1 << 20

_LOST = "The connection broke before every row was answered."
_END = b"0\r\n\r\n"


class Upload:
    """One request: ``lines`` go out in chunks, answers come back in between.

    One thread does both: a client that sends everything before it reads would be stopped by the portal.
    """

    def __init__(self, settings: Settings, client: Client, *, version: str, seconds: float = ANSWER_SECONDS) -> None:
        self._settings = settings
        self._client = client
        self._version = version
        self._seconds = seconds

    def run(self, lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
        """Send the lines; yields each answer as it comes. Raises ``Refused``, ``ConnectionLost``, ``Unreachable``."""
        try:
            with self._connect() as sock:
                yield from self._exchange(sock, lines)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(_LOST) from error

    def _connect(self) -> socket.socket:
        parts = urlsplit(self._settings.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            sock = socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS)
        except OSError:
            raise Unreachable(f"The portal does not answer at {self._settings.url}.") from None
        if parts.scheme == "https":
            ca_file = self._settings.ca_file
            context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
            sock = context.wrap_socket(sock, server_hostname=parts.hostname)
        sock.setblocking(False)
        return sock

    def _head(self) -> bytes:
        parts = urlsplit(self._settings.url)
        return (
            f"POST {parts.path.rstrip('/')}{PATH} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Authorization: Bearer {self._settings.token}\r\nUser-Agent: portal-cli/{self._version}\r\n"
            "Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\nAccept-Encoding: identity\r\n\r\n"
        ).encode("latin-1")

    def _exchange(self, sock: socket.socket, lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
        out = memoryview(self._head())
        answer = _StreamedAnswer()
        more = True  # whether there is more to send
        while True:
            if not out and more and answer.goes_well:
                chunk = _chunk(lines)
                more = chunk != _END
                out = memoryview(chunk)
            wants_write = bool(out) and answer.goes_well
            _wait(sock, write=wants_write, seconds=self._seconds)
            if wants_write:
                out = _send(sock, out)
            data = _receive(sock)
            if data is not None:
                yield from answer.feed(data)
            if answer.ended:
                break
        if answer.status != 200:
            origin = self._settings.url
            raise self._client.refusal(Answer(answer.status, answer.headers, bytes(answer.body), origin))
        if not answer.complete:
            raise ConnectionLost(_LOST)


def _chunk(lines: Iterator[bytes]) -> bytes:
    """As many lines as go together, with their framing (RFC 9112 section 7.1); the end where there are no more."""
    part = bytearray()
    for line in lines:
        part += line
        if len(part) >= CHUNK:
            break
    return b"%x\r\n%b\r\n" % (len(part), bytes(part)) if part else _END


def _wait(sock: socket.socket, *, write: bool, seconds: float) -> None:
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return
    poller = select.poll()
    poller.register(sock, select.POLLIN | (select.POLLOUT if write else 0))
    if not poller.poll(seconds * 1000):
        raise ConnectionLost(f"The portal gave no answer in {seconds:.0f} seconds.")


def _send(sock: socket.socket, out: memoryview) -> memoryview:
    try:
        return out[sock.send(out[:CHUNK]) :]
    except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
        time.sleep(0)  # a retry must offer the same bytes, which it does
        return out
    except (BrokenPipeError, ConnectionResetError):
        return out[:0]  # it may have said why before it closed


def _receive(sock: socket.socket) -> bytes | None:
    """What has arrived, ``None`` where nothing has."""
    try:
        return sock.recv(CHUNK)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None


class _StreamedAnswer:
    """The response as far as it has come: lines of JSON of a good one, the body of another."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Any = {}
        self.body = bytearray()  # of an answer that is a refusal
        self.ended = False  # whether nothing more comes
        self.complete = False  # whether it ended as its framing says
        self._raw = bytearray()
        self._line = bytearray()
        self._left = 0  # bytes of the present chunk with its CRLF

    @property
    def goes_well(self) -> bool:
        """Whether it is worth sending on."""
        return self.status in (0, 200)

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Take what has arrived (nothing: the end); yields the answers that are complete with it."""
        self._raw += data
        if not data:
            self.ended = True
        if not self.status and not self._take_head():
            return
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = self._unchunk()
        else:
            body = bytes(self._raw)
            self._raw.clear()
        if self.status != 200:
            self.body += body
            length = self.headers.get("Content-Length", "")
            self.ended |= len(self.body) > ANSWER_MOST or (length.isdigit() and len(self.body) >= int(length))
            return
        self._line += body
        *lines, rest = self._line.split(b"\n")
        self._line = bytearray(rest)
        if len(rest) > LINE_MOST:
            raise Unreachable("A line of the answer is longer than any that the portal gives.")
        for line in lines:
            yield _answer(bytes(line))

    def _take_head(self) -> bool:
        while True:
            end = self._raw.find(b"\r\n\r\n")
            if end < 0:
                if len(self._raw) > HEAD_MOST:
                    raise http.client.HTTPException("the head of the answer is too long")
                return False
            first, _, fields = bytes(self._raw[: end + 4]).partition(b"\r\n")
            words = first.split()
            if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
                raise Unreachable("What answers is not the portal; check the URL.")
            del self._raw[: end + 4]
            if int(words[1]) >= 200:
                self.status = int(words[1])
                self.headers = http.client.parse_headers(io.BytesIO(fields))
                return True

    def _unchunk(self) -> bytes:
        parts = []
        while not self.complete:
            if self._left > 2:
                part = self._raw[: self._left - 2]
                parts.append(bytes(part))
                self._left -= len(part)
                del self._raw[: len(part)]
                if self._left > 2:
                    break
            if self._left:
                if len(self._raw) < self._left:
                    break
                del self._raw[: self._left]
                self._left = 0
            end = self._raw.find(b"\r\n")
            if end < 0:
                break
            size = int(bytes(self._raw[:end]).partition(b";")[0], 16)
            del self._raw[: end + 2]
            if not size:
                self.complete = self.ended = True
            else:
                self._left = size + 2
        return b"".join(parts)


def _answer(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("row"), int):
        raise Unreachable("A line of the answer is none that the portal gives; it may be of another version.")
    return values
