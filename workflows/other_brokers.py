"""Waits for the brokers that this process does not tell: those of agents, and of other nodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from sqlalchemy.engine import Connection

from store import brokers, generations
from store.database import Database
from store.listening import hurry
from store.scope import ALL_TENANTS

# How often a request looks whether other brokers have reported, where no process tells this one: at first, and later.
FIRST_LOOK_SECONDS, LOOK_SECONDS = 0.005, 0.1
NONE_COUNTS = "No broker counts, so that nothing is enforced anywhere: add one by: portal broker add, and let it join."


def pending_at(names: Sequence[str]) -> str:
    """Return a sentence that names the brokers which were not seen to enforce something."""
    shown = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{shown} {'was' if len(names) == 1 else 'were'} not seen to enforce it yet."


class OtherBrokers:
    """What the database says of all brokers, read anew while somebody waits: one may join or come back meanwhile."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._heard = threading.Condition()

    def heard_of(self) -> None:
        """Have those look again who wait, because a broker has reported, or counts no more."""
        with self._heard:
            self._heard.notify_all()

    def wait_for_all(self, generation: int, deadline: float) -> str | None:
        """Return once every broker that counts enforces ``generation``; at the ``deadline`` a sentence why not."""
        return self._wait(generation, deadline, lambda tx: generations.get_broker_state(tx).applied_generation)

    def wait_for_one(self, generation: int, deadline: float) -> str | None:
        """Return once any broker that counts enforces ``generation``; at the ``deadline`` a sentence why not.

        At once if none counts, so that nobody can be let in yet.
        """
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            if not any(one.counts for one in brokers.list_brokers(tx)):
                return NONE_COUNTS
        return self._wait(generation, deadline, brokers.newest_applied)

    def _wait(self, generation: int, deadline: float, enforced: Callable[[Connection], int]) -> str | None:
        pause, has_asked = FIRST_LOOK_SECONDS, self._database.is_sqlite
        while True:
            with self._heard:
                with self._database.snapshot(sees=ALL_TENANTS) as tx:
                    if enforced(tx) >= generation:
                        return None
                if (left := deadline - time.monotonic()) <= 0:
                    return self.problem(generation)
                if has_asked:
                    self._heard.wait(min(pause, left))
            if not has_asked:
                hurry(self._database)
                has_asked = True
            pause = min(2 * pause, LOOK_SECONDS)

    def newest_enforced(self) -> int:
        """Return the newest generation that any broker which counts was seen to enforce."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return brokers.newest_applied(tx)

    def problem(self, generation: int) -> str | None:
        """Return a sentence about the brokers that were not seen to enforce ``generation``; ``None`` if all were."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            if generations.get_broker_state(tx).applied_generation >= generation:
                return None
            behind = brokers.behind(tx, generation)
        return pending_at(behind) if behind else NONE_COUNTS
