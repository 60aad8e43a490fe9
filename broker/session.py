"""Talks to the running broker: a minimal MQTT 5 client, which on the internal listener is the portal."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
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
_CONNECT, _CONNACK, _PUBLISH_QOS1, _PUBACK, _DISCONNECT = 0x10, 0x20, 0x32, 0x40, 0xE0


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


class Session:
    """One MQTT 5 session (OASIS MQTT 5.0), with clean start and no expiry, so nothing of it is kept by the broker.

    Every wait ends at ``deadline`` (of ``time.monotonic``). All failures are ``OSError``: ``TimeoutError`` at the
    deadline, ``ConnectionError`` if the broker closes or breaks the protocol, ``ssl.SSLError`` from TLS. As a
    context manager it sends DISCONNECT and closes the socket.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket = sock
        self._deadline = deadline
        self._packet_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self, client_id: str, username: str = "", password: str = "") -> int:
        """Open the session; return the reason code of CONNACK."""
        self.send_connect(client_id, username, password)
        return self.receive_connack()

    def send_connect(self, client_id: str, username: str = "", password: str = "") -> None:
        """Send CONNECT (section 3.1) without waiting for its answer."""
        flags = 0x02 | (0x80 if username else 0) | (0x40 if password else 0)
        body = _text("MQTT") + bytes([5, flags]) + struct.pack(">H", 60) + b"\x00" + _text(client_id)
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
        self._packet_id = self._packet_id % 0xFFFF + 1
        packet_id = struct.pack(">H", self._packet_id)
        self._send(_PUBLISH_QOS1, _text(topic) + packet_id + b"\x00" + payload)
        return packet_id

    def receive_puback(self, packet_id: bytes) -> int:
        """Wait for PUBACK (section 3.4) of the message sent first; return its reason code."""
        body = self._receive(_PUBACK, shortest=2)
        if body[:2] != packet_id:
            raise ConnectionError("the broker acknowledged a message that was not sent")
        return body[2] if len(body) > 2 else SUCCESS

    def close(self) -> None:
        """Send DISCONNECT if possible, then close the socket; raise nothing."""
        with contextlib.suppress(OSError):
            self._send(_DISCONNECT, b"")
        with contextlib.suppress(OSError):
            self._socket.close()

    def _send(self, kind: int, body: bytes) -> None:
        self._socket.settimeout(remaining(self._deadline))
        self._socket.sendall(bytes([kind]) + _variable_length(len(body)) + body)

    def _receive(self, expected: int, *, shortest: int) -> bytes:
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
        if length > MAX_INCOMING_BYTES:
            raise ConnectionError("the broker sent a longer packet than expected")
        body = self._exactly(length)
        if kind == _DISCONNECT:
            raise ConnectionError(f"the broker closed the session with reason 0x{body[0] if body else 0:02x}")
        if kind != expected or length < shortest:
            raise ConnectionError("the broker sent another packet than expected")
        return body

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            self._socket.settimeout(remaining(self._deadline))
            chunk = self._socket.recv(count - len(data))
            if not chunk:
                raise ConnectionError("the broker closed the connection")
            data += chunk
        return data


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">H", len(data)) + data


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
