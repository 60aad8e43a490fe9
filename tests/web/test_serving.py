from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving_app import BIG
from tests.support.serving_process import PATIENCE, Server, facts, is_closed, request, response, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as it:
        yield it


# --- What is served ---------------------------------------------------------------------------------------------


def test_the_application_can_tell_the_listeners_apart(server: Server) -> None:
    main = server.get("/a%20b")
    assert (main["listener"], main["scheme"], main["tls"]) == ("main", "https", "TLSv1.3")
    assert (main["path"], main["port"], main["address"]) == ("/a b", str(server.port), "127.0.0.1")
    with server.tcp(server.pki_port) as client:
        client.sendall(request())
        pki = facts(client)
    assert (pki["listener"], pki["scheme"], pki["tls"], pki["port"]) == ("pki", "http", None, str(server.pki_port))


@pytest.mark.parametrize(
    "header",
    ["portal.listener: main", "Portal_Listener: main", "X-Forwarded-Proto: https", "X-Forwarded-For: 9.9.9.9"],
)
def test_no_header_forges_the_listener(server: Server, header: str) -> None:
    with server.tcp(server.pki_port) as client:
        client.sendall(request("/", header, "X-Forwarded-Ssl: on", "SCRIPT_NAME: /x", "Forwarded: proto=https"))
        seen = facts(client)
    assert (seen["listener"], seen["scheme"], seen["address"], seen["path"]) == ("pki", "http", "127.0.0.1", "/")


def test_a_connection_is_kept_for_further_requests(server: Server) -> None:
    client = http.client.HTTPSConnection("localhost", server.port, context=server.context(), timeout=PATIENCE)
    for number in range(5):
        client.request("POST", f"/{number}", body=b"x" * number)
        sock = client.sock
        assert json.loads(client.getresponse().read())["body"] == "x" * number
        assert client.sock is sock
        assert sock is not None
    client.close()


def test_the_thread_that_has_answered_waits_for_the_request_that_follows_at_once(server: Server) -> None:
    """Else the thread in which the server waits for all connections wakes for each."""
    with server.tls() as client:
        client.sendall(request())
        worker = facts(client)["process"]
        before = waits_of_first_thread(worker)
        for number in range(100):
            client.sendall(request(f"/{number}"))
            assert facts(client)["path"] == f"/{number}"
        assert waits_of_first_thread(worker) - before < 50


def waits_of_first_thread(process: int) -> int:
    status = Path(f"/proc/{process}/task/{process}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_http_1_0_is_answered_then_closed(server: Server) -> None:
    with server.tls() as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert facts(client)["path"] == "/"
        assert is_closed(client)


def test_a_head_request_is_answered_without_a_body(server: Server) -> None:
    with server.tls() as client:
        client.sendall(request(method="HEAD"))
        answer = response(client, "HEAD")
        assert int(answer.headers["Content-Length"]) > 0
        client.sendall(request())
        assert facts(client)["method"] == "GET"


def test_the_server_does_not_tell_its_version(server: Server) -> None:
    with server.tls() as client:
        client.sendall(request())
        assert response(client).headers["Server"] == "gunicorn"


def test_a_response_of_unknown_length_is_streamed(server: Server) -> None:
    with server.tls() as client:
        client.sendall(request("/pieces"))
        answer = response(client)
        assert answer.headers["Transfer-Encoding"] == "chunked"
        assert answer.read().split() == [b"%06d" % number for number in range(1000)]


def test_a_long_response_arrives_whole(server: Server) -> None:
    with server.tls() as client:
        client.sendall(request("/big"))
        assert response(client).read() == b"x" * BIG
        client.sendall(request("/after"))
        assert facts(client)["path"] == "/after"


def test_the_head_of_an_answer_is_sent_with_its_body_as_one_record(server: Server) -> None:
    with server.tls() as client:
        client.sendall(request("/one"))
        record = client.recv(1 << 16)  # which returns one at most
        head, _, body = record.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert json.loads(body)["path"] == "/one"


def test_an_answer_that_is_shorter_than_said_is_sent_nevertheless(server: Server) -> None:
    with server.tls() as client:
        client.sendall(request("/nothing"))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_request_is_answered_that_came_in_one_record_with_one_at_whose_end_gunicorn_stops_to_read(
    server: Server,
) -> None:
    head = request("/1", "Content-Length: 8000", method="POST")
    fill = 8192 - 8000 - len(head) - len("Filler: \r\n")  # bytes that it reads at once
    with server.tls() as client:
        client.sendall(
            request("/1", "Content-Length: 8000", f"Filler: {'x' * fill}", method="POST", body=b"x" * 8000)
            + request("/2")
        )
        assert [facts(client)["path"], facts(client)["path"]] == ["/1", "/2"]


def test_an_error_of_the_application_tells_the_client_nothing(server: Server) -> None:
    with server.tls() as client:
        client.sendall(request("/fail"))
        answer = response(client)
        text = answer.read().decode()
    assert answer.status == 500
    assert "secret" not in text


# --- Requests in pieces -----------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    posted = request("/1", "Content-Length: 3", method="POST", body=b"abc")
    with server.tls() as client:
        client.sendall(posted + request("/2") + request("/3")[:-5])
        answers = [facts(client), facts(client)]
        client.sendall(request("/3")[-5:])
        answers.append(facts(client))
    assert [answer["path"] for answer in answers] == ["/1", "/2", "/3"]
    assert answers[0]["body"] == "abc"


def test_a_request_may_come_byte_by_byte(server: Server) -> None:
    with server.tls() as client:
        for byte in request("/slow", "Content-Length: 2", method="POST", body=b"ok"):
            client.sendall(bytes([byte]))
        assert facts(client)["body"] == "ok"


def test_a_chunked_body_is_put_together(server: Server) -> None:
    body = b'3\r\nabc\r\nA;note="1"\r\n0123456789\r\n0\r\n\r\n'
    with server.tls() as client:
        client.sendall(request("/", "Transfer-Encoding: chunked", method="POST", body=body) + request("/next"))
        first = facts(client)
        assert (first["body"], first["length"]) == ("abc0123456789", None)
        assert facts(client)["path"] == "/next"


def test_a_client_that_expects_100_continue_gets_it(server: Server) -> None:
    with server.tls() as client:
        client.sendall(request("/", "Content-Length: 2", "Expect: 100-continue", method="POST"))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"ok")
        assert facts(client)["body"] == "ok"
