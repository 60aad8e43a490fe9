from __future__ import annotations

import json
import re
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving_process import CHUNKED, Server, facts, is_closed, request, response, running
from web.listeners import LOOK_UP

BULK = "/register/bulk"
KIB = b"x" * 1024


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as it:
        yield it


@pytest.fixture(scope="module")
def hasty_server() -> Iterator[Server]:
    """One that gives clients little time."""
    with running(request_timeout=0.4) as it:
        yield it


def upload(*headers: str, path: str = BULK, body: bytes = b"") -> bytes:
    return request(path, *(headers or (CHUNKED,)), method="POST", body=body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_the_answer_goes_out_while_the_body_comes_in(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(body=chunk(b"abc")))
        answer = response(client, "POST")
        assert answer.readline() == b"3\n"
        client.sendall(chunk(b"ab\nc") + chunk(KIB))
        assert answer.readline() == b"4\n"
        assert answer.readline() == b"1024\n"
        client.sendall(b"0\r\n\r\n")
        assert answer.read() == b""


def test_a_body_of_known_length_is_streamed_too(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload("Content-Length: 5", body=b"abc"))
        answer = response(client, "POST")
        assert answer.readline() == b"3\n"
        client.sendall(b"de")
        assert answer.read() == b"2\n"


def test_what_arrives_together_is_read_together(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload("Content-Length: 5002", body=b"x\n" * 2500))
        answer = response(client, "POST")
        assert answer.readline() == b"5000\n"
        client.sendall(b"de")
        assert answer.read() == b"2\n"


def test_another_request_may_follow_an_upload(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(body=chunk(b"abc") + b"0\r\n\r\n") + request("/next"))
        assert response(client, "POST").read() == b"3\n"
        assert facts(client)["path"] == "/next"


def test_an_application_may_read_it_as_a_file(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(path=f"{BULK}?file", body=chunk(b"ab") + chunk(b"cdefghij") + b"0\r\n\r\n"))
        assert json.loads(response(client, "POST").read()) == ["abc", "de", 5, 0]


def test_who_waits_for_100_continue_gets_it(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(CHUNKED, "Expect: 100-continue"))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(chunk(b"abc") + b"0\r\n\r\n")
        assert response(client, "POST").read() == b"3\n"


def test_who_is_refused_gets_the_answer_though_the_body_was_not_read(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload("Content-Length: 1000000", path=f"{BULK}?unread", body=KIB))
        assert response(client, "POST").readline() == b"not for you"
        client.sendall(KIB * 100)
        assert is_closed(client)


def test_a_body_that_is_not_framed_as_it_says_ends_the_upload(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(body=chunk(b"abc") + b"zz\r\n"))
        assert response(client, "POST").read() == b"3\nmalformed_request"


def test_a_large_body_takes_no_memory(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload())
        part = chunk(bytes(1 << 20))
        client.sendall(part)
        before = peak(server)
        for _ in range(63):
            client.sendall(part)
        client.sendall(b"0\r\n\r\n")
        assert sum(int(line) for line in response(client, "POST").read().split()) == 64 << 20
        assert peak(server) - before < 8 << 10


def peak(server: Server) -> int:
    """The most memory that a worker has had, in KiB."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return max(int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) for pid in children)


def test_a_client_that_pauses_for_too_long_is_refused(hasty_server: Server) -> None:
    with hasty_server.tls() as client:
        client.sendall(upload(body=chunk(KIB)))
        assert response(client, "POST").read() == b"1024\nrequest_timeout"


def test_a_client_that_only_trickles_is_refused(hasty_server: Server) -> None:
    with hasty_server.tls() as client:
        client.sendall(upload())
        for _ in range(10):  # no pause is too long, all of them together are
            client.sendall(chunk(b"x"))
            time.sleep(0.1)
        assert response(client, "POST").read().endswith(b"request_timeout")


def test_a_client_that_goes_away_in_the_middle_of_an_upload_hurts_nobody(server: Server) -> None:
    for _ in range(16):
        with server.tls() as client:
            client.sendall(upload(body=chunk(KIB)))
            assert response(client, "POST").readline() == b"1024\n"
    assert server.get("/")["path"] == "/"


def test_an_upload_ends_with_the_server() -> None:
    with running() as server, server.tls() as client:
        client.sendall(upload(body=chunk(KIB)))
        answer = response(client, "POST")
        assert answer.readline() == b"1024\n"
        server.process.send_signal(signal.SIGTERM)
        assert answer.read() == b"stopping"
        assert server.process.wait(10) == 0


def test_a_request_after_an_upload_is_answered_though_the_server_is_told_to_stop_while_it_arrives() -> None:
    with running() as server, server.tls() as client:
        client.sendall(upload(body=chunk(b"abc") + b"0\r\n\r\n"))
        assert response(client, "POST").read() == b"3\n"
        head = request("/next")
        client.sendall(head[:9])
        server.process.send_signal(signal.SIGTERM)
        assert not select.select([client], [], [], 3 * LOOK_UP)[0]  # it is waited for, and not refused
        client.sendall(head[9:])
        assert facts(client)["path"] == "/next"
        assert server.process.wait(10) == 0
