"""Ctrl-C before a program has imported its modules, and after its command: an exit status, no traceback.

Both programs use it. While a command runs, Ctrl-C is a ``KeyboardInterrupt``, so that it can clean up.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def exit_at_once() -> None:
    """Have Ctrl-C end the process; where it is ignored, as in a script's background, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Have Ctrl-C raise ``KeyboardInterrupt`` in the block, if it would end the process."""
    if signal.getsignal(signal.SIGINT) is not _exit:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    """Exit without what the interpreter does at its end, which could be interrupted, too."""
    with contextlib.suppress(OSError):
        os.write(2, b"\n")  # the prompt is to begin a line, not to follow ^C
    os._exit(INTERRUPTED)
