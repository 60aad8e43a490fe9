from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

from tests.support.serving_process import CHUNKED, Server, facts, is_closed, problem, request, response, running
from web.serving_worker import MOST_STREAMS

BULK = "/register/bulk"
LIMIT = 200 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(bulk_max_bytes=LIMIT) as it:
        yield it


@pytest.fixture(scope="module")
def hasty_server() -> Iterator[Server]:
    """One that gives clients little time."""
    with running(request_timeout=0.4, bulk_max_bytes=LIMIT) as it:
        yield it


def upload(*headers: str, path: str = BULK, body: bytes = b"") -> bytes:
    return request(path, *(headers or (CHUNKED,)), method="POST", body=body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def answered(client: socket.socket) -> bytes:
    answer = response(client, "POST")
    assert answer.status == 200
    return answer.read()


def test_the_answer_goes_out_while_the_body_comes_in(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(body=chunk(b"abc")))
        answer = response(client, "POST")
        assert answer.readline() == b"3\n"
        client.sendall(chunk(b"ab"))
        assert answer.readline() == b"2\n"
        client.sendall(b"0\r\n\r\n")
        assert answer.read() == b""
        assert answer.headers["Connection"] == "close"
        assert is_closed(client)


def test_a_body_of_known_length_is_streamed_too(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload("Content-Length: 5", body=b"abc"))
        answer = response(client, "POST")
        assert answer.readline() == b"3\n"
        client.sendall(b"de")
        assert answer.read() == b"2\n"


def test_an_application_may_read_it_as_a_file(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(path=f"{BULK}?file", body=chunk(b"ab") + chunk(b"cdefghij") + b"0\r\n\r\n"))
        assert json.loads(answered(client)) == ["abc", "de", 5, 0]


def test_who_waits_for_100_continue_gets_it_when_the_body_is_read(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(CHUNKED, "Expect: 100-continue"))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(chunk(b"abc") + b"0\r\n\r\n")
        assert answered(client) == b"3\n"


def test_who_is_refused_is_not_asked_for_the_body(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload("Content-Length: 1000", "Expect: 100-continue", path=f"{BULK}?unread"))
        assert answered(client) == b"not for you"
        assert is_closed(client)


def test_a_length_beyond_the_limit_is_refused_at_once(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(f"Content-Length: {LIMIT + 1}"))
        assert problem(client) == (413, "body_too_large")


def test_chunks_beyond_the_limit_end_the_upload(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(body=chunk(b"abc") + b"%x\r\n" % LIMIT))
        assert answered(client) == b"3\nbody_too_large"


def test_a_body_that_is_not_framed_as_it_says_ends_the_upload(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload(body=chunk(b"abc") + b"zz\r\n"))
        assert answered(client) == b"3\nmalformed_request"


def test_other_routes_keep_their_limit(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload("Content-Length: 4097", path=f"{BULK}s"))
        assert problem(client) == (413, "body_too_large")
    with server.tcp(server.pki_port) as client:
        client.sendall(upload("Content-Length: 4097"))
        assert problem(client) == (413, "body_too_large")


def test_a_large_body_takes_no_memory(server: Server) -> None:
    with server.tls() as client:
        client.sendall(upload())
        part = chunk(bytes(1 << 20))
        client.sendall(part)
        before = peak(server)
        for _ in range(63):
            client.sendall(part)
        client.sendall(b"0\r\n\r\n")
        assert sum(int(line) for line in answered(client).split()) == 64 << 20
        assert peak(server) - before < 8 << 10


def peak(server: Server) -> int:
    """The most memory that a worker has had, in KiB."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return max(int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) for pid in children)


def test_a_client_that_pauses_for_too_long_is_told_so(hasty_server: Server) -> None:
    with hasty_server.tls() as client:
        client.sendall(upload(body=chunk(b"abc")))
        assert answered(client) == b"3\nrequest_timeout"


def test_a_client_that_only_trickles_is_told_so(hasty_server: Server) -> None:
    with hasty_server.tls() as client:
        client.sendall(upload())
        for _ in range(10):  # no pause is too long, all of them together are
            client.sendall(chunk(b"x"))
            time.sleep(0.1)
        assert answered(client).endswith(b"request_timeout")


def test_a_client_that_sends_and_does_not_read_is_closed(hasty_server: Server) -> None:
    with hasty_server.tls() as client:
        client.sendall(upload(path=f"{BULK}?wordy"))
        with pytest.raises((ConnectionError, ssl.SSLError)):
            client.sendall(chunk(b"x" * 1000) * 100_000)


def test_a_client_that_goes_away_frees_its_place(server: Server) -> None:
    for _ in range(2 * MOST_STREAMS):
        with server.tls() as client:
            client.sendall(upload(body=chunk(b"abc")))
            assert response(client, "POST").readline() == b"3\n"
    assert server.get("/")["path"] == "/"


def test_uploads_hold_nobody_up_and_there_is_a_most_of_them(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_STREAMS):
            client = stack.enter_context(server.tls())
            client.sendall(upload(body=chunk(b"abc")))
            assert response(client, "POST").readline() == b"3\n"
        with server.tls() as client:
            client.sendall(request("/meanwhile"))
            assert facts(client)["path"] == "/meanwhile"
        with server.tls() as client:
            client.sendall(upload())
            answer = response(client, "POST")
            assert answer.status == HTTPStatus.SERVICE_UNAVAILABLE
            assert answer.headers["Retry-After"]


def test_an_upload_ends_with_the_server() -> None:
    with running(bulk_max_bytes=LIMIT) as server, server.tls() as client:
        client.sendall(upload(body=chunk(b"abc")))
        answer = response(client, "POST")
        assert answer.readline() == b"3\n"
        server.process.send_signal(signal.SIGTERM)
        assert answer.read() == b"stopping"
        assert server.process.wait(10) == 0
