"""Which processors threads run on.

Threads of one process take turns to run Python. To wake one on another processor takes a message there, and it finds
nothing of its work in that processor's caches: with a worker for each processor it is better to keep each to its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Set

AVAILABLE: Set[int] = frozenset(os.sched_getaffinity(0))  # to this process when it began, see sched_setaffinity(2)


def keep_to_one(number: int, workers: int, available: Set[int] = AVAILABLE) -> None:
    """Keep this thread, and those that it starts from now on, to a processor of their own.

    ``number`` is that of the worker, from 0. Nothing happens unless there are as many processors as ``workers``: others
    would stand idle, or do the work of several workers.
    """
    if len(available) == workers:
        _run_on({sorted(available)[number]})


@contextlib.contextmanager
def on_any() -> Iterator[None]:
    """Start processes in the body of the ``with`` that may run on every processor, whatever this thread keeps to."""
    before = os.sched_getaffinity(0)
    _run_on(AVAILABLE)
    try:
        yield
    finally:
        _run_on(before)


def _run_on(processors: Set[int]) -> None:
    with contextlib.suppress(OSError):  # forbidden, or taken from this process meanwhile: it costs time, nothing else
        os.sched_setaffinity(0, processors)
