"""Has the broker obey changes of which the request is answered before that, by people who watch it take hold."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("portal.reconciliation")

PROMPT_SECONDS = 0.4  # which a broker that is well needs at most


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a reconciliation ended: the generation in the broker's files, and the one it was seen to enforce."""

    installed: int
    enforced: int
    problem: str | None = None

    def covers(self, generation: int) -> bool:
        """Return whether the broker enforces ``generation``."""
        return self.enforced >= generation


class PromptAnswers:
    """Runs ``apply`` in one thread for all that ask, as urgently as for a request that waits, and waits but briefly.

    What fails is tried again by the jobs.
    """

    def __init__(self, apply: Callable[[int], Outcome]) -> None:
        """Use ``apply``, which returns once the broker enforces a generation, or has failed to."""
        self._apply = apply
        self._changed = threading.Condition()
        self._wanted = 0
        self._runs = False
        self._outcome = Outcome(0, 0)

    def apply(self, generation: int) -> Outcome:
        """Return how far the broker has come after ``PROMPT_SECONDS`` at most; the thread goes on."""
        with self._changed:
            if self._outcome.covers(generation):
                return self._outcome
            self._wanted = max(self._wanted, generation)
            if not self._runs:
                self._runs, self._outcome = True, Outcome(0, self._outcome.enforced)
                threading.Thread(target=self._run, name="prompt", daemon=True).start()
            self._changed.wait_for(lambda: self._outcome.covers(generation) or not self._runs, PROMPT_SECONDS)
            return self._outcome

    def _run(self) -> None:
        wanted, outcome = -1, self._outcome
        while True:
            with self._changed:
                self._outcome = outcome
                self._runs = self._wanted > wanted
                self._changed.notify_all()
                if not self._runs:
                    return
                wanted = self._wanted
            try:
                outcome = self._apply(wanted)
            except Exception:
                log.exception("reconciliation failed unexpectedly")
                outcome = Outcome(0, outcome.enforced, "Unexpected error; the portal's log has the cause.")
