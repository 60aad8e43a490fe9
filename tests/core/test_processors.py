"""A worker keeps to a processor of its own where there is one for each; the processes that it starts do not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Set
from functools import partial

import pytest

from core.processors import AVAILABLE, keep_to_one, on_any

SHOWN = "import os; print(*sorted(os.sched_getaffinity(0)))"


def of_a_thread(*steps: Callable[[], object]) -> list[Set[int]]:
    """What a thread may run on after each of the steps; the thread that runs the test stays as it is."""
    seen: list[Set[int]] = []

    def run() -> None:
        for step in steps:
            step()
            seen.append(frozenset(os.sched_getaffinity(0)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return seen


def test_each_worker_has_one_processor_if_there_are_as_many() -> None:
    workers = len(AVAILABLE)
    own = [of_a_thread(partial(keep_to_one, number, workers)) for number in range(workers)]
    assert own == [[{processor}] for processor in sorted(AVAILABLE)]


@pytest.mark.parametrize("workers", [len(AVAILABLE) + 1, len(AVAILABLE) - 1])
def test_none_keeps_to_one_if_others_would_stand_idle_or_have_two_workers(workers: int) -> None:
    assert of_a_thread(lambda: keep_to_one(0, workers)) == [AVAILABLE]


def test_processes_that_a_worker_starts_run_on_any_and_the_worker_keeps_to_its_own() -> None:
    said: list[str] = []

    def start() -> None:
        with on_any():
            said.append(subprocess.check_output([sys.executable, "-c", SHOWN], text=True))

    kept, after = of_a_thread(lambda: keep_to_one(0, len(AVAILABLE)), start)
    assert {*map(int, said[0].split())} == AVAILABLE
    assert after == kept == {min(AVAILABLE)}


def test_a_processor_that_this_process_has_not_is_no_error() -> None:
    assert of_a_thread(lambda: keep_to_one(0, 1, {100_000})) == [AVAILABLE]
