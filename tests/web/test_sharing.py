"""A worker gives a connection to the one that has fewest, and none is lost between them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from web.sharing import HANG_SECONDS, Inbox, SharedListener, Sharing

GIVER, OTHER, THIRD = range(3)


@pytest.fixture
def port() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest.fixture
def sharing() -> Iterator[Sharing]:
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(3)]
        for end in itertools.chain(*pairs):
            stack.enter_context(end)
        yield Sharing(pairs)


@pytest.fixture
def listener(port: socket.socket, sharing: Sharing) -> Iterator[SharedListener]:
    with SharedListener(sharing, GIVER, port) as its:
        yield its


@pytest.fixture
def inbox(sharing: Sharing) -> Iterator[Inbox]:
    with sharing.inbox(OTHER) as its:
        yield its


@pytest.fixture
def client(port: socket.socket) -> Iterator[socket.socket]:
    with socket.create_connection(port.getsockname()) as its:
        yield its


def accepted(where: SharedListener | Inbox, client: socket.socket) -> bool:
    """Whether this has the connection of the client, and no other's."""
    try:
        connection, address = where.accept()
    except BlockingIOError:
        return False
    with connection:
        assert address == connection.getpeername() == client.getsockname()
        assert where.getsockname() == client.getpeername()
        return True


@pytest.mark.parametrize(("own", "other", "third"), [(0, 0, 0), (3, 3, 4), (2, 5, 3)])
def test_a_worker_keeps_a_connection_if_none_has_fewer(
    sharing: Sharing, listener: SharedListener, client: socket.socket, own: int, other: int, third: int
) -> None:
    for number, connections in enumerate((own, other, third)):
        sharing.tell(number, connections)
    assert accepted(listener, client)


@pytest.mark.parametrize(("own", "other", "third"), [(1, 0, 1), (9, 1, 2), (2, 0, 0)])
def test_a_connection_goes_to_the_worker_that_has_fewest(
    sharing: Sharing, listener: SharedListener, inbox: Inbox, client: socket.socket, own: int, other: int, third: int
) -> None:
    for number, connections in enumerate((own, other, third)):
        sharing.tell(number, connections)
    assert not accepted(listener, client)
    assert accepted(inbox, client)


def test_connections_that_a_worker_has_not_taken_yet_are_its(
    sharing: Sharing, listener: SharedListener, inbox: Inbox, port: socket.socket
) -> None:
    sharing.tell(GIVER, 1)
    sharing.tell(OTHER, 0)
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(socket.create_connection(port.getsockname())) for _ in range(2))
        assert not accepted(listener, first)
        assert accepted(listener, second)
        assert accepted(inbox, first)


def test_a_worker_that_is_closed_is_given_nothing_until_it_says_how_many_it_has(
    sharing: Sharing, listener: SharedListener, inbox: Inbox, port: socket.socket
) -> None:
    sharing.tell(GIVER, 5)
    sharing.tell(OTHER, 0)
    sharing.close(OTHER)
    with socket.create_connection(port.getsockname()) as client:
        assert accepted(listener, client)
    sharing.tell(OTHER, 0)
    with socket.create_connection(port.getsockname()) as client:
        assert not accepted(listener, client)
        assert accepted(inbox, client)


def test_a_worker_that_is_closed_itself_keeps_what_it_accepts(
    sharing: Sharing, listener: SharedListener, client: socket.socket
) -> None:
    sharing.tell(OTHER, 0)
    assert accepted(listener, client)


def test_a_worker_that_hangs_is_given_nothing(
    monkeypatch: pytest.MonkeyPatch, sharing: Sharing, listener: SharedListener, port: socket.socket
) -> None:
    sharing.tell(OTHER, 0)
    now = time.monotonic() + HANG_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: now)
    sharing.tell(GIVER, 5)
    with socket.create_connection(port.getsockname()) as client:
        assert accepted(listener, client)
    sharing.tell(OTHER, 0)
    with socket.create_connection(port.getsockname()) as client:
        assert not accepted(listener, client)


@pytest.mark.parametrize("ends", ["closed", "hangs"])
def test_what_waits_for_a_worker_that_does_not_take_it_is_left_to_the_others(
    monkeypatch: pytest.MonkeyPatch, sharing: Sharing, listener: SharedListener, client: socket.socket, ends: str
) -> None:
    sharing.tell(GIVER, 1)
    sharing.tell(OTHER, 0)
    assert not sharing.has_left(OTHER)
    assert not accepted(listener, client)
    assert not sharing.has_left(OTHER)  # it will take it
    if ends == "closed":
        sharing.close(OTHER)
    else:
        now = time.monotonic() + HANG_SECONDS
        monkeypatch.setattr(time, "monotonic", lambda: now)
    assert sharing.has_left(OTHER)
    with sharing.inbox(OTHER) as inbox:  # each worker has all of them
        assert accepted(inbox, client)
    assert not sharing.has_left(OTHER)


def test_a_connection_is_taken_back_from_a_worker_that_closed_just_before_it_came(
    monkeypatch: pytest.MonkeyPatch, sharing: Sharing, listener: SharedListener, inbox: Inbox, client: socket.socket
) -> None:
    give = sharing.give

    def late(giver: int, connection: socket.socket) -> int | None:
        given_to = give(giver, connection)
        sharing.close(OTHER)
        return given_to

    monkeypatch.setattr(sharing, "give", late)
    sharing.tell(GIVER, 1)
    sharing.tell(OTHER, 0)
    assert accepted(listener, client)
    assert not accepted(inbox, client)


def test_a_worker_keeps_what_another_one_has_no_room_for(sharing: Sharing, client: socket.socket) -> None:
    sharing.tell(GIVER, 100_000)
    sharing.tell(OTHER, 0)
    given = 0
    while sharing.give(GIVER, client) == OTHER:
        given += 1
    assert 0 < given < 100_000
    for _ in range(given):
        sharing.take(OTHER)[0].close()
    with pytest.raises(BlockingIOError):
        sharing.take(OTHER)


def test_a_client_that_is_gone_when_its_connection_is_taken_harms_nobody(
    sharing: Sharing, listener: SharedListener, inbox: Inbox, client: socket.socket
) -> None:
    sharing.tell(GIVER, 1)
    sharing.tell(OTHER, 0)
    assert not accepted(listener, client)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it closes with a reset
    client.close()
    with pytest.raises(ConnectionAbortedError):
        inbox.accept()


def test_programs_that_a_worker_starts_do_not_inherit_what_it_was_given(
    sharing: Sharing, listener: SharedListener, inbox: Inbox, client: socket.socket
) -> None:
    sharing.tell(GIVER, 1)
    sharing.tell(OTHER, 0)
    assert not accepted(listener, client)
    with inbox.accept()[0] as connection:
        assert not connection.get_inheritable()
