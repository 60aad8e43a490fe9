from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.serving_process import (
    CHUNKED,
    PATIENCE,
    Server,
    facts,
    is_closed,
    refusal,
    request,
    response,
    running,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as it:
        yield it


POST = "POST / HTTP/1.1\r\nHost: localhost\r\n"
SMUGGLED = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "text",
    {
        "length and coding": POST + f"Content-Length: 4\r\n{CHUNKED}\r\n\r\n0\r\n\r\n",
        "coding and length": POST + f"{CHUNKED}\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        "two lengths": POST + "Content-Length: 0\r\nContent-Length: 50\r\n\r\n",
        "the same length twice": POST + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
        "list of lengths": POST + "Content-Length: 0, 0\r\n\r\n",
        "signed length": POST + "Content-Length: +0\r\n\r\n",
        "hexadecimal length": POST + "Content-Length: 0x0\r\n\r\n",
        "empty length": POST + "Content-Length: \r\n\r\n",
        "digits of another script": POST + "Content-Length: \u00b2\r\n\r\n",
        "space before the colon": POST + f"{CHUNKED.replace(':', ' :')}\r\nContent-Length: 0\r\n\r\n",
        "folded header": POST + "X: 1\r\n Content-Length: 0\r\n\r\n",
        "two codings": POST + f"{CHUNKED}\r\n{CHUNKED}\r\n\r\n0\r\n\r\n",
        "identity": POST + "Transfer-Encoding: identity\r\n\r\n",
        "unknown coding": POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "vertical tab": POST + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        "coding in HTTP/1.0": POST.replace("1.1", "1.0") + f"{CHUNKED}\r\n\r\n0\r\n\r\n",
        "bare line feed": POST + "X: 1\nContent-Length: 0\r\n\r\n",
        "bare carriage return": POST + "X: 1\rContent-Length: 0\r\n\r\n",
        "null": POST + "X: \0\r\n\r\n",
        "line feeds only": "GET / HTTP/1.1\nHost: localhost\n\n\r\n\r\n",
        "two hosts": POST + "Host: other\r\n\r\n",
        "no header name": POST + ": x\r\n\r\n",
        "HTTP/2": "GET / HTTP/2.0\r\nHost: localhost\r\n\r\n",
        "preface of HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "no version": "GET /\r\nHost: localhost\r\n\r\n",
        "two spaces": "GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "lower-case method": "get / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    }.items(),
    ids=lambda case: case[0],
)
def test_a_request_that_could_be_framed_in_two_ways_is_refused(server: Server, text: tuple[str, str]) -> None:
    with server.tls() as client:
        client.sendall((text[1] + SMUGGLED).encode("latin-1"))
        assert refusal(client)[0] in (400, 501)


@pytest.mark.parametrize(
    "text",
    {
        "chunk too long": POST + f"{CHUNKED}\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        "signed chunk": POST + f"{CHUNKED}\r\n\r\n-1\r\nab\r\n0\r\n\r\n",
        "chunk size 0x": POST + f"{CHUNKED}\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        "chunk with a line feed": POST + f"{CHUNKED}\r\n\r\n1\na\r\n0\r\n\r\n",
        "chunk line without end": POST + f"{CHUNKED}\r\n\r\n1;{'x' * 9000}",
        "trailers": POST + f"{CHUNKED}\r\n\r\n0\r\nContent-Length: 9\r\n\r\n",
    }.items(),
    ids=lambda case: case[0],
)
def test_a_body_that_is_not_framed_as_it_says_is_refused_by_the_application(
    server: Server, text: tuple[str, str]
) -> None:
    with server.tls() as client:
        client.sendall((text[1] + SMUGGLED).encode("latin-1"))
        answer = response(client)
        assert (answer.status, answer.read()) == (400, b"malformed_request")
        assert is_closed(client)


@pytest.mark.parametrize(
    "case",
    {
        "one header": (request("/", "X: " + "x" * 9000), 431),
        "many headers": (request("/", *["X: x"] * 101), 431),
        "target": (request("/" + "x" * 9000), 414),
        "expectation": (request("/", "Expect: miracles"), 417),
    }.items(),
    ids=lambda case: case[0],
)
def test_a_request_beyond_the_limits_is_refused_at_once(server: Server, case: Any) -> None:
    _, (text, status) = case
    with server.tls() as client:
        client.sendall(text)
        assert refusal(client)[0] == status


def test_plain_http_on_the_tls_port_gets_a_hint(server: Server) -> None:
    with server.tcp() as client:
        client.sendall(request())
        assert b"HTTPS" in response(client).read()


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_old_versions_of_tls_are_refused(server: Server, version: str) -> None:
    command = ["openssl", "s_client", version, "-cipher", "ALL:@SECLEVEL=0", "-connect", f"127.0.0.1:{server.port}"]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode != 0
    assert "alert protocol version" in done.stderr


def test_tls_1_2_is_spoken(server: Server) -> None:
    context = server.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with server.secured(context) as client:
        client.sendall(request())
        assert facts(client)["tls"] == "TLSv1.2"
        cipher = client.cipher()
        assert cipher is not None
        assert "ECDHE" in cipher[0]
