"""Shares the portal among tenants: one that sends many requests at once leaves room for those of the others."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from core.errors import TenantBusy
from core.served_tenants import ServedTenants

AT_ONCE = 1  # requests of a tenant that a process works on while others are served
YIELD_SECONDS = 0.05  # for so long the next request of a tenant with several waits for those of other tenants
PAUSE_SECONDS = 0.003  # for so long after its last request a tenant with one at a time still goes first
LOOK_SECONDS = 0.001  # between two looks at what other processes work on
OTHERS_SECONDS = 2.0  # for so long after its last request another tenant counts as one that is served
WAIT_SECONDS = 10.0
_give_up: ContextVar[Callable[[], None] | None] = ContextVar("give_up_share", default=None)


def give_up_share() -> None:
    """Let the tenant's next request be worked on, as what is left of this one is to wait, for the broker."""
    if (give_up := _give_up.get()) is not None:
        give_up()


class FairShare:
    """Counts the requests of each tenant in this process; nothing waits while all processes serve one tenant alone.

    While another one is served, too, a tenant has ``AT_ONCE`` requests worked on, and its others wait in a thread each,
    as those do that have given up their share: of all threads it may hold three quarters. The next of those that wait
    lets requests of other tenants go first, in all processes those of tenants that have one at a time.
    """

    def __init__(self, threads: int, served: ServedTenants) -> None:
        """Share so many threads of each process that ``served`` is shared with."""
        self._held_most = max(AT_ONCE, threads * 3 // 4)
        self._place = served.place()
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # a request has
        self._queues: dict[str, deque[threading.Condition]] = {}  # of requests that wait
        self._held: Counter[str] = Counter()  # threads
        self._working: Counter[str] = Counter()
        self._seen = [("", 0.0), ("", 0.0)]  # the two tenants that were served last, and when

    @contextmanager
    def work_of(self, tenant_id: str) -> Iterator[None]:
        """Do the body of the ``with`` when it is the tenant's turn; raises ``TenantBusy`` if that has too many."""
        with self._lock:
            self._note(tenant_id)
            if self._held[tenant_id] >= self._held_most and self._others_are_served(tenant_id):
                raise _busy()
            self._held[tenant_id] += 1
        try:
            with self._share_of(tenant_id):
                yield
        finally:
            with self._lock:
                _less(self._held, tenant_id)
                self._note(tenant_id)

    @contextmanager
    def _share_of(self, tenant_id: str) -> Iterator[None]:
        with self._lock:
            if self._must_wait(tenant_id) or (tenant_id in self._queues and self._others_are_served(tenant_id)):
                self._wait(tenant_id)
            self._working[tenant_id] += 1
            self._call_next(tenant_id)  # if others are served no more
            if goes_first := tenant_id not in self._queues:
                self._place.puts_first(tenant_id, time.monotonic() + YIELD_SECONDS)
        with contextlib.ExitStack() as share:
            share.callback(self._give_up, tenant_id, goes_first=goes_first)
            token = _give_up.set(share.close)  # which gives it up once only
            try:
                yield
            finally:
                _give_up.reset(token)

    def _give_up(self, tenant_id: str, *, goes_first: bool) -> None:
        with self._lock:
            _less(self._working, tenant_id)
            if goes_first and tenant_id not in self._queues:
                self._place.puts_first(tenant_id, time.monotonic() + PAUSE_SECONDS)
            self._ended.notify_all()
            self._call_next(tenant_id)

    def _wait(self, tenant_id: str) -> None:
        turn = threading.Condition(self._lock)
        queue = self._queues.setdefault(tenant_id, deque())
        queue.append(turn)
        self._place.puts_first(tenant_id, 0.0)  # no longer
        try:
            if not turn.wait_for(lambda: queue[0] is turn and not self._must_wait(tenant_id), WAIT_SECONDS):
                raise _busy()
            self._let_others_go_first(tenant_id)
        finally:
            queue.remove(turn)
            if not queue:
                del self._queues[tenant_id]

    def _let_others_go_first(self, tenant_id: str) -> None:
        until = time.monotonic() + YIELD_SECONDS
        while (now := time.monotonic()) < until:
            if self._working.total() == self._working[tenant_id] and not self._place.put_another_first(tenant_id, now):
                return
            self._ended.wait(min(LOOK_SECONDS, until - now))

    def _call_next(self, tenant_id: str) -> None:
        if (queue := self._queues.get(tenant_id)) and not self._must_wait(tenant_id):
            queue[0].notify()

    def _must_wait(self, tenant_id: str) -> bool:
        return self._working[tenant_id] >= AT_ONCE and self._others_are_served(tenant_id)

    def _others_are_served(self, tenant_id: str) -> bool:
        return any(other != tenant_id for other in self._held) or self._place.serve_others(
            tenant_id, time.monotonic() - OTHERS_SECONDS
        )

    def _note(self, tenant_id: str) -> None:
        other = next((seen for seen in self._seen if seen[0] != tenant_id), ("", 0.0))
        self._seen = [(tenant_id, time.monotonic()), other]
        self._place.serves(*self._seen)


def _less(counter: Counter[str], tenant_id: str) -> None:
    counter[tenant_id] -= 1
    if not counter[tenant_id]:
        del counter[tenant_id]


def _busy() -> TenantBusy:
    return TenantBusy(
        "The tenant has as many requests under way as it may beside those of others; try again in a second.", 1
    )
