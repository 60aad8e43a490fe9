"""Standard streams that are closed, or cannot be written to: a sentence and an exit status, not an unexpected error.

Both programs use it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class OutputFailed(OSError):
    """Standard output cannot be written to; its text is a sentence for the user."""


class OutputClosed(BrokenPipeError):
    """The reader of standard output, such as head, has ended."""


class _Output(io.FileIO):
    """Standard output, which says why it cannot be written to."""

    def write(self, data: Any, /) -> int:
        """Write; raises ``OutputFailed``, and ``OutputClosed`` if the reader has ended."""
        try:
            return super().write(data) or 0
        except BrokenPipeError as error:
            raise OutputClosed(error.errno, error.strerror) from None
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
            raise OutputFailed(f"Standard output cannot be written to: {reason}.") from None


class _Messages(io.FileIO):
    """Standard error, which swallows what cannot be written to it: the exit status tells the outcome, too."""

    def write(self, data: Any, /) -> int:
        """Write; return how many bytes there were, even if they went nowhere."""
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def prepare() -> None:
    """Make the standard streams fail as this module's classes say; open those that are closed.

    Else a file would get the number of a closed one. Streams that are not those of the process stay as they are.
    """
    if sys.stdin is None:
        sys.stdin = open(_opened(0, os.O_RDONLY), encoding="utf-8")  # noqa: SIM115 - until the process ends
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        # Not for writing: what is written to a closed output fails, as it does in other programs.
        descriptor = _opened(1, os.O_RDONLY) if sys.stdout is None else 1
        sys.stdout = _text(_Output(descriptor, "w", closefd=False), sys.stdout)
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        descriptor = _opened(2, os.O_WRONLY) if sys.stderr is None else 2
        sys.stderr = _text(_Messages(descriptor, "w", closefd=False), sys.stderr, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # the terminal may lack letters of a name


def _text(raw: io.FileIO, before: Any, *, line_buffering: bool = False) -> io.TextIOWrapper:
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, line_buffering=line_buffering or raw.isatty())


def _opened(number: int, flags: int) -> int:
    """Open /dev/null under the number of a stream that is closed, and return the number."""
    descriptor = os.open(os.devnull, flags)
    if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)
    return number


def drop_output() -> None:
    """Keep the interpreter from reporting, when it exits, what it could not write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Exit with status 1 if what the block prints cannot be written, with a sentence unless the reader has ended."""
    prepare()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputClosed:
        drop_output()
        sys.exit(1)
    except OutputFailed as error:
        sys.stderr.write(f"Error: {error}\n")
        drop_output()
        sys.exit(1)
