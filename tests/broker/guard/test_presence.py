"""What the guard reports of who is connected, read message by message, and what is refused of it."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from broker.control import PresenceReport
from broker.guard.presence import CHANGES_TOPIC, MORE_TOPIC, WHOLE_TOPIC, GuardReports, ReportReader
from broker.session import MAX_MESSAGE_BYTES, Session

ONE, TWO = "3f2b8c1e-9d4a-4e6b-8a57-1c0d2e3f4a5b", "an-application_2.x"
BEGIN, END = {"epoch": 7, "seq": 9, "begin": True}, {"end": True}
EMPTY = (BEGIN, END)


def at(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def lines(*said: object) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in said)


def read(*messages: tuple[str, bytes]) -> list[PresenceReport]:
    reader = ReportReader()
    return [report for topic, payload in messages for report in reader.read(topic, payload)]


# --- Messages ------------------------------------------------------------------------------------------------------


def test_the_whole_set_is_one_report_however_many_messages_it_has() -> None:
    reports = read(
        (WHOLE_TOPIC, lines(BEGIN, {"connected": [[ONE, 100]]})), (WHOLE_TOPIC, lines({"connected": [[TWO, 7]]}, END))
    )
    assert reports == [PresenceReport(connected={ONE: at(100), TWO: at(7)}, disconnected={}, is_whole=True)]
    assert read((WHOLE_TOPIC, lines(BEGIN, {"connected": []}, END)))[0].connected == {}


def test_changes_follow_of_which_one_kind_may_be_missing() -> None:
    changes = lines({"connected": [[ONE, 5]], "disconnected": [[TWO, 6]]}, {"disconnected": [[ONE, 7]]})
    _, first, second = read((WHOLE_TOPIC, lines(*EMPTY)), (CHANGES_TOPIC, changes))
    assert first == PresenceReport(connected={ONE: at(5)}, disconnected={TWO: at(6)}, is_whole=False)
    assert second == PresenceReport(connected={}, disconnected={ONE: at(7)}, is_whole=False)


WRONG: dict[str, list[tuple[str, bytes]]] = {
    "another topic": [("portal/guard/other", lines(*EMPTY))],
    "torn": [(WHOLE_TOPIC, lines(BEGIN, {"connected": [[ONE, 5]]})[:-9])],
    "not UTF-8": [(WHOLE_TOPIC, b'{"begin":"\xff"}')],
    "nested deeply": [(WHOLE_TOPIC, b"[" * 100_000)],
    "a number with too many digits": [(WHOLE_TOPIC, b'{"connected":[["x",' + b"1" * 9999 + b"]]}")],
    "no object": [(WHOLE_TOPIC, lines([BEGIN]))],
    "no begin": [(WHOLE_TOPIC, lines({"connected": [[ONE, 5]]}, END))],
    "two begins": [(WHOLE_TOPIC, lines(BEGIN, BEGIN))],
    "a second whole set": [(WHOLE_TOPIC, lines(*EMPTY, *EMPTY))],
    "changes before the whole set": [(CHANGES_TOPIC, lines({"connected": [[ONE, 5]]}))],
    "changes within the whole set": [(WHOLE_TOPIC, lines(BEGIN)), (CHANGES_TOPIC, lines({"connected": [[ONE, 5]]}))],
    "an unknown word": [(WHOLE_TOPIC, lines(*EMPTY)), (CHANGES_TOPIC, lines({"connected": [], "left": []}))],
}
ENTRIES: dict[str, Any] = {
    "no list": {ONE: 5},
    "no pair": [[ONE]],
    "no identity": [["a b", 5]],
    "a long identity": [["x" * 65, 5]],
    "an empty identity": [["", 5]],
    "an identity that is a number": [[5, 5]],
    "no time": [[ONE, "5"]],
    "a time with a fraction": [[ONE, 5.5]],
    "a time before 1970": [[ONE, -1]],
    "a time that no calendar has": [[ONE, 253402300800]],
    "a truth value for a time": [[ONE, True]],
}


@pytest.mark.parametrize("messages", WRONG.values(), ids=WRONG)
def test_a_message_out_of_order_or_torn_ends_the_reports(messages: list[tuple[str, bytes]]) -> None:
    with pytest.raises(ConnectionError):
        read(*messages)


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("word", ["connected", "disconnected"])
def test_an_entry_that_is_no_identity_with_a_time_ends_the_reports(word: str, entries: object) -> None:
    with pytest.raises(ConnectionError):
        read((WHOLE_TOPIC, lines(*EMPTY)), (CHANGES_TOPIC, lines({word: entries})))


# --- Packets -------------------------------------------------------------------------------------------------------


def length_of(count: int) -> bytes:
    encoded = b""
    while True:
        count, low = divmod(count, 128)
        encoded += bytes([low | (0x80 if count else 0)])
        if not count:
            return encoded


def packet(topic: str, payload: bytes, packet_id: int = 1) -> bytes:
    """A PUBLISH with QoS 1 and no properties."""
    name = topic.encode()
    body = struct.pack(">H", len(name)) + name + struct.pack(">H", packet_id) + b"\0" + payload
    return b"\x32" + length_of(len(body)) + body


@contextmanager
def broker_that(sends: Callable[[socket.socket], object]) -> Iterator[tuple[GuardReports, list[bytes]]]:
    """A broker that sends something after PINGREQ, and what it got afterwards."""
    ours, theirs = socket.socketpair()
    got: list[bytes] = []

    def serve() -> None:
        assert theirs.recv(2) == b"\xc0\x00"
        sends(theirs)
        with contextlib.suppress(ConnectionError):
            while chunk := theirs.recv(4096):
                got.append(chunk)

    thread = threading.Thread(target=serve)
    thread.start()
    reports = GuardReports(Session(ours, 0.0))
    try:
        yield reports, got
    finally:
        reports.close()
        thread.join()
        theirs.close()


def soon() -> float:
    return time.monotonic() + 10


def test_a_message_of_200_kb_is_read_and_acknowledged() -> None:
    many = [[f"{number:064}", number] for number in range(2600)]
    payload = lines(BEGIN, {"connected": many}, END)
    assert len(payload) > 190_000

    def send(sock: socket.socket) -> None:
        sock.sendall(packet(WHOLE_TOPIC, payload, packet_id=77) + b"\xd0\x00")

    with broker_that(send) as (reports, got):
        before = reports.is_incomplete
        [report] = reports.receive(soon())
        assert len(report.connected) == 2600
        assert (before, reports.is_incomplete) == (True, False)
    assert b"".join(got) == b"\x40\x02" + struct.pack(">H", 77) + b"\xe0\x00"


def test_the_next_part_of_the_whole_set_is_asked_for() -> None:
    first, last = {"connected": [["one", 1]]}, {"connected": [["two", 2]]}

    def send(sock: socket.socket) -> None:
        sock.sendall(packet(WHOLE_TOPIC, lines(BEGIN, first, {"more": True})) + b"\xd0\x00")
        asked = b""
        while not asked.endswith(b"\xc0\x00"):
            asked += sock.recv(4096)
        assert MORE_TOPIC.encode() in asked
        sock.sendall(b"\x40\x03\x00\x01\x00" + packet(WHOLE_TOPIC, lines(last, END)) + b"\xd0\x00")

    with broker_that(send) as (reports, _):
        assert list(reports.receive(soon())) == []
        assert reports.is_incomplete
        [report] = reports.receive(soon())
        assert sorted(report.connected) == ["one", "two"]


def test_a_guard_that_has_no_next_part_ends_the_reports() -> None:
    def send(sock: socket.socket) -> None:
        sock.sendall(packet(WHOLE_TOPIC, lines(BEGIN, {"more": True})) + b"\xd0\x00")
        sock.sendall(b"\x40\x03\x00\x01\x87\xd0\x00")

    with broker_that(send) as (reports, _):
        assert list(reports.receive(soon())) == []
        with pytest.raises(ConnectionError):
            list(reports.receive(soon()))


BROKEN = {
    "longer than any": packet(WHOLE_TOPIC, b" " * MAX_MESSAGE_BYTES)[:9],
    "of QoS 0": b"\x30" + packet(WHOLE_TOPIC, lines(*EMPTY))[1:],
    "another packet": b"\x90\x03\x00\x01\x00",
    "without its topic": b"\x32\x02\xff\xff",
    "without an end of its properties": b"\x32\x06\x00\x00\x00\x01\x80\x80",
    "with properties that are longer than it": b"\x32\x05\x00\x00\x00\x01\x7f",
    "with a topic that is not UTF-8": b"\x32\x06\x00\x01\xff\x00\x01\x00",
    "DISCONNECT": b"\xe0\x01\x8b",
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_a_packet_that_is_not_a_message_ends_the_reports(sent: bytes) -> None:
    with broker_that(lambda sock: sock.sendall(sent)) as (reports, _), pytest.raises(ConnectionError):
        list(reports.receive(soon()))


def test_a_broker_that_stops_in_the_middle_of_a_packet_is_not_waited_for_longer_than_said() -> None:
    with broker_that(lambda sock: sock.sendall(b"\x32\xff\x01abc")) as (reports, _), pytest.raises(TimeoutError):
        list(reports.receive(time.monotonic() + 0.2))
