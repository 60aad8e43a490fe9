"""The command line on a terminal of its own, which a test reads and types at."""

from __future__ import annotations

import os
import pty
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support import programs
from tests.support.cli_session import Session

DEADLINE = 20.0  # seconds; only a test that fails takes so long


class Terminal:
    """The command line on a terminal of its own: ``expect`` reads until a text has come, ``end`` until its end."""

    def __init__(self, process: programs.Process, descriptor: int) -> None:
        self._process = process
        self._descriptor = descriptor
        self.seen = ""

    def _read(self) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], DEADLINE)
        assert ready, f"nothing more came after: {self.seen}"
        try:
            content = os.read(self._descriptor, 65536)
        except OSError:  # how Linux ends a terminal that nobody has open
            return False
        self.seen += content.decode().replace("\r\n", "\n")
        return bool(content)

    def expect(self, text: str) -> None:
        start = getattr(self, "_from", 0)
        while text not in self.seen[start:]:
            assert self._read(), f"{text!r} is not in: {self.seen}"
        self._from = self.seen.index(text, start) + len(text)

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> int:
        while self._read():
            pass
        return self._process.wait(DEADLINE)


@contextmanager
def terminal(session: Session, *args: str, **environment: str) -> Iterator[Terminal]:
    mine, theirs = pty.openpty()
    with open(theirs, "r+b", buffering=0) as other_end:
        process = programs.start(
            programs.CLI,
            args,
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
            cwd=session.folder,
            env={**session.full_environment(), "TERM": "xterm-256color", "COLUMNS": "120", **environment},
            start_new_session=True,
        )
    try:
        yield Terminal(process, mine)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(mine)
