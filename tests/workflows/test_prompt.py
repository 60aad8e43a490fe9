"""A request that is answered before the broker obeys: one thread goes on for all of them, as urgently as a request."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from workflows import prompt
from workflows.prompt import Outcome, PromptAnswers


class SlowBroker:
    """Obeys once it is released."""

    def __init__(self) -> None:
        self.released, self.asked = threading.Event(), threading.Event()
        self.generations: list[int] = []

    def apply(self, generation: int) -> Outcome:
        self.generations.append(generation)
        self.asked.set()
        assert self.released.wait(30)
        return Outcome(generation, generation)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowBroker]:
    monkeypatch.setattr(prompt, "PROMPT_SECONDS", 0.01)
    slow = SlowBroker()
    yield slow
    slow.released.set()


def ended(answers: PromptAnswers, generation: int) -> Outcome:
    """Return the outcome once the thread has one that covers the generation."""
    for _ in range(3000):
        if (outcome := answers.apply(generation)).covers(generation):
            return outcome
    raise AssertionError("it never ends")


def test_a_broker_that_is_well_is_waited_for() -> None:
    assert PromptAnswers(lambda generation: Outcome(generation, generation)).apply(7) == Outcome(7, 7)


def test_a_slow_one_is_not_and_there_is_no_problem_yet(broker: SlowBroker) -> None:
    answers = PromptAnswers(broker.apply)
    outcome = answers.apply(7)
    assert (outcome.covers(7), outcome.problem) == (False, None)
    broker.released.set()
    assert ended(answers, 7).problem is None


def test_all_that_ask_meanwhile_share_one_thread_and_one_more_reconciliation(broker: SlowBroker) -> None:
    answers, before = PromptAnswers(broker.apply), threading.active_count()
    answers.apply(1)
    assert broker.asked.wait(10)
    for generation in range(2, 50):
        assert not answers.apply(generation).covers(generation)
    assert threading.active_count() <= before + 1
    broker.released.set()
    ended(answers, 49)
    assert broker.generations == [1, 49]


def test_what_fails_is_told_with_the_problem_and_can_be_asked_for_again() -> None:
    outcomes = iter([Outcome(7, 3, "The broker does not answer in time."), Outcome(7, 7)])
    answers = PromptAnswers(lambda _generation: next(outcomes))
    assert answers.apply(7).problem == "The broker does not answer in time."
    assert answers.apply(7).covers(7)


def test_what_goes_wrong_unexpectedly_ends_no_thread_without_an_answer() -> None:
    calls: list[int] = []

    def breaks(generation: int) -> Outcome:
        calls.append(generation)
        raise RuntimeError("no words")

    answers = PromptAnswers(breaks)
    assert answers.apply(7).problem == "Unexpected error; the portal's log has the cause."
    answers.apply(7)
    assert calls == [7, 7]
