"""Slow clients are cut off in time."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.serving_process import CHUNKED, PATIENCE, Server, facts, is_closed, request, response, running
from web.listeners import QUICK


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


def unfinished(client: socket.socket) -> None:
    client.sendall(request("/")[:-2])


def dripped(client: socket.socket) -> None:
    """Send byte after byte until the server answers or closes."""
    give_up = time.monotonic() + PATIENCE
    while not select.select([client], [], [], 0.05)[0]:
        assert time.monotonic() < give_up
        client.sendall(b"x")


@pytest.mark.parametrize("beginning", [b"G", request("/")[:-2]], ids=["first byte", "head"])
@pytest.mark.parametrize("earlier", [0, 1], ids=["first request", "second request"])
def test_a_head_that_drips_in_is_cut_off_at_the_deadline(hasty_server: Server, beginning: bytes, earlier: int) -> None:
    with hasty_server.tls() as client:
        for _ in range(earlier):
            client.sendall(request())
            facts(client)
        client.sendall(beginning)
        dripped(client)
        assert is_closed(client)


@pytest.mark.parametrize(
    "beginning",
    [request("/", "Content-Length: 4000", method="POST"), request("/", CHUNKED, method="POST", body=b"fff\r\n")],
    ids=["length", "chunk"],
)
def test_a_body_that_drips_in_is_refused_at_the_deadline(hasty_server: Server, beginning: bytes) -> None:
    with hasty_server.tls() as client:
        client.sendall(beginning)
        dripped(client)
        assert response(client).read() == b"request_timeout"
        assert is_closed(client)


def test_a_handshake_that_does_not_end_is_cut_off_at_the_deadline(hasty_server: Server) -> None:
    with hasty_server.tcp() as client:
        half_open(client)
        assert is_closed(client)


def test_a_plain_request_that_does_not_end_is_cut_off_at_the_deadline(hasty_server: Server) -> None:
    with hasty_server.tcp(hasty_server.pki_port) as client:
        unfinished(client)
        assert is_closed(client)


@pytest.mark.parametrize("begin", [half_open, unfinished])
def test_slow_clients_of_one_listener_do_not_hold_up_the_other(server: Server, begin: Any) -> None:
    slow = [server.tcp() for _ in range(20)]
    for client in slow:
        begin(client)
    with server.tcp(server.pki_port) as client:
        client.sendall(request("/meanwhile"))
        assert facts(client)["path"] == "/meanwhile"
    for client in slow:
        client.close()


@pytest.mark.parametrize("listener", ["port", "pki_port"])
def test_clients_that_send_nothing_hold_up_nobody(server: Server, listener: str) -> None:
    port = getattr(server, listener)
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(server.tcp(port))  # gunicorn would have a thread wait five seconds for each
        client = stack.enter_context(server.tls() if listener == "port" else server.tcp(port))
        client.sendall(request("/meanwhile"))
        assert facts(client)["path"] == "/meanwhile"


@pytest.mark.parametrize("shake_hands", [False, True], ids=["silent", "handshake done"])
def test_whoever_opens_as_many_connections_as_there_may_be_keeps_nobody_out(shake_hands: bool) -> None:
    with running(max_connections=6) as server, contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(server.tls() if shake_hands else server.tcp())
        assert server.get("/meanwhile")["path"] == "/meanwhile"


def test_clients_whose_handshake_is_done_may_send_their_requests_later(server: Server) -> None:
    """However many there are at one address: none has a thread wait for it, of which there are two."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.tls()) for _ in range(20)]
        clients[-1].settimeout(2 * QUICK)
        with pytest.raises(TimeoutError):
            clients[-1].recv(1)
        clients[-1].settimeout(PATIENCE)
        for number, client in enumerate(clients):
            client.sendall(request(f"/{number}"))
            assert facts(client)["path"] == f"/{number}"


@pytest.mark.parametrize("listener", ["port", "pki_port"])
def test_clients_that_are_gone_at_once_end_no_worker(listener: str) -> None:
    """gunicorn counts some of them off twice, as one that was closed already could not be closed."""
    with running(workers=2) as server:
        for first in (b"", b"\x16\x03\x01", request()):
            for _ in range(20):
                with server.tcp(getattr(server, listener)) as client:
                    client.sendall(first)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # with a reset
        server.get()
        server.process.terminate()
        assert "exited with code" not in server.process.communicate(timeout=PATIENCE)[1]


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
