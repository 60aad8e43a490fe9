"""Talks to the running broker: a minimal MQTT client, which on the internal listener of a Mosquitto is the portal."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from config import Settings
from core.errors import BrokerUnavailable

PORTAL_USER = "portal"  # the portal on the broker's internal listener

SUCCESS = 0x00
FAILURE = 0x80  # reason codes from here on are failures (MQTT 5.0 section 2.4)
NOT_AUTHORISED = 0x87
MAX_INCOMING_BYTES = 4096  # the longest packet that is read; the expected answers are much shorter
MAX_MESSAGE_BYTES = 1 << 18  # the longest packet with a message that is read; the guard's messages have up to 200 KB
_CONNECT, _CONNACK, _PUBLISH, _PUBLISH_QOS1, _PUBACK, _DISCONNECT = 0x10, 0x20, 0x30, 0x32, 0x40, 0xE0
_SUBSCRIBE, _SUBACK, _PINGREQ, _PINGRESP = 0x82, 0x90, 0xC0, 0xD0


def remaining(deadline: float) -> float:
    """Return the seconds until ``deadline`` (of ``time.monotonic``); raise ``TimeoutError`` if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("no answer in time")
    return seconds


def connect_unix(path: Path, deadline: float) -> socket.socket:
    """Connect to a unix socket; raise ``OSError``, and ``TimeoutError`` if its queue stays full."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        while True:
            sock.settimeout(remaining(deadline))
            try:
                sock.connect(str(path))
            except BlockingIOError:  # the listener's queue is full, and the kernel does not wait
                time.sleep(0.002)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


class SessionClosed(ConnectionError):
    """The broker has closed the connection, and over TLS said so."""


class Session:
    """One MQTT 5 session (OASIS MQTT 5.0), with clean start and no expiry, so nothing of it is kept by the broker.

    With ``level`` 4 it is one of MQTT 3.1.1, which can only ``connect`` and ``publish``: a message that is refused
    ends it by ``SessionClosed``.

    Every wait ends at ``deadline`` (of ``time.monotonic``). All failures are ``OSError``: ``TimeoutError`` at the
    deadline, ``ConnectionError`` if the broker closes or breaks the protocol, ``ssl.SSLError`` from TLS. As a
    context manager it sends DISCONNECT and closes the socket.
    """

    def __init__(self, sock: socket.socket, deadline: float, *, level: int = 5) -> None:
        self._socket = sock
        self._deadline = deadline
        self._level = level
        self._properties = b"\x00" if level == 5 else b""
        self._packet_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def process(self) -> int:
        """The process at the other end of a unix socket, 0 if it is not visible here."""
        return peer_process(self._socket)

    def connect(self, client_id: str, username: str = "", password: str = "") -> int:
        """Open the session; return the reason code of CONNACK."""
        self.send_connect(client_id, username, password)
        return self.receive_connack()

    def send_connect(self, client_id: str, username: str = "", password: str = "") -> None:
        """Send CONNECT (section 3.1) without waiting for its answer."""
        flags = 0x02 | (0x80 if username else 0) | (0x40 if password else 0)
        body = _text("MQTT") + bytes([self._level, flags]) + struct.pack(">H", 60) + self._properties
        body += _text(client_id)
        body += b"".join(_text(part) for part in (username, password) if part)
        self._send(_CONNECT, body)

    def receive_connack(self) -> int:
        """Wait for CONNACK (section 3.2); return its reason code."""
        return self._receive(_CONNACK, shortest=2)[1]

    def publish(self, topic: str, payload: bytes = b"") -> int:
        """Publish with QoS 1 (section 3.3); return the reason code of PUBACK, 0x87 if the ACL refuses it."""
        return self.receive_puback(self.send_publish(topic, payload))

    def send_publish(self, topic: str, payload: bytes = b"") -> bytes:
        """Send PUBLISH without waiting for its answer, at most 20 times at once; return the packet identifier."""
        packet_id = self._next_packet_id()
        self._send(_PUBLISH_QOS1, _text(topic) + packet_id + self._properties + payload)
        return packet_id

    def retained(self, topic: str, then: str) -> bytes | None:
        """Return the retained message of a topic, ``None`` if there is none, or none that may be read.

        Subscribe, then publish on ``then``: the broker sends the message before it answers that.
        """
        self.send_subscribe(topic)
        self.send_publish(then)
        message = None
        while (packet := self._receive_packet(MAX_INCOMING_BYTES))[0] != _PUBACK:
            kind, body = packet
            if kind & 0xF0 == _PUBLISH and len(body) > 2:
                (length,) = struct.unpack_from(">H", body)
                properties = body[2 + length] if len(body) > 2 + length else 0  # their length: under 128 bytes
                message = body[3 + length + properties :]
            elif kind != _SUBACK:
                raise ConnectionError("the broker sent another packet than expected")
        return message

    def receive_puback(self, packet_id: bytes) -> int:
        """Wait for PUBACK (section 3.4) of the message sent first; return its reason code."""
        body = self._receive(_PUBACK, shortest=2)
        if body[:2] != packet_id:
            raise ConnectionError("the broker acknowledged a message that was not sent")
        return body[2] if len(body) > 2 else SUCCESS

    def extend(self, deadline: float) -> None:
        """Let every wait from now on end at ``deadline``, for a session that lasts."""
        self._deadline = deadline

    def receive_messages(self) -> Iterator[tuple[str, bytes]]:
        """Yield topic and payload of each message that was sent to this session, and of those that come meanwhile.

        Each has QoS 1 and is acknowledged (section 3.4). A message of this session's own that was sent before must have
        been taken: one that is refused raises ``ConnectionError``. The broker is pinged (section 3.12), which also
        shows that it is there: with its answer everything that it sent before has been received.
        """
        self._send(_PINGREQ, b"")
        while True:
            kind, body = self._receive_packet(MAX_MESSAGE_BYTES)
            if kind == _PINGRESP:
                return
            if kind == _PUBACK and len(body) > 1 and (len(body) == 2 or body[2] < FAILURE):
                continue
            if kind & 0xF6 != _PUBLISH_QOS1:
                raise ConnectionError("the broker sent another packet than expected")
            topic, packet_id, payload = _message(body)
            self._send(_PUBACK, packet_id)
            yield topic, payload

    def send_subscribe(self, topic_filter: str) -> None:
        """Send SUBSCRIBE with QoS 0 (section 3.8) without waiting for its answer."""
        self._send(_SUBSCRIBE, self._next_packet_id() + b"\x00" + _text(topic_filter) + b"\x00")

    def receive_suback(self) -> int:
        """Wait for SUBACK (section 3.9) of one filter; return its reason code."""
        return self._receive(_SUBACK, shortest=4)[-1]

    def close(self) -> None:
        """Send DISCONNECT if possible, then close the socket; raise nothing."""
        with contextlib.suppress(OSError):
            self._send(_DISCONNECT, b"")
        with contextlib.suppress(OSError):
            self._socket.close()

    def _send(self, kind: int, body: bytes) -> None:
        self._socket.settimeout(remaining(self._deadline))
        self._socket.sendall(bytes([kind]) + _variable_length(len(body)) + body)

    def _next_packet_id(self) -> bytes:
        self._packet_id = self._packet_id % 0xFFFF + 1
        return struct.pack(">H", self._packet_id)

    def _receive(self, expected: int, *, shortest: int) -> bytes:
        kind, body = self._receive_packet(MAX_INCOMING_BYTES)
        if kind != expected or len(body) < shortest:
            raise ConnectionError("the broker sent another packet than expected")
        return body

    def _receive_packet(self, max_bytes: int) -> tuple[int, bytes]:
        """Return the first byte and the body of the next packet (section 2.1), which is not DISCONNECT."""
        kind = self._exactly(1)[0]
        length, shift = 0, 0
        while True:
            byte = self._exactly(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 21:
                raise ConnectionError("the broker sent a malformed packet length")
        if length > max_bytes:
            raise ConnectionError("the broker sent a longer packet than expected")
        body = self._exactly(length)
        if kind == _DISCONNECT:
            raise ConnectionError(f"the broker closed the session with reason 0x{body[0] if body else 0:02x}")
        return kind, body

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            self._socket.settimeout(remaining(self._deadline))
            chunk = self._socket.recv(count - len(data))
            if not chunk:
                raise SessionClosed("the broker closed the connection")
            data += chunk
        return data


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">H", len(data)) + data


def _message(body: bytes) -> tuple[str, bytes, bytes]:
    """Return topic, packet identifier and payload of a PUBLISH with QoS 1 (section 3.3)."""
    try:
        (length,) = struct.unpack_from(">H", body)
        topic, packet_id = body[2 : 2 + length].decode(), body[2 + length : 4 + length]
        properties, start, shift = 0, 4 + length, 0
        while True:
            byte = body[start]
            properties |= (byte & 0x7F) << shift
            start, shift = start + 1, shift + 7
            if byte < 0x80:
                break
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ConnectionError("the broker sent a malformed message") from error
    if shift > 28 or start + properties > len(body):
        raise ConnectionError("the broker sent a malformed message")
    return topic, packet_id, body[start + properties :]


def _variable_length(length: int) -> bytes:
    """Encode a length as MQTT does (section 1.5.5): 7 bits a byte, the low ones first."""
    encoded = bytearray()
    while True:
        length, low = divmod(length, 128)
        encoded.append(low | (0x80 if length else 0))
        if not length:
            return bytes(encoded)


def peer_process(sock: socket.socket) -> int:
    """Return the process id of the listener at the other end of a unix socket, 0 if it is not visible here."""
    pid, _uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


def client_id() -> str:
    """Return a client id for a session of the portal's own."""
    return f"portal-{os.getpid()}-{secrets.token_hex(4)}"


def unavailable(settings: Settings, error: OSError) -> BrokerUnavailable:
    """Return the error that says why the internal listener could not be used."""
    said = error.strerror or str(error) or type(error).__name__
    return BrokerUnavailable(
        f"The broker's internal listener {settings.broker_socket} does not answer: {said};"
        " check that the broker runs with the portal's configuration."
    )


def password_refused(reason: int) -> str:
    """Return the sentence that says why the portal cannot use the internal listener."""
    return (
        f"The broker refuses the portal on its internal listener with reason 0x{reason:02x}:"
        " password_file in its configuration must name the portal's file."
    )
