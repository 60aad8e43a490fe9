from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.serving_process import CHUNKED, PATIENCE, Server, facts, problem, request, response, running


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
        "stacked codings": POST + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "identity": POST + "Transfer-Encoding: identity\r\n\r\n",
        "unknown coding": POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "vertical tab": POST + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        "coding in HTTP/1.0": POST.replace("1.1", "1.0") + f"{CHUNKED}\r\n\r\n0\r\n\r\n",
        "bare line feed": POST + "X: 1\nContent-Length: 0\r\n\r\n",
        "bare carriage return": POST + "X: 1\rContent-Length: 0\r\n\r\n",
        "null": POST + "X: \0\r\n\r\n",
        "line feeds only": "GET / HTTP/1.1\nHost: localhost\n\n\r\n\r\n",
        "no host": "GET / HTTP/1.1\r\n\r\n",
        "two hosts": POST + "Host: other\r\n\r\n",
        "no header name": POST + ": x\r\n\r\n",
        "HTTP/2": "GET / HTTP/2.0\r\nHost: localhost\r\n\r\n",
        "preface of HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "no version": "GET /\r\nHost: localhost\r\n\r\n",
        "two spaces": "GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "lower-case method": "get / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "chunk too long": POST + f"{CHUNKED}\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        "signed chunk": POST + f"{CHUNKED}\r\n\r\n-1\r\nab\r\n0\r\n\r\n",
        "chunk size 0x": POST + f"{CHUNKED}\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        "chunk with a line feed": POST + f"{CHUNKED}\r\n\r\n1\na\r\n0\r\n\r\n",
        "chunk line without end": POST + f"{CHUNKED}\r\n\r\n1;{'x' * 300}",
        "overflowing chunk": POST + f"{CHUNKED}\r\n\r\n10000000000000001\r\na\r\n0\r\n\r\n",
        "trailers": POST + f"{CHUNKED}\r\n\r\n0\r\nContent-Length: 9\r\n\r\n",
    }.items(),
    ids=lambda case: case[0],
)
def test_a_request_that_could_be_framed_in_two_ways_is_refused(server: Server, text: tuple[str, str]) -> None:
    with server.tls() as client:
        client.sendall((text[1] + SMUGGLED).encode("latin-1"))
        assert problem(client) == (400, "malformed_request")


WASTEFUL_CHUNKS = (b"1;" + b"x" * 200 + b"\r\nx\r\n") * 400


@pytest.mark.parametrize(
    "case",
    {
        "length": (request("/", "Content-Length: 4097", method="POST"), (413, "body_too_large")),
        "chunk": (request("/", CHUNKED, method="POST", body=b"1001\r\n"), (413, "body_too_large")),
        "chunks": (
            request("/", CHUNKED, method="POST", body=b"800\r\n" + b"x" * 2048 + b"\r\n801\r\n"),
            (413, "body_too_large"),
        ),
        "small chunks": (request("/", CHUNKED, method="POST", body=WASTEFUL_CHUNKS), (413, "body_too_large")),
        "one header": (request("/", "X: " + "x" * 9000), (431, "headers_too_large")),
        "head": (request("/", *["X: " + "x" * 4000] * 5)[:16384], (431, "headers_too_large")),
        "many headers": (request("/", *["X: x"] * 101), (431, "headers_too_large")),
        "target": (request("/" + "x" * 9000), (414, "uri_too_long")),
        "expectation": (request("/", "Expect: miracles"), (417, "expectation_failed")),
    }.items(),
    ids=lambda case: case[0],
)
def test_a_request_beyond_the_limits_is_refused_at_once(server: Server, case: Any) -> None:
    _, (text, refusal) = case
    with server.tls() as client:
        client.sendall(text)
        assert problem(client) == refusal


def test_a_refused_body_does_not_hide_the_answer(server: Server) -> None:
    with server.tls() as client:
        client.sendall(request("/", "Content-Length: 3000000", method="POST", body=b"x" * 3_000_000))
        assert problem(client) == (413, "body_too_large")


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
