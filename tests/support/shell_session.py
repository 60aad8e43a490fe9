"""A shell whose commands see a terminal, as a reader of the documentation has one."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

SECONDS = 60.0
END = "\x1e"  # printed after each command


class ShellSession:
    """One bash, without colours, 100 columns wide."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=folder,
            env=environment | {"NO_COLOR": "1", "COLUMNS": "100", "TERM": "xterm"},
            stdin=subprocess.PIPE,
            stdout=slave,
            stderr=slave,
            text=True,
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(SECONDS)
        os.close(self._master)

    def run(self, command: str) -> str:
        """Run a command; returns what the terminal shows, without the spaces that end a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{{ {command}\n}} </dev/null\nprintf '\\036'\n")
        self._process.stdin.flush()
        seen, deadline = b"", time.monotonic() + SECONDS
        while END.encode() not in seen:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{command} did not end; it printed {seen!r}"
            seen += os.read(self._master, 65536)
        lines = seen.decode().removesuffix(END).replace("\r\n", "\n").splitlines()
        return "\n".join(line.rstrip() for line in lines).strip("\n")


MASKS = [
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<id>"),
    (r"\b[0-9a-f]{64}\b", "<fingerprint>"),
    (r"\b[0-9a-f]{40}\b", "<serial number>"),
    (r"\b[0-9a-f]{16}\b", "<request id>"),
    (r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?( UTC|Z)?)?", "<time>"),
    # The portal hears of a connection within two seconds, under the control by files never.
    (r"(?m)(?<=<time>)  (just now|now|never|-)$", "  <seen>"),
    (r"(127\.0\.0\.1|localhost):\d{4,5}\b", r"\1:<port>"),
    # The broker refuses while the client still speaks: which of them the client sees is a matter of moments.
    (r"Error: (Protocol error|The connection was lost\.|A TLS error occurred\.)", "Error: <refused>"),
    (r"OpenSSL Error\[0\]: .*", "<TLS alert>"),
]


def masked(text: str) -> str:
    """Text with everything that differs from one time to the next replaced by what it is."""
    for pattern, name in MASKS:
        text = re.sub(pattern, name, text)
    return text
