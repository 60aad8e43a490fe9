"""Requests to the management API of a RabbitMQ node."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from broker.rabbitmq.management import MAX_ANSWER, Management, password_of, path_of
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.rabbitmq_nodes import RabbitmqNode
from core.setting_values import Address
from tests.support.ports import free_port


class Api:
    """Answers as it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any, str]] = []
        self.answer: tuple[int, bytes] = 200, b"{}"
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                said = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                login = self.headers.get("Authorization", "")
                api.asked.append((self.command, self.path, json.loads(said or b"null"), login))
                status, content = api.answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_PUT = do_DELETE = do_GET  # noqa: N815 - the library's names

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def api() -> Iterator[Api]:
    running = Api()
    yield running
    running.close()


def management(url: str) -> Management:
    return Management(RabbitmqNode("rabbit@a", Address("127.0.0.1", 8883), url, None), "portal", "päss")


@pytest.fixture
def node(api: Api) -> Iterator[Management]:
    made = management(api.url)
    yield made
    made.close()


def soon() -> float:
    return time.monotonic() + 10


def test_a_request_has_the_users_login_and_an_encoded_path(api: Api, node: Management) -> None:
    api.answer = 200, b'[{"name": "/"}]'
    assert node.get(path_of("vhosts", "/"), soon()) == [{"name": "/"}]
    node.put(path_of("vhosts", "acme"), soon(), {"description": "x"})
    node.delete(path_of("vhosts", "acme"), soon())
    login = "Basic " + base64.b64encode("portal:päss".encode()).decode()
    assert api.asked == [
        ("GET", "/api/vhosts/%2F", None, login),
        ("PUT", "/api/vhosts/acme", {"description": "x"}, login),
        ("DELETE", "/api/vhosts/acme", None, login),
    ]


def test_what_is_not_there_is_none(api: Api, node: Management) -> None:
    api.answer = 404, b'{"error": "Object Not Found"}'
    assert node.get(path_of("vhosts", "acme"), soon()) is None


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_user_is_named(api: Api, node: Management, status: int) -> None:
    api.answer = status, b"{}"
    with pytest.raises(BrokerNotEnforcing, match="rabbit@a refuses the user portal"):
        node.get("/api/overview", soon())


@pytest.mark.parametrize(
    "answer",
    [(500, b"{}"), (302, b""), (200, b"{"), (200, b"[" * 100_000), (200, b"1" * (MAX_ANSWER + 1))],
    ids=["status", "redirect", "cut", "deep", "long"],
)
def test_a_bad_answer_is_none(api: Api, node: Management, answer: tuple[int, bytes]) -> None:
    api.answer = answer
    with pytest.raises(BrokerUnavailable, match="rabbit@a"):
        node.get("/api/overview", soon())


def test_a_node_that_does_not_answer_is_named_without_the_password() -> None:
    for deadline in (soon(), time.monotonic() - 1):
        with pytest.raises(BrokerUnavailable, match="rabbit@a") as caught:
            management(f"http://127.0.0.1:{free_port()}").get("/api/overview", deadline)
        assert "päss" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [("secret\n", 0o600, ""), ("secret", 0o640, ""), ("secret", 0o644, "open to others"), ("", 0o600, "one line")],
)
def test_the_password_is_read_from_a_file_of_the_portal_alone(
    tmp_path: Path, content: str, mode: int, said: str
) -> None:
    path = tmp_path / "password"
    path.write_text(content)
    path.chmod(mode)
    settings = Settings.from_env({}).model_copy(update={"rabbitmq_password_file": path})
    if not said:
        assert password_of(settings) == "secret"
        return
    with pytest.raises(BrokerUnavailable, match=said) as caught:
        password_of(settings)
    assert "secret" not in str(caught.value)
