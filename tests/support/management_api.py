"""A small fake of the management API of RabbitMQ nodes, for what real nodes do not do on demand."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Answer = tuple[int, Any] | bytes | None  # a status with JSON, all bytes of an answer, or none until the end


class FakeManagement:
    """Answers each request as ``answer`` does, by its method and path, and remembers it in ``asked``."""

    def __init__(self, answer: Callable[[str, str], Answer]) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answer = answer
        self._over = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.asked.append((self.command, self.path))
                said = fake.answer(self.command, self.path)
                with contextlib.suppress(OSError):
                    if said is None:
                        fake._over.wait(30)
                        self.close_connection = True
                    elif isinstance(said, bytes):
                        self._trickle(said)
                    else:
                        self._send(*said)

            do_DELETE = do_PUT = do_GET  # noqa: N815 - the library's names

            def _send(self, status: int, said: Any) -> None:
                content = b"" if status == 204 else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _trickle(self, said: bytes) -> None:
                """Send byte after byte, none later than a time-out of each."""
                self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                for byte in said:
                    self.wfile.write(bytes([byte]))
                    if fake._over.wait(0.05):
                        return

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
