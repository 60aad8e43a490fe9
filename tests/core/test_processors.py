"""A worker keeps to a processor of its own where there are enough workers to use them all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from core.processors import Processors

SLEEPER = [sys.executable, "-c", "input()"]


class Machine:
    """Stands in for the kernel's record of which processors a process may use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *processors: int) -> None:
        self.allowed = {0: set(processors)}
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(self.allowed[pid]))
        monkeypatch.setattr(os, "sched_setaffinity", lambda pid, chosen: self.allowed.update({pid: set(chosen)}))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    return lambda *processors: Machine(monkeypatch, *processors)


@pytest.mark.parametrize(("number", "kept"), [(0, 2), (1, 5), (2, 2), (3, 5)])
def test_the_workers_share_out_the_processors_that_they_may_use(
    machine: Callable[..., Machine], number: int, kept: int
) -> None:
    here = machine(5, 2)
    Processors().keep_to_one(number, of=4)
    assert here.allowed[0] == {kept}


def test_no_processor_is_left_idle(machine: Callable[..., Machine]) -> None:
    here = machine(0, 1, 2)
    Processors().keep_to_one(0, of=2)
    assert here.allowed[0] == {0, 1, 2}


def test_a_process_started_later_may_use_all_again(machine: Callable[..., Machine]) -> None:
    here = machine(0, 1)
    mine = Processors()
    mine.keep_to_one(1, of=2)
    mine.let_use_all(4711)
    assert here.allowed == {0: {1}, 4711: {0, 1}}


def test_who_kept_to_none_changes_nothing_for_others(machine: Callable[..., Machine]) -> None:
    here = machine(0, 1, 2)
    mine = Processors()
    mine.keep_to_one(1, of=2)
    mine.let_use_all(4711)
    assert here.allowed == {0: {0, 1, 2}}


def test_a_system_that_does_not_allow_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int, _chosen: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    mine = Processors()
    mine.keep_to_one(0, of=1024)
    mine.let_use_all(os.getpid())


@pytest.fixture
def processors_restored() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def test_the_kernel_does_what_was_meant(processors_restored: set[int]) -> None:
    mine = Processors()
    mine.keep_to_one(0, of=len(processors_restored))
    kept = os.sched_getaffinity(0)
    assert len(kept) == 1
    with subprocess.Popen(SLEEPER, stdin=subprocess.PIPE) as child:
        assert os.sched_getaffinity(child.pid) == kept
        mine.let_use_all(child.pid)
        assert os.sched_getaffinity(child.pid) == processors_restored
        child.communicate(b"\n")
