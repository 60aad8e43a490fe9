"""Shares the portal among tenants: one that sends many requests at once leaves room for those of the others."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from core.errors import TenantBusy
from core.served_tenants import ServedTenants

AT_ONCE = 1  # requests of a tenant that a process works on while others are served
# How long the next request of a tenant with several waits for those of other tenants: in other processes; in its own,
# which has one lock of the interpreter for all of its threads; if another one waits no longer, too, and is worked on.
YIELD_SECONDS = 0.05
NEAR_SECONDS = 0.1
LAST_SECONDS = 0.2
GIVE_WAY_SECONDS = 0.02  # how long one that is worked on waits at most, each time that it gives way
PAUSE_SECONDS = 0.005  # for so long after its last request a tenant with one at a time still goes first
LOOK_SECONDS = 0.001  # between two looks at what other processes work on
OTHERS_SECONDS = 2.0  # for so long after its last request another tenant counts as one that is served
WAIT_SECONDS = 10.0
_give_up: ContextVar[Callable[[], None] | None] = ContextVar("give_up_share", default=None)
_give_way: ContextVar[Callable[[], None] | None] = ContextVar("give_way", default=None)


def give_up_share() -> None:
    """Let the tenant's next request be worked on, as what is left of this one is to wait, for the broker."""
    if (give_up := _give_up.get()) is not None:
        give_up()


def give_way() -> None:
    """Wait a moment if the request's tenant has others in this process, and works beside a tenant that has one.

    For a caller that holds nothing that others wait for, such as the lock of a database.
    """
    if (let_others_end := _give_way.get()) is not None:
        let_others_end()


