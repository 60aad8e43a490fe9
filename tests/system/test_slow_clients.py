"""Clients that are slow, or never close, hold up nobody else, also without nginx in front."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

import pytest

from tests.support.deployment import PLAIN, Deployment, deployed

pytestmark = pytest.mark.system

SLOW = 24  # clients, for four threads
# The clients that are slow are at an address of their own. Else an operator who gets no processor for a quarter of a
# second would be as slow as they are, and cut off.
ELSEWHERE = "127.0.0.2", 0
UNFINISHED = "Content-Type: application/json\r\nContent-Length: 4000\r\n\r\n{"
SENT = {
    "a body that is read": f"POST /enroll HTTP/1.1\r\nHost: portal\r\n{UNFINISHED}",
    "a body that is refused unread": f"POST /register HTTP/1.1\r\nHost: portal\r\n{UNFINISHED}",
    "a head": "GET / HTTP/1.1\r\nHost:",
    "an answer after which nobody closes": "GET /healthz HTTP/1.1\r\nHost: portal\r\nConnection: close\r\n\r\n",
}


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with deployed(PORTAL_REQUEST_TIMEOUT="600", PORTAL_THREADS="4", PORTAL_WORKERS="1") as running:
        running.register()  # without a connection kept for what follows
        running.session.close()
        yield running


def is_answered(deployment: Deployment) -> bool:
    """Whether an operator is, who comes after all the others."""
    answer = deployment.session.post(f"{deployment.url}/register", json=PLAIN, timeout=20)
    deployment.session.close()
    return answer.status_code == 201


def slow_client(url: SplitResult) -> socket.socket:
    return socket.create_connection((url.hostname, url.port), timeout=20, source_address=ELSEWHERE)


@pytest.mark.parametrize("sent", SENT)
def test_an_operator_is_answered_while_many_clients_do_not_finish(deployment: Deployment, sent: str) -> None:
    url, context = urlsplit(deployment.url), ssl.create_default_context(cafile=deployment.operator["PORTAL_CA"])
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW):
            plain = stack.enter_context(slow_client(url))
            client = context.wrap_socket(plain, server_hostname=url.hostname, do_handshake_on_connect=False)
            stack.enter_context(client)
            with contextlib.suppress(OSError):  # which may be cut off meanwhile
                client.do_handshake()
                client.sendall(SENT[sent].encode())
        assert is_answered(deployment)


def test_an_operator_is_answered_while_many_handshakes_do_not_end(deployment: Deployment) -> None:
    url = urlsplit(deployment.url)
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW):
            client = stack.enter_context(slow_client(url))
            client.sendall(b"\x16\x03\x01")
        assert is_answered(deployment)


def test_a_crl_is_fetched_while_many_clients_of_the_plain_listener_do_not_close(deployment: Deployment) -> None:
    url = urlsplit(deployment.pki_url)
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW):
            client = stack.enter_context(slow_client(url))
            client.sendall(b"GET /ca.pem HTTP/1.1\r\nHost: portal\r\nConnection: close\r\n\r\n")
        assert deployment.session.get(f"{deployment.pki_url}/ca.pem", timeout=20).status_code == 200
