"""Lets each worker process see whether it has more connections than the others."""

from __future__ import annotations

import mmap

SLOTS = 256  # more than the most workers, even while they are being replaced
UNUSED = -1
TOLERANCE = 1.25


class ConnectionCounts:
    """A count for each worker, in memory that they share; made in the master before it forks."""

    def __init__(self) -> None:
        self._counts = memoryview(mmap.mmap(-1, 4 * SLOTS)).cast("i")
        for slot in range(SLOTS):
            self._counts[slot] = UNUSED

    def claim(self) -> int:
        """In the master, a slot for a new worker."""
        slot = next((slot for slot in range(SLOTS - 1) if self._counts[slot] == UNUSED), SLOTS - 1)
        self._counts[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """In the master, after the worker has ended."""
        self._counts[slot] = UNUSED

    def of(self, slot: int) -> ConnectionCount:
        """What a worker itself uses."""
        return ConnectionCount(self._counts, slot)


class ConnectionCount:
    """The count of one worker among the others."""

    def __init__(self, counts: memoryview, slot: int) -> None:
        self._counts = counts
        self._slot = slot

    def set(self, count: int) -> None:
        """Publish how many connections this worker has."""
        self._counts[self._slot] = count

    def is_ahead(self) -> bool:
        """Whether another worker has so many fewer that it should take the next connection."""
        least = min(count for count in self._counts if count != UNUSED)
        return int(self._counts[self._slot]) > TOLERANCE * least
