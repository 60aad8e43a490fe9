from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import wait_until
from tests.support.serving_process import (
    PATIENCE,
    children,
    facts,
    is_closed,
    make_certificate,
    options,
    request,
    response,
    running,
    start,
)


def failed_start(**changes: Any) -> str:
    with tempfile.TemporaryDirectory() as name:
        make_certificate(Path(name))
        with start(options(Path(name), **changes)) as process:
            output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "ready" not in output
    return errors


@pytest.mark.parametrize(("setting", "variable"), [("bind", "PORTAL_BIND"), ("pki_bind", "PORTAL_PKI_BIND")])
def test_a_port_in_use_is_said_in_a_sentence(setting: str, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        errors = failed_start(**{setting: ["127.0.0.1", port]})
    assert errors == f"Port {port} on 127.0.0.1 is in use; stop what uses it or set {variable}.\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bind": ["192.0.2.1", 8443]}, "192.0.2.1 is not an address of this machine; set PORTAL_BIND.\n"),
        ({"bind": ["no.such.invalid", 8443]}, "The host name no.such.invalid cannot be resolved; set PORTAL_BIND.\n"),
        ({"broken": "startup", "workers": 2}, "The database is from a newer version.\n"),
    ],
)
def test_what_keeps_the_server_from_starting_is_said_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    assert failed_start(**changes) == sentence


def test_a_server_that_one_worker_ends_never_says_that_it_is_ready() -> None:
    # The other worker comes to its end of starting while the server stops, with its ports closed already.
    assert failed_start(broken="one of two", workers=2) == "The database is from a newer version.\n"


def test_a_server_whose_second_process_dies_ends_and_says_so() -> None:
    with running() as server:
        main = server.process.pid
        wait_until(lambda: any(children(child) for child in children(main)))  # it has a worker
        (pki,) = [child for child in children(main) if children(child)]
        os.kill(pki, signal.SIGKILL)
        _, errors = server.process.communicate(timeout=PATIENCE)
        assert server.process.returncode == 1
        assert "The server of PORTAL_PKI_BIND has ended" in errors


def test_nothing_is_left_of_a_server_that_was_killed() -> None:
    with running() as server:
        rest = children(server.process.pid)
        rest += [grandchild for child in rest for grandchild in children(child)]
        server.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in rest))
        for port in (server.port, server.pki_port):
            with pytest.raises(ConnectionRefusedError):
                server.tcp(port)


def test_a_bug_that_keeps_workers_from_starting_ends_the_server() -> None:
    errors = failed_start(broken="bug")
    assert "ZeroDivisionError" in errors
    assert errors.endswith("The portal could not start because of an error in it; the log says where.\n")


def test_a_certificate_that_cannot_be_read_is_said_in_a_sentence(tmp_path: Path) -> None:
    errors = failed_start(certificate=str(tmp_path / "missing.pem"))
    assert errors.startswith("The server certificate ")
    assert "Traceback" not in errors


def test_a_new_certificate_is_used_without_a_restart() -> None:
    with running() as server, server.tls() as kept:
        before = kept.getpeercert()
        make_certificate(server.folder, "renewed")
        give_up = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(ssl.SSLError), server.tls() as client:
                after = client.getpeercert()
                break
            assert time.monotonic() < give_up
        assert after != before
        kept.sendall(request())
        assert facts(kept)["path"] == "/"


def test_a_damaged_certificate_on_disk_changes_nothing() -> None:
    with running() as server:
        context = server.context()
        (server.folder / "cert.pem").write_text("damaged")
        until = time.monotonic() + 2.5  # the server looks once a second, where there are connections
        while time.monotonic() < until:
            with server.secured(context) as client:
                client.sendall(request())
                assert facts(client)["path"] == "/"
        server.process.terminate()
        assert "cannot be used" in server.process.communicate(timeout=PATIENCE)[1]


@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_request_in_flight_is_answered_when_the_server_stops(
    number: signal.Signals, group: bool, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with running(threads=3) as server, server.tls() as idle, server.tls() as client:
        idle.sendall(request())
        assert facts(idle)["path"] == "/"
        client.sendall(request(f"/wait?{fifo}"))
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == "waiting\n"
        (os.killpg if group else os.kill)(server.process.pid, number)
        assert refuses(server.port)  # which a load balancer notices: it is not accepted and then forgotten
        fifo.write_bytes(b"go on")
        answer = response(client)
        assert answer.status == 200
        assert answer.read()
        client.close()
        assert is_closed(idle)
        assert server.process.wait(PATIENCE) == 0


def test_clients_that_were_gone_before_their_handshake_take_no_time_from_a_request_in_flight(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with running(threads=3) as server, server.tls() as client:
        worker = children(server.process.pid)[1]
        os.kill(worker, signal.SIGSTOP)
        for _ in range(3):
            with server.tcp() as gone:
                gone.sendall(b"hello")
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets it
        os.kill(worker, signal.SIGCONT)
        client.sendall(request(f"/wait?{fifo}"))
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == "waiting\n"
        server.process.terminate()
        assert refuses(server.port)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        fifo.write_bytes(b"go on")
        assert response(client).status == 200


def refuses(port: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
        except ConnectionRefusedError:
            return True
    return False


def test_a_worker_that_dies_is_replaced() -> None:
    with running() as server:
        first = server.get()["process"]
        os.kill(first, signal.SIGKILL)
        assert server.get()["process"] != first


def test_the_log_holds_no_request_line() -> None:
    with running() as server:
        for text in (request("/fail?token=secret-1"), b"GET /secret-2 HTTP/9.9\r\n\r\n", b"GET /secret-3\r\n\r\n"):
            with server.tls() as client:
                client.sendall(text)
                response(client).read()
        server.process.terminate()
        _, errors = server.process.communicate(timeout=PATIENCE)
    assert "was refused" in errors
    assert "secret-" not in errors
