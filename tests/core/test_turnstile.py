"""One thread computes at a time, and none waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from core import turnstile
from core.turnstile import Turnstile


def test_one_is_inside_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstile, "PATIENCE_SECONDS", 60)
    gate, inside, most = Turnstile(), [], []

    def compute(number: int) -> None:
        with gate.inside():
            inside.append(number)
            most.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(compute, range(200)))
    assert set(most) == {1}


def test_another_is_let_in_while_one_waits_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstile, "PATIENCE_SECONDS", 60)
    gate, done = Turnstile(), threading.Event()

    def compute() -> None:
        with gate.inside():
            done.set()

    with ThreadPoolExecutor(1) as pool, gate.inside():
        other = pool.submit(compute)
        with gate.outside():
            assert done.wait(10)
        other.result(10)


def test_whoever_has_waited_long_goes_in_beside_the_one_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstile, "PATIENCE_SECONDS", 0.001)
    gate = Turnstile()

    def compute() -> str:
        with gate.inside():
            return "through"

    with ThreadPoolExecutor(1) as pool, gate.inside():
        assert pool.submit(compute).result(10) == "through"
    with gate.inside():  # and whoever came in beside has not left in another's place
        pass


def test_outside_means_nothing_to_who_is_not_inside() -> None:
    gate = Turnstile()
    with gate.outside(), gate.inside(), gate.outside(), gate.outside(), gate.inside():
        pass
