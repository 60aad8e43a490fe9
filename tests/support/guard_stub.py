"""Answers the portal on the broker's internal listener as a broker with the guard would, from the journal."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from broker.guard.control import GUARD_VERSION, NEWS_VERSION
from broker.guard.journal import read_position
from core.errors import ProjectionInvalid

YES, NO = 0x00, 0x87
_CONNECT, _PUBLISH, _SUBSCRIBE = 0x10, 0x30, 0x80


def journal_lines(path: Path) -> list[str]:
    """What the lines of a journal say, without numbers and checksums; the header first."""
    header, *lines = path.read_text().splitlines()
    return [header.rpartition(" ")[0], *(line.partition(" ")[2].rpartition(" ")[0] for line in lines)]


class GuardStub:
    """One thread for one session after the other.

    ``topics`` are those that were asked about, ``clients`` the ids of those that have connected, each of which ends the
    session that it had.
    """

    def __init__(self, path: Path, journal: Path) -> None:
        self.journal = journal
        self.topics: list[str] = []
        self.clients: list[str] = []
        self.versions = {*range(GUARD_VERSION, NEWS_VERSION + 1)}
        self.reports = True  # whether it knows that question
        self.loaded = True  # else everything is granted, as by a broker without a plugin and without an ACL
        self.epoch = 0  # the one in force
        self.resets = 0  # so many new connections it closes without reading all that came
        self.stopped = False  # whether it reads no more of the journal
        self._read = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(10)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError, struct.error, IndexError):
                if self.resets and sock.recv(1):
                    self.resets -= 1
                    continue
                while packet := _packet(sock):
                    kind, body = packet
                    if kind & 0xF0 == _CONNECT:
                        self.clients.append(_client_id(body))
                        sock.sendall(bytes([0x20, 3, 0, self._login(body), 0]))
                    elif kind & 0xF0 == _PUBLISH:
                        length = struct.unpack(">H", body[:2])[0]
                        topic = body[2 : 2 + length].decode()
                        self.topics.append(topic)
                        answer = self._answer(topic.split("/")[2:]) if self.loaded else YES
                        sock.sendall(bytes([0x40, 4]) + body[2 + length : 4 + length] + bytes([answer, 0]))
                    elif kind & 0xF0 == _SUBSCRIBE:
                        sock.sendall(bytes([0x90, 4]) + body[:2] + bytes([0, YES]))

    def _login(self, body: bytes) -> int:
        """The reason for CONNACK: the last field of CONNECT is the password."""
        for start in range(len(body) - 2, 0, -1):
            if struct.unpack(">H", body[start : start + 2])[0] == len(body) - start - 2:
                known = hashlib.sha256(body[start + 2 :]).hexdigest()
                if not self.loaded or f"portal {known}" in journal_lines(self.journal):
                    return YES
        return NO

    def _answer(self, asked: list[str]) -> int:
        match asked:
            case ["version", version]:
                return YES if int(version) in self.versions else NO
            case ["report"]:
                return YES if self.reports else NO
            case ["prove", epoch, seq]:
                return YES if self._follow() and self.epoch == int(epoch) and self._read >= int(seq) else NO
            case ["epoch", epoch]:
                position = read_position(self.journal, whole=True)
                if not self.stopped and position.epoch == int(epoch):
                    self.epoch, self._read = position.epoch, position.seq
                return YES if self.epoch == int(epoch) else NO
            case ["identify", identity]:
                said = [line for line in journal_lines(self.journal) if identity in line.split(" ")[1:2]]
                return YES if said and said[-1].startswith("allow") else NO
        return NO

    def _follow(self) -> bool:
        try:
            position = read_position(self.journal, whole=True)
        except ProjectionInvalid:
            return False
        self.epoch = self.epoch or position.epoch
        if not self.stopped and position.epoch == self.epoch:
            self._read = position.seq
        return True


def _client_id(body: bytes) -> str:
    """The first field of the payload, after 10 bytes and the properties (MQTT 5.0 section 3.1)."""
    start = 11 + body[10]
    (length,) = struct.unpack(">H", body[start : start + 2])
    return body[start + 2 : start + 2 + length].decode()


def _packet(sock: socket.socket) -> tuple[int, bytes] | None:
    """The next packet; the portal's are shorter than 16 KiB."""
    head = sock.recv(1)
    if not head:
        return None
    length, shift = 0, 0
    while True:
        byte = sock.recv(1)[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    body = b""
    while len(body) < length:
        body += sock.recv(length - len(body))
    return head[0], body