class FairShare:
    """Counts the requests of each tenant in this process; nothing waits while all processes serve one tenant alone.

    While another one is served, too, a tenant has ``AT_ONCE`` requests worked on, and its others wait in a thread each,
    as those do that have given up their share: of all threads it may hold three quarters. The next of those that wait
    lets requests of other tenants go first, in all processes those of tenants that have one at a time. Those never end,
    where such a tenant sends one after the other: so it is worked on beside them after a time, one in all processes.
    """

    def __init__(self, threads: int, served: ServedTenants) -> None:
        """Share so many threads of each process that ``served`` is shared with."""
        self._held_most = max(AT_ONCE, threads * 3 // 4)
        self._place = served.place()
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # a request has
        self._queues: dict[str, deque[threading.Condition]] = {}  # of requests that wait
        self._held: Counter[str] = Counter()  # threads
        self._sending: Counter[str] = Counter()  # threads that send long answers, to clients that may be slow
        self._working: Counter[str] = Counter()
        self._began: dict[str, float] = {}  # when the last of those was, that are worked on
        self._first, self._first_until = "", 0.0  # the tenant that this process has put first last
        self._beside = ""  # the one whose request is worked on beside those that go first
        self._seen = [("", 0.0), ("", 0.0)]  # the two tenants that were served last, and when

    @contextmanager
    def work_of(self, tenant_id: str) -> Iterator[None]:
        """Do the body of the ``with`` when it is the tenant's turn; raises ``TenantBusy`` if that has too many."""
        with self._lock:
            self._note(tenant_id)
            held = self._held[tenant_id] + self._sending[tenant_id]
            if held >= self._held_most and self._others_are_served(tenant_id):
                raise _busy()
            self._held[tenant_id] += 1
        try:
            with self._share_of(tenant_id):
                yield
            self._give_way(tenant_id)  # before the answer is sent, and the tenant's next request comes
        finally:
            with self._lock:
                _less(self._held, tenant_id)
                self._note(tenant_id)

    def in_parts(self, tenant_id: str, parts: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the parts of a long answer: its thread is one of the tenant's, and each part is made in its turn.

        A client that reads slowly holds a thread, and holds up no other request of its tenant. Raises ``TenantBusy``.
        """
        with self._lock:
            self._sending[tenant_id] += 1  # of which one may be too many: its request was counted when it came
        try:
            while True:
                with self._share_of(tenant_id):
                    part = next(parts, None)
                if part is None:
                    return
                if part:
                    yield part
        finally:
            with self._lock:
                _less(self._sending, tenant_id)

    @contextmanager
    def _share_of(self, tenant_id: str) -> Iterator[None]:
        with self._lock:
            if must_wait := self._must_wait(tenant_id) or (
                tenant_id in self._queues and self._others_are_served(tenant_id)
            ):
                self._wait(tenant_id)
            self._working[tenant_id] += 1
            self._began[tenant_id] = now = time.monotonic()
            self._call_next(tenant_id)  # if others are served no more
            if goes_first := not must_wait and tenant_id not in self._queues:
                self._puts_first(tenant_id, now + YIELD_SECONDS)
        with contextlib.ExitStack() as share:
            share.callback(self._give_up, tenant_id, goes_first=goes_first)
            token = _give_up.set(share.close)  # which gives it up once only
            way = _give_way.set(functools.partial(self._give_way, tenant_id))
            try:
                yield
            finally:
                _give_way.reset(way)
                _give_up.reset(token)

    def _give_way(self, tenant_id: str) -> None:
        if not any(other != tenant_id for other in tuple(self._began)):
            return  # without the lock, for which the threads of a tenant that is alone would wait
        with self._lock:
            self._ended.wait_for(lambda: not self._has_to_give_way(tenant_id), GIVE_WAY_SECONDS)

    def _has_to_give_way(self, tenant_id: str) -> bool:
        """Return whether it has several requests here, and another tenant one: so that none wait for each other."""
        if self._held[tenant_id] == 1:
            return False
        since = time.monotonic() - YIELD_SECONDS
        return any(
            self._held[other] == 1 and began > since for other, began in self._began.items() if other != tenant_id
        )

    def _give_up(self, tenant_id: str, *, goes_first: bool) -> None:
        with self._lock:
            _less(self._working, tenant_id)
            if tenant_id not in self._working:
                self._began.pop(tenant_id, None)
            if self._beside == tenant_id:
                self._beside = ""
                self._place.works_beside(0.0)
            if goes_first and tenant_id not in self._queues:
                self._puts_first(tenant_id, time.monotonic() + PAUSE_SECONDS)
            self._ended.notify_all()
            self._call_next(tenant_id)

    def _puts_first(self, tenant_id: str, until: float) -> None:
        self._first, self._first_until = tenant_id, until
        self._place.puts_first(tenant_id, until)

    def _wait(self, tenant_id: str) -> None:
        turn = threading.Condition(self._lock)
        queue = self._queues.setdefault(tenant_id, deque())
        queue.append(turn)
        if self._first == tenant_id:
            self._puts_first(tenant_id, 0.0)  # no longer
        try:
            if not turn.wait_for(lambda: queue[0] is turn and not self._must_wait(tenant_id), WAIT_SECONDS):
                raise _busy()
            self._let_others_go_first(tenant_id)
        finally:
            queue.remove(turn)
            if not queue:
                del self._queues[tenant_id]

    def _let_others_go_first(self, tenant_id: str) -> None:
        began = now = time.monotonic()
        while (is_near := self._goes_another_first(tenant_id, now)) or self._place.put_another_first(tenant_id, now):
            if self._waits_no_longer(tenant_id, now, now - began, is_near=is_near):
                self._beside = tenant_id
                self._place.works_beside(now + LAST_SECONDS)
                return
            self._ended.wait(LOOK_SECONDS)
            now = time.monotonic()

    def _goes_another_first(self, tenant_id: str, now: float) -> bool:
        """Return whether this process works on a request of another tenant, or expects the next one."""
        return self._others_work(tenant_id, now) or (self._first_until > now and self._first != tenant_id)

    def _waits_no_longer(self, tenant_id: str, now: float, waited: float, *, is_near: bool) -> bool:
        if waited >= LAST_SECONDS:
            return True
        # It begins when the other one has just ended: much of it is done when the next one comes.
        has_waited = waited >= (NEAR_SECONDS if is_near else YIELD_SECONDS) and not self._others_work(tenant_id, now)
        return has_waited and not self._place.work_beside(now)

    def _others_work(self, tenant_id: str, now: float) -> bool:
        """Return whether others have begun here just now: one that takes long, such as an upload, counts no more."""
        return any(now < self._began[other] + YIELD_SECONDS for other in self._working if other != tenant_id)

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
