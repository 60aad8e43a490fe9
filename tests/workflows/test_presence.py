"""Who is connected, as the broker reports it: batches, whole sets after a restart of either side, and what is known."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import db
from broker.control import PresenceReport
from core.errors import BrokerUnavailable, DatabaseUnavailable
from core.states import BrokerKind, PresenceState
from operations.wiring import Portal
from store import brokers, tenants
from store.presences import PresenceRecord, presence_of
from tests.store.test_presences import rows_written
from tests.support.harness import ON_POSTGRESQL, ON_SQLITE, Clock
from tests.test_db import add_device
from workflows import connections
from workflows.connections import CONTACT_SECONDS, ContactFile, DeviceConnection
from workflows.presence import PresenceFollower

OWN = 1  # the broker beside the portal
UNKNOWN = DeviceConnection(None, None, None)
Times = Mapping[str, datetime]


@dataclass
class Reports:
    """Reports as a test has them."""

    waiting: list[PresenceReport | OSError] = field(default_factory=list)
    is_incomplete: bool = True
    closed: bool = False

    def receive(self, _deadline: float) -> Iterator[PresenceReport]:
        while self.waiting:
            report = self.waiting.pop(0)
            if isinstance(report, OSError):
                raise report
            self.is_incomplete &= not report.is_whole
            yield report

    def close(self) -> None:
        self.closed = True


@dataclass
class Broker:
    """A broker that reports; ``asked`` are the sessions that it reported to, the current one last."""

    connected: dict[str, datetime] = field(default_factory=dict)
    runs: bool = True
    asked: list[Reports] = field(default_factory=list)

    def follow_presence(self, _deadline: float) -> Reports:
        if not self.runs:
            raise BrokerUnavailable("The broker does not answer.")
        self.asked.append(Reports([PresenceReport(dict(self.connected), {}, is_whole=True)]))
        return self.asked[-1]

    def tell(self, connected: Times | None = None, disconnected: Times | None = None) -> None:
        self.connected |= connected or {}
        for identity in disconnected or {}:
            self.connected.pop(identity, None)
        self.asked[-1].waiting.append(PresenceReport(connected or {}, disconnected or {}, is_whole=False))

    def stop(self) -> None:
        self.runs = False
        self.connected.clear()
        self.asked[-1].waiting.append(ConnectionError("the broker closed the connection"))

    def start(self) -> None:
        self.runs = True


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def ids(portal: Portal, clock: Clock) -> list[str]:
    with portal.database.transaction() as tx:
        return [add_device(tx, created_at=clock()) for _ in range(3)]


@pytest.fixture
def follower(portal: Portal, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> PresenceFollower:
    """The follower of a process; ``another`` one is that of another process, or of this one after a restart."""
    monkeypatch.setattr(portal.broker, "follow_presence", broker.follow_presence)
    return portal.follower


def another(portal: Portal, broker_id: int = OWN) -> PresenceFollower:
    return PresenceFollower(portal.settings, portal.database, portal.broker, broker_id, portal.clock)


def shown(portal: Portal, device_id: str) -> DeviceConnection | None:
    return portal.inventory.device("default", device_id).connection


def recorded(portal: Portal, device_id: str) -> PresenceRecord | None:
    with portal.database.snapshot() as tx:
        return presence_of(tx, "default", device_id)


def test_connected_offline_and_never_seen_are_told_apart(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], clock: Clock
) -> None:
    one, two, never = ids
    start = clock()
    assert shown(portal, one) == UNKNOWN  # nobody has reported yet
    broker.connected = {one: start, two: start}
    follower.follow()
    broker.tell(disconnected={two: start + timedelta(seconds=5)})
    clock.advance(seconds=8)
    follower.follow()
    connection = shown(portal, one)
    assert connection is not None
    assert (connection.connected, connection.since) == (True, start)
    assert connection.last_seen is not None
    assert abs(connection.last_seen - clock()) < timedelta(seconds=1)
    ended = start + timedelta(seconds=5)
    assert shown(portal, two) == DeviceConnection(False, ended, ended)
    assert shown(portal, never) is None


def test_many_changes_are_one_transaction_and_no_change_is_none(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], clock: Clock
) -> None:
    with rows_written(portal) as changed:
        follower.follow()
        assert changed == []
        for second in range(5):  # comes and goes: only the last state counts
            broker.tell(connected={ids[0]: clock() + timedelta(seconds=second)})
            broker.tell(disconnected={ids[0]: clock() + timedelta(seconds=second)})
        broker.tell(connected={ids[1]: clock(), ids[2]: clock()})
        follower.follow()
        assert changed == [3]
        follower.follow()
        assert changed == [3]
    record = recorded(portal, ids[0])
    assert record is not None
    assert record.state is PresenceState.OFFLINE


def test_after_its_own_restart_the_portal_writes_only_what_has_changed_meanwhile(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], clock: Clock
) -> None:
    stays, left, came = ids
    start = clock()
    broker.connected = {stays: start, left: start}
    follower.follow()
    heard = portal.follower.contact.read().at
    clock.advance(seconds=60)
    broker.connected = {stays: start, came: clock()}
    with rows_written(portal) as changed:
        another(portal).follow()
    assert sum(changed) == 2
    connection = shown(portal, stays)
    assert connection is not None
    assert (connection.connected, connection.since) == (True, start)
    assert shown(portal, left) == DeviceConnection(False, heard, heard)  # nobody knows when after that
    connection = shown(portal, came)
    assert connection is not None
    assert connection.connected


def test_after_its_own_restart_the_portal_notices_that_a_device_of_another_tenant_has_left(
    portal: Portal, follower: PresenceFollower, broker: Broker, clock: Clock
) -> None:
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "another", created_at=clock())
        device_id = add_device(tx, tenant_id="another", created_at=clock())
    broker.connected = {device_id: clock()}
    follower.follow()
    broker.connected.clear()
    another(portal).follow()
    with portal.database.snapshot() as tx:
        record = presence_of(tx, "another", device_id)
    assert record is not None
    assert record.state is PresenceState.OFFLINE


def test_while_the_broker_is_lost_nothing_is_known_but_when_a_device_was_last_seen(
    portal: Portal,
    follower: PresenceFollower,
    broker: Broker,
    ids: list[str],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, two, never = ids
    start = clock()
    broker.connected = {one: start}
    follower.follow()
    broker.tell(connected={two: start}, disconnected={two: start})
    follower.follow()
    heard = portal.follower.contact.read().at
    broker.stop()
    clock.advance(seconds=1)
    with caplog.at_level(logging.WARNING, "portal.presence"):
        follower.follow()
        follower.follow()
    assert [record.message for record in caplog.records] == ["it is not known which devices are connected"]
    assert [shown(portal, who) for who in ids] == [
        DeviceConnection(None, None, heard),
        DeviceConnection(None, None, start),
        UNKNOWN,
    ]
    clock.advance(seconds=60)
    broker.start()
    broker.connected = {never: clock()}
    follower.follow()
    assert shown(portal, one) == DeviceConnection(False, heard, heard)
    connection = shown(portal, never)
    assert connection is not None
    assert connection.connected


def test_who_follows_and_is_silent_for_long_makes_nothing_known(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], clock: Clock
) -> None:
    broker.connected = {ids[0]: clock()}
    follower.follow()
    clock.advance(seconds=CONTACT_SECONDS + 1)
    connection = shown(portal, ids[0])
    assert connection is not None
    assert connection.connected is None
    follower.follow()
    connection = shown(portal, ids[0])
    assert connection is not None
    assert connection.connected


def test_a_process_that_another_one_stood_in_for_begins_again(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], clock: Clock
) -> None:
    follower.follow()
    another(portal).follow()
    broker.tell(connected={ids[0]: clock()})
    broker.asked[-1].waiting.clear()  # told to the other one, which was killed before it could write
    follower.follow()
    assert broker.asked[0].closed
    record = recorded(portal, ids[0])
    assert record is not None
    assert record.state is PresenceState.CONNECTED


def test_who_has_not_read_for_long_asks_for_everybody_again(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], clock: Clock
) -> None:
    follower.follow()
    broker.connected = {ids[0]: clock()}  # reported while nobody read, and dropped
    follower.follow()
    assert shown(portal, ids[0]) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workflows.presence.UNREAD_SECONDS", -1.0)
        follower.follow()
    assert broker.asked[0].closed
    assert recorded(portal, ids[0]) == PresenceRecord(PresenceState.CONNECTED, broker.connected[ids[0]], OWN)


def test_a_whole_set_that_does_not_end_is_asked_for_again(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.presence.RECEIVE_SECONDS", 0.0)
    monkeypatch.setattr("workflows.presence.WHOLE_SECONDS", -1.0)
    monkeypatch.setattr(Reports, "receive", lambda *_: iter(()))
    follower.follow()
    assert broker.asked[0].closed
    assert not portal.follower.contact.read().is_current


def test_identities_that_are_not_known_here_are_left_out(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], clock: Clock
) -> None:
    broker.connected = {"a-probe": clock(), ids[0]: clock()}
    follower.follow()
    broker.tell(disconnected={"somebody-else": clock()})
    follower.follow()
    assert recorded(portal, "a-probe") is recorded(portal, "somebody-else") is None
    record = recorded(portal, ids[0])
    assert record is not None
    assert record.state is PresenceState.CONNECTED


def test_a_revoked_device_keeps_when_it_was_last_seen(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], clock: Clock
) -> None:
    broker.connected = {ids[0]: clock()}
    follower.follow()
    with portal.database.transaction() as tx:
        db.revoke_device(tx, "default", ids[0], revoked_at=clock(), reason="unspecified", generation=1)
    ended = clock() + timedelta(seconds=1)
    broker.tell(disconnected={ids[0]: ended})
    follower.follow()
    assert shown(portal, ids[0]) == DeviceConnection(False, ended, ended)


@ON_SQLITE
def test_what_could_not_be_written_is_written_later_and_a_whole_set_has_the_last_word(
    portal: Portal, follower: PresenceFollower, broker: Broker, ids: list[str], clock: Clock
) -> None:
    one, two, three = ids
    follower.follow()
    start = clock()
    broker.tell(connected={one: start, two: start, three: start})
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise DatabaseUnavailable("The database has no room left.")

        patch.setattr(portal.database, "transaction", full)
        with pytest.raises(DatabaseUnavailable):
            follower.follow()
        broker.stop()
        follower.follow()
        broker.start()
        broker.connected = {one: start + timedelta(seconds=3)}
        with pytest.raises(DatabaseUnavailable):
            follower.follow()
        broker.tell(disconnected={two: start + timedelta(seconds=4)})
        with pytest.raises(DatabaseUnavailable):
            follower.follow()
        assert not portal.follower.contact.read().is_current
    follower.follow()
    assert [recorded(portal, who) for who in ids] == [
        PresenceRecord(PresenceState.CONNECTED, start + timedelta(seconds=3), OWN),
        PresenceRecord(PresenceState.OFFLINE, start + timedelta(seconds=4), OWN),
        PresenceRecord(PresenceState.OFFLINE, start, OWN),
    ]


@ON_POSTGRESQL
def test_two_nodes_follow_a_broker_each_and_know_of_both(
    portal: Portal, broker: Broker, ids: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(connections, "OTHERS_SECONDS", 0.0)
    one, two, moved = ids
    beside, own = Broker({two: clock(), moved: clock()}), portal.follower
    with portal.database.transaction() as tx:
        added = brokers.add_broker(tx, "node-2", BrokerKind.NODE, at=clock(), joined=True)
    other = another(portal, added.id)
    other.contact = ContactFile(tmp_path / "presence", clock)
    monkeypatch.setattr(portal.broker, "follow_presence", beside.follow_presence)
    other.follow()
    broker.connected = {one: clock()}
    monkeypatch.setattr(portal.broker, "follow_presence", broker.follow_presence)
    own.follow()
    assert [is_connected(portal, who) for who in ids] == [True, True, True]
    broker.tell(connected={moved: clock() + timedelta(seconds=1)})
    own.follow()
    beside.tell(disconnected={moved: clock() + timedelta(seconds=9)})
    other.follow()
    assert is_connected(portal, moved) is True
    beside.stop()
    other.follow()
    assert [is_connected(portal, who) for who in ids] == [True, None, True]


def is_connected(portal: Portal, device_id: str) -> bool | None:
    connection = shown(portal, device_id)
    assert connection is not None
    return connection.connected


def test_a_damaged_note_of_the_last_contact_makes_nothing_known(
    portal: Portal, follower: PresenceFollower, ids: list[str]
) -> None:
    follower.follow()
    path = portal.settings.data_dir / ".presence"
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" * len(whole), b"x follows nan\n", b"x follows 1e300\n"):
        path.write_bytes(damaged)
        assert shown(portal, ids[0]) == UNKNOWN
    follower.follow()  # which no longer finds itself there, and asks again
    follower.follow()
    assert shown(portal, ids[0]) is None
