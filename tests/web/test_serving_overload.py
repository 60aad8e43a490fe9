from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.serving_app import BIG
from tests.support.serving_process import CHUNKED, PATIENCE, Server, facts, is_closed, request, response, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as it:
        yield it


@pytest.fixture(scope="module")
def hasty_server() -> Iterator[Server]:
    """One that gives clients little time."""
    with running(request_timeout=0.4) as it:
        yield it


def half_open(client: socket.socket) -> None:
    client.sendall(b"\x16\x03\x01")


def silent(client: socket.socket) -> None:
    assert client.fileno() >= 0


@pytest.mark.parametrize("begin", [half_open, silent])
def test_two_hundred_unfinished_handshakes_hold_nobody_up(server: Server, begin: Any) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            begin(stack.enter_context(server.tcp()))
        assert server.get("/meanwhile")["path"] == "/meanwhile"


@pytest.mark.parametrize(
    "beginning", [request("/")[:-2], request("/", "Content-Length: 9", method="POST", body=b"x")], ids=["head", "body"]
)
def test_unfinished_requests_hold_nobody_up(server: Server, beginning: bytes) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(server.tls()).sendall(beginning)
        assert server.get("/meanwhile")["path"] == "/meanwhile"


def test_slow_readers_hold_nobody_up(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(server.tls()) for _ in range(3)]  # more than there are threads
        for reader in readers:
            reader.sendall(request("/big"))
            assert reader.recv(4) == b"HTTP"
        assert server.get("/meanwhile")["path"] == "/meanwhile"


@pytest.mark.parametrize(
    "beginning",
    [
        b"G",
        request("/")[:-2],
        request("/", "Content-Length: 4000", method="POST"),
        request("/", CHUNKED, body=b"fff\r\n"),
    ],
    ids=["first byte", "head", "body", "chunk"],
)
@pytest.mark.parametrize("earlier", [0, 1], ids=["first request", "second request"])
def test_a_request_that_drips_in_is_cut_off_at_the_deadline(
    hasty_server: Server, beginning: bytes, earlier: int
) -> None:
    with hasty_server.tls() as client:
        for _ in range(earlier):
            client.sendall(request())
            facts(client)
        client.sendall(beginning)
        give_up = time.monotonic() + PATIENCE
        while not select.select([client], [], [], 0.05)[0]:
            assert time.monotonic() < give_up
            client.sendall(b"x")
        assert response(client).status == 408


@pytest.mark.parametrize("begin", [half_open, silent])
def test_a_handshake_that_does_not_end_is_cut_off_at_the_deadline(hasty_server: Server, begin: Any) -> None:
    with hasty_server.tcp() as client:
        begin(client)
        assert is_closed(client)


def received(client: socket.socket) -> int:
    """How many bytes come until the server closes."""
    count = 0
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(1 << 20):
            count += len(data)
    return count


def test_a_reader_that_takes_too_long_is_given_up() -> None:
    with running(request_timeout=0.2, slowest_reader=100 * BIG) as server, server.tls() as client:
        client.sendall(request("/big", "Connection: close"))
        assert client.recv(1) == b"H"
        for _ in range(2):  # each is closed at a deadline of its own, the second after that of the reader
            with server.tls() as witness:
                assert is_closed(witness)
        assert received(client) < BIG


def test_readers_for_which_too_much_memory_is_held_are_given_up(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(server.tls()) for _ in range(5)]
        for reader in readers:
            reader.sendall(request("/big", "Connection: close"))
            assert reader.recv(1) == b"H"
        assert server.get("/meanwhile")["path"] == "/meanwhile"
        whole = [received(reader) > BIG for reader in readers]
    assert 1 <= whole.count(True) < 5


def test_at_the_connection_limit_the_connection_idle_for_longest_makes_room() -> None:
    with running(max_connections=16) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.tls()) for _ in range(16)]
        for client in clients:
            client.sendall(request())
            facts(client)
        assert server.get()["path"] == "/"
        assert is_closed(clients[0])
        clients[-1].sendall(request("/last"))
        assert facts(clients[-1])["path"] == "/last"


def test_at_the_connection_limit_unfinished_handshakes_make_room() -> None:
    with running(max_connections=16) as server, contextlib.ExitStack() as stack:
        for _ in range(40):
            half_open(stack.enter_context(server.tcp()))
        assert server.get()["path"] == "/"


def test_connections_are_spread_over_the_workers() -> None:
    with running(workers=2) as server, contextlib.ExitStack() as stack:
        processes = []
        for _ in range(16):
            client = stack.enter_context(server.tls())
            client.sendall(request())
            processes.append(facts(client)["process"])
        if len(set(processes)) == 2:  # the second worker may have started late
            assert min(processes.count(process) for process in set(processes)) >= 4


def test_eight_clients_at_once_are_all_served(server: Server) -> None:
    seen: list[str] = []

    def use(name: int) -> None:
        with server.tls() as client:
            for number in range(25):
                client.sendall(request(f"/{name}/{number}"))
                seen.append(facts(client)["path"])

    threads = [threading.Thread(target=use, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(seen) == sorted(f"/{name}/{number}" for name in range(8) for number in range(25))
