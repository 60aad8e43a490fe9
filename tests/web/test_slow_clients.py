"""How many threads wait for slow clients, and how connections end without one."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from unittest.mock import create_autospec

import pytest

from web import slow_clients
from web.slow_clients import LINGER_BYTES, Lingering, SlowClients

PATIENCE = 20.0  # seconds after which a test gives up


def client_at(address: str) -> socket.socket:
    client: socket.socket = create_autospec(socket.socket, instance=True)
    client.getpeername.return_value = (address, 1)  # type: ignore[attr-defined]  # a mock
    return client


@pytest.fixture
def waits() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_slow_clients_of_one_address_leave_half_of_the_threads(waits: contextlib.ExitStack) -> None:
    slow = SlowClients(8)
    waiting = [waits.enter_context(slow.waiting(client_at("192.0.2.1"))) for _ in range(6)]
    assert waiting == [True] * 4 + [False] * 2


def test_one_of_each_further_address_may_take_until_a_quarter_of_the_threads_is_left(
    waits: contextlib.ExitStack,
) -> None:
    slow = SlowClients(8)
    addresses = ["192.0.2.1"] * 4 + ["192.0.2.2", "192.0.2.2", "192.0.2.3", "192.0.2.4"]
    waiting = [waits.enter_context(slow.waiting(client_at(address))) for address in addresses]
    assert waiting == [True] * 4 + [True, False, True, False]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_addresses_of_one_network_count_together(waits: contextlib.ExitStack, one: str, other: str, same: bool) -> None:
    slow = SlowClients(8)
    for _ in range(4):
        assert waits.enter_context(slow.waiting(client_at(one)))
    assert waits.enter_context(slow.waiting(client_at(other))) is not same


def test_what_a_client_has_held_is_free_again(waits: contextlib.ExitStack) -> None:
    slow = SlowClients(2)
    for _ in range(3):
        with slow.waiting(client_at("192.0.2.1")) as may_wait:
            assert may_wait


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client, and the server's end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        server, _ = listener.accept()
        with client, server:
            yield client, server


def is_reset(client: socket.socket) -> bool:
    """Whether the server has closed while the client still sends, seen before long."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        try:
            client.sendall(b"x")
        except (ConnectionResetError, BrokenPipeError):
            return True
        time.sleep(0.01)
    return False


def test_a_client_that_is_lingered_for_reads_its_answer_and_may_still_send(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    client, server = pair
    lingering = Lingering()
    server.sendall(b"refused")
    lingering.take_over(server)
    assert server.recv(1) == b""  # what gunicorn waits for
    server.close()
    client.sendall(b"x" * 4096)
    assert client.recv(100) == b"refused"
    assert client.recv(100) == b""
    client.sendall(b"x")


@pytest.mark.parametrize("limit", ["bytes", "seconds"])
def test_a_client_that_goes_on_is_cut_off(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(slow_clients, "LINGER_SECONDS", 0.1 if limit == "seconds" else 10 * PATIENCE)
    client, server = pair
    Lingering().take_over(server)
    server.close()
    if limit == "bytes":
        with contextlib.suppress(ConnectionResetError):
            client.sendall(b"x" * 2 * LINGER_BYTES)
    assert is_reset(client)


def test_of_many_connections_that_end_the_last_are_closed_at_once(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_clients, "MAX_LINGERING", 0)
    client, server = pair
    Lingering().take_over(server)
    server.close()
    assert is_reset(client)
