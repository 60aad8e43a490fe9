"""A server with a small application, run as a process by the tests of serving."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import ssl
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from config import Settings
from core.errors import PortalError, StartupError
from core.setting_values import Address
from web import worker
from web.serving import Listener, serve

BIG = 20 * 1024 * 1024
StartResponse = Callable[[str, list[tuple[str, str]]], Any]


def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    try:
        return answer(environ, start_response)
    except PortalError as error:
        start_response("400 Bad Request", [("Content-Type", "text/plain"), ("Content-Length", str(len(error.code)))])
        return [error.code.encode()]


def pki_application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    return application(environ, start_response)


def answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if path == "/register/bulk" and environ["portal.listener"] == "main":
        return stream(environ, start_response)
    body = environ["wsgi.input"].read()
    if path == "/fail":
        raise RuntimeError("The secret of the application.")
    if path == "/nothing":
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
        return []
    if path == "/pieces":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return pieces()
    if path == "/wait":  # tells that it has begun, then waits until the test opens the other end
        print("waiting", flush=True)
        Path(environ["QUERY_STRING"]).read_bytes()
    content = b"x" * BIG if path == "/big" else json.dumps(facts(environ, body)).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(content)))])
    return [content]


def facts(environ: dict[str, Any], body: bytes) -> dict[str, Any]:
    return {
        "method": environ["REQUEST_METHOD"],
        "path": environ["PATH_INFO"],
        "body": body.decode("latin-1") if len(body) < 1000 else len(body),
        "listener": environ["portal.listener"],
        "scheme": environ["wsgi.url_scheme"],
        "port": environ["SERVER_PORT"],
        "length": environ.get("CONTENT_LENGTH"),
        "address": environ["REMOTE_ADDR"],
        "tls": getattr(environ["gunicorn.socket"], "version", lambda: None)(),
        "process": os.getpid(),
        "processors": sorted(os.sched_getaffinity(0)),
        "certificate": hashlib.sha256(shown_certificate(environ["gunicorn.socket"])).hexdigest(),
    }


def shown_certificate(connection: Any) -> bytes:
    return (connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLSocket) else None) or b""


def stream(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """Answers each part of the body with its length as soon as it is there, or as the query says."""
    start_response("200 OK", [("Content-Type", "application/x-ndjson")])
    if environ["QUERY_STRING"] == "unread":
        return [b"not for you"]
    if environ["QUERY_STRING"] == "file":
        file = environ["wsgi.input"]
        return [json.dumps([file.read(3).decode(), file.read(2).decode(), len(file.read()), len(file.read())]).encode()]
    return lengths(environ["wsgi.input"])


def lengths(body: Any) -> Iterator[bytes]:
    try:
        while part := body.read_some():
            yield b"%d\n" % len(part)
    except PortalError as error:
        yield error.code.encode()


def pieces() -> Iterator[bytes]:
    for number in range(1000):
        yield b"%06d\n" % number


def is_the_other(mark: Path) -> bool:
    """Whether another process has asked this before."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def until_told_to_end() -> None:
    """Wait for SIGTERM, which is then handled as it would have been."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.sigwait({signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def main(options: dict[str, Any]) -> int:
    certificate, key = Path(options.pop("certificate")), Path(options.pop("key"))
    client_cas = certificate.with_name("client-cas.pem")
    broken = options.pop("broken", None)
    for name in ("bind", "pki_bind"):
        options[name] = Address(*options[name])
    worker.IDLE_SECONDS = options.pop("idle_seconds", worker.IDLE_SECONDS)
    settings = Settings.from_env({}).model_copy(update=options)

    def make_app(listener: Listener) -> Callable[..., Iterable[bytes]]:
        return application if listener == "main" else pki_application

    def begin(app: Any) -> None:
        if app is pki_application:
            return
        if broken == "one of two" and is_the_other(certificate.with_name("first")):
            until_told_to_end()
        elif broken == "the other" and is_the_other(certificate.with_name("first")):
            raise StartupError("The disk is full.")
        elif broken in ("startup", "one of two"):
            raise StartupError("The database is from a newer version.")
        elif broken == "bug":
            raise ZeroDivisionError

    try:
        return serve(
            settings,
            make_app,
            certificate=certificate,
            key=key,
            client_cas=client_cas,
            on_ready=lambda: print("ready", flush=True),
            on_worker_start=begin,
        )
    except PortalError as error:
        print(error.detail, file=sys.stderr)
        return 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    sys.exit(main(json.loads(sys.argv[1])))
