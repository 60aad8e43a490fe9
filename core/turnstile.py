"""Lets one thread of a process compute while the others wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Threads that compute at the same time hand Python's lock to each other thousands of times a second, at each call that
# lets go of it for a microsecond; that costs processor time and the even pace of their answers. One after the other,
# each is through before the next begins. It is a courtesy, not a lock: whoever has waited so long goes on beside the
# one inside, who may be waiting for something that nobody thought of.
PATIENCE_SECONDS = 0.05


class Turnstile:
    """Lets threads in one after the other."""

    def __init__(self) -> None:
        self._free = threading.Lock()
        self._mine = threading.local()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Compute within the block, as the only one who does unless that takes long."""
        self._take()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Wait for something within the block and let another in meanwhile; does nothing for who is not inside."""
        if not self._leave():
            yield
            return
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        self._mine.held = self._free.acquire(timeout=PATIENCE_SECONDS)

    def _leave(self) -> bool:
        held: bool = getattr(self._mine, "held", False)
        if held:
            self._mine.held = False
            self._free.release()
        return held


of_requests = Turnstile()
