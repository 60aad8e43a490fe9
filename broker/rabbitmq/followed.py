"""Answers to many threads, by a journal that may be long: what takes time to read is read in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from broker.rabbitmq.answers import Answers

log = logging.getLogger("portal.rabbitmq")

SHORT_BYTES = 1 << 20  # some 15,000 lines, which take a tenth of a second
WAIT_SECONDS = 0.5  # a node gives up after a second


class FollowedAnswers:
    """The answers of one process to all its threads.

    While a long journal is read, answers are those of the one before, and without one everything is denied. That is
    safe: what a new journal takes away counts as enforced only once its generation was confirmed by an answer, too.
    """

    def __init__(self, new: Callable[[], Answers], is_probe: Callable[[str], bool] = lambda _: False) -> None:
        """``is_probe`` tells whether an identity that is not in the journal is that of a probe certificate."""
        self._new = new
        self._is_probe = is_probe
        self._lock = threading.Lock()
        self._answers = new()
        self._is_reading = False

    def allows(self, question: str, form: Mapping[str, str], since: int = 0) -> bool:
        """Answer a question; see ``Answers.allows_as_read``."""
        identity = form.get("username", "")
        is_probe = not self._answers.knows(identity) and self._is_probe(identity)
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            return False
        try:
            if not self._answers.follow(SHORT_BYTES) and not self._is_reading:
                self._is_reading = True
                threading.Thread(target=self._read, name="rabbitmq journal", daemon=True).start()
            return self._answers.allows_as_read(question, form, is_probe=is_probe, since=since)
        finally:
            self._lock.release()

    def _read(self) -> None:
        try:
            answers = self._new()
            answers.follow()
            with self._lock:
                self._answers = answers
            log.info("the journal was read")
        except Exception:
            log.exception("the journal cannot be read")
        finally:
            self._is_reading = False
