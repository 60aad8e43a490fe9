"""A small MQTT client for tests that need what a library hides: reason codes, sessions, TLS sessions, silence."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

SECONDS = 10.0
CONNACK, PUBLISH, PUBACK, SUBACK, UNSUBACK, PINGRESP, DISCONNECT = 0x20, 0x30, 0x40, 0x90, 0xB0, 0xD0, 0xE0
NOT_AUTHORISED = 0x87


@dataclass(frozen=True)
class Message:
    topic: str
    payload: bytes


@dataclass(frozen=True)
class Will:
    topic: str
    payload: bytes
    delay: int = 0
    retain: bool = False


@dataclass(eq=False)
class MqttClient:
    """One connection, MQTT 5 unless ``version`` is 4 (MQTT 3.1.1); QoS 1 throughout.

    Messages that come while it waits for something else are kept in ``messages``.
    """

    socket: socket.socket
    version: int = 5
    messages: list[Message] = field(default_factory=list)
    session_present: bool = False
    seconds: float = SECONDS  # for each answer
    _packet_id: int = 0
    _incoming: bytes = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(
        self,
        client_id: str,
        *,
        clean: bool = True,
        expiry: int = 0,
        username: str | None = None,
        password: str | None = None,
        will: Will | None = None,
    ) -> int:
        """Send CONNECT; return the reason code of CONNACK (return code in MQTT 3.1.1)."""
        flags = (0x02 if clean else 0) | (0x80 if username is not None else 0) | (0x40 if password is not None else 0)
        if will:
            flags |= 0x2C if will.retain else 0x0C  # with QoS 1
        body = _text("MQTT") + bytes([self.version, flags]) + struct.pack(">H", 60)
        if self.version == 5:
            body += b"\x05\x11" + struct.pack(">I", expiry)
        body += _text(client_id)
        if will:
            if self.version == 5:
                body += b"\x05\x18" + struct.pack(">I", will.delay)
            body += _text(will.topic) + struct.pack(">H", len(will.payload)) + will.payload
        body += b"".join(_text(part) for part in (username, password) if part is not None)
        self._send(0x10, body)
        answer = self._wait_for(CONNACK)
        self.session_present = bool(answer[0] & 1)
        return answer[1]

    def publish(self, topic: str, payload: bytes = b"hello", *, retain: bool = False) -> int:
        """Publish with QoS 1; return the reason code of PUBACK, 0 in MQTT 3.1.1."""
        packet_id = self._next_id()
        properties = b"\x00" if self.version == 5 else b""
        self._send(0x32 | retain, _text(topic) + packet_id + properties + payload)
        answer = self._wait_for(PUBACK)
        assert answer[:2] == packet_id
        return answer[2] if len(answer) > 2 else 0

    def subscribe(self, filter_: str) -> int:
        """Subscribe with QoS 1; return the reason code of SUBACK."""
        return self.subscribe_all([filter_])[0]

    def subscribe_all(self, filters: Sequence[str]) -> bytes:
        """Subscribe to all in one packet with QoS 1; return the reason code of each."""
        properties = b"\x00" if self.version == 5 else b""
        asked = b"".join(_text(filter_) + b"\x01" for filter_ in filters)
        self._send(0x82, self._next_id() + properties + asked)
        return self._wait_for(SUBACK)[-len(filters) :]

    def unsubscribe(self, filter_: str) -> int:
        """Unsubscribe; return the reason code of UNSUBACK."""
        self._send(0xA2, self._next_id() + b"\x00" + _text(filter_))
        return self._wait_for(UNSUBACK)[-1]

    def ping(self) -> None:
        """Ask for an answer; all that was sent to the client before is in ``messages`` afterwards."""
        self._send(0xC0, b"")
        self._wait_for(PINGRESP)

    def receive(self) -> Message:
        """Return the next message, waiting for it."""
        deadline = time.monotonic() + self.seconds
        while not self.messages:
            self._read_packet(deadline)
        return self.messages.pop(0)

    def wait_until_cut(self) -> None:
        """Wait until the broker has closed the connection."""
        deadline = time.monotonic() + self.seconds
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while True:
                self._read_packet(deadline)

    def close(self) -> None:
        """Send DISCONNECT and close."""
        with contextlib.suppress(OSError):
            self._send(0xE0, b"")
        self.socket.close()

    def drop(self) -> None:
        """Close without DISCONNECT, as a broken network does."""
        self.socket.close()

    def _next_id(self) -> bytes:
        self._packet_id += 1
        return struct.pack(">H", self._packet_id)

    def send(self, kind: int, topic: str, rest: bytes) -> None:
        """Send a packet that begins with a text, and do not wait for an answer."""
        self.socket.sendall(pack(kind, topic, rest))

    def receive_puback(self) -> int:
        """Wait for PUBACK; return its reason code."""
        answer = self._wait_for(PUBACK)
        return answer[2] if len(answer) > 2 else 0

    def _send(self, kind: int, body: bytes) -> None:
        self.socket.settimeout(self.seconds)
        self.socket.sendall(bytes([kind]) + _variable_length(len(body)) + body)

    def _wait_for(self, kind: int) -> bytes:
        deadline = time.monotonic() + self.seconds
        while True:
            got, body = self._read_packet(deadline)
            if got == kind:
                return body
            assert got == PUBLISH, f"packet 0x{got:02x} in place of 0x{kind:02x}"

    def _read_packet(self, deadline: float) -> tuple[int, bytes]:
        first = self._exactly(1, deadline)[0]
        length, shift = 0, 0
        while True:
            byte = self._exactly(1, deadline)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        body = self._exactly(length, deadline)
        if first & 0xF0 == DISCONNECT:
            raise ConnectionError(f"the broker sent DISCONNECT with reason 0x{body[0] if body else 0:02x}")
        if first & 0xF0 == PUBLISH:
            self._take_message(first, body)
        return first & 0xF0, body

    def _take_message(self, first: int, body: bytes) -> None:
        (length,) = struct.unpack(">H", body[:2])
        topic, rest = body[2 : 2 + length].decode(), body[2 + length :]
        if first & 0x06:
            self._send(0x40, rest[:2])
            rest = rest[2:]
        if self.version == 5:
            assert rest[0] < 0x80
            rest = rest[1 + rest[0] :]
        self.messages.append(Message(topic, rest))

    def _exactly(self, count: int, deadline: float) -> bytes:
        while len(self._incoming) < count:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = self.socket.recv(65536)
            if not chunk:
                raise ConnectionError("the broker closed the connection")
            self._incoming += chunk
        data, self._incoming = self._incoming[:count], self._incoming[count:]
        return data


def _variable_length(length: int) -> bytes:
    encoded = bytearray()
    while True:
        length, low = divmod(length, 128)
        encoded.append(low | (0x80 if length else 0))
        if not length:
            return bytes(encoded)


def pack(kind: int, topic: str, rest: bytes) -> bytes:
    """Return a packet whose body is a text and ``rest``."""
    body = _text(topic) + rest
    return bytes([kind]) + _variable_length(len(body)) + body


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">H", len(data)) + data


def connect_socket(path: Path) -> socket.socket:
    """Connect to a unix socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SECONDS)
    sock.connect(str(path))
    return sock


def tls_context(ca: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """What a client needs: sessions that are made with one context can be resumed with it."""
    context = ssl.create_default_context(cafile=str(ca))
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def connect_tls(
    port: int,
    context: ssl.SSLContext,
    session: ssl.SSLSession | None = None,
    *,
    host: str = "localhost",
    seconds: float = SECONDS,
) -> ssl.SSLSocket:
    """Connect with TLS to localhost, at whatever address, resuming ``session`` if it is given."""
    sock = socket.create_connection((host, port), seconds)
    # Else CONNECT waits 40 ms for the broker's delayed ACK of the handshake.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(sock, server_hostname="localhost", session=session)
