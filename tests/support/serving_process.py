"""Starts the server of the tests of serving, then speaks HTTP to it byte by byte."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0  # seconds after which a test gives up; nothing waits that long


CHUNKED = "Transfer-Encoding: chunked"
# gunicorn leaves it to the interpreter to close some of its files.
WARNINGS = ("-W", "error", "-W", "ignore::ResourceWarning")


def make_certificate(folder: Path, name: str = "localhost") -> None:
    """Write cert.pem and key.pem, each by a rename."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    new = [folder / "new-key.pem", folder / "new-cert.pem"]
    files = ["-keyout", str(new[0]), "-out", str(new[1])]
    subprocess.run([*command, f"/CN={name}", *names, *files], check=True, capture_output=True)
    new[0].rename(folder / "key.pem")
    new[1].rename(folder / "cert.pem")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


@dataclass
class Server:
    folder: Path
    port: int
    pki_port: int
    process: subprocess.Popen[str]

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "cert.pem"))

    def tcp(self, port: int | None = None) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.port), timeout=PATIENCE)

    def tls(self) -> ssl.SSLSocket:
        return self.secured(self.context())

    def secured(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        with contextlib.ExitStack() as stack:
            client = context.wrap_socket(
                stack.enter_context(self.tcp()), server_hostname="localhost", do_handshake_on_connect=False
            )
            stack.enter_context(client)
            client.do_handshake()
            stack.pop_all()
            return client

    def get(self, path: str = "/") -> dict[str, Any]:
        with contextlib.closing(self.tls()) as client:
            client.sendall(request(path))
            return facts(client)


def request(path: str = "/", *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def response(client: socket.socket, method: str = "GET") -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(client, method=method)
    answer.begin()
    return answer


def facts(client: socket.socket) -> dict[str, Any]:
    answer = response(client)
    assert answer.status == 200
    return dict(json.loads(answer.read()))


def refusal(client: socket.socket) -> tuple[int, str]:
    """Status and text of an answer after which the server closes."""
    answer = response(client)
    assert answer.headers["Connection"] == "close"
    text = answer.read().decode()
    assert is_closed(client)
    return answer.status, text


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    port, pki_port = free_ports(2)
    return {
        "certificate": str(folder / "cert.pem"),
        "key": str(folder / "key.pem"),
        "bind": ["127.0.0.1", port],
        "pki_bind": ["127.0.0.1", pki_port],
        "max_body_bytes": 4096,
        "threads": 2,
        "workers": 1,
    } | changes


def start(chosen: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *WARNINGS, str(ROOT / "tests" / "support" / "serving_app.py"), json.dumps(chosen)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "PATH": os.environ["PATH"]},
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def running(**changes: Any) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_certificate(folder)
        chosen = options(folder, **changes)
        with start(chosen) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n", process.communicate()[1]
                yield Server(folder, chosen["bind"][1], chosen["pki_bind"][1], process)
            finally:
                process.terminate()
                process.communicate(timeout=PATIENCE)
