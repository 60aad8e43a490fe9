"""A limit to all that is done over a connection, whatever the other side sends."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def cut_off_after(seconds: float, connected: Callable[[], socket.socket | None]) -> Iterator[None]:
    """Shut the connection down after ``seconds`` and raise ``TimeoutError``.

    ``connected()`` returns the socket that is in use then. A socket's own timeout limits each read, and so does not end
    a server that sends a byte now and then.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        with contextlib.suppress(OSError):
            if (sock := connected()) is not None:
                sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(seconds, 0), expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not expired.is_set():
            raise
    finally:
        timer.cancel()
    if expired.is_set():
        raise TimeoutError
