"""Shares the portal among tenants: one that sends many requests at once leaves room for those of the others."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from core.errors import TenantBusy
from core.files import FileLock

AT_ONCE = 1  # requests of a tenant that a process works on while others are served
YIELD_SECONDS = 0.05  # for so long the next request of a tenant with several waits for one of another tenant
OTHERS_SECONDS = 2.0  # for so long after its last request another tenant counts as one that is served
TELL_SECONDS = 0.25  # between two looks at whom the other processes serve
WAIT_SECONDS = 10.0
_BYTES = 256
_give_up: ContextVar[Callable[[], None] | None] = ContextVar("give_up_share", default=None)


def give_up_share() -> None:
    """Let the tenant's next request be worked on, as what is left of this one is to wait, for the broker."""
    if (give_up := _give_up.get()) is not None:
        give_up()


class FairShare:
    """Counts the requests of each tenant in this process; nothing waits while all processes serve one tenant alone.

    While another one is served, too, a tenant has ``AT_ONCE`` requests worked on, and its others wait in a thread each,
    as those do that have given up their share: of all threads it may hold three quarters. The processes tell each other
    by a file whom they serve.
    """

    def __init__(self, threads: int, file: Path) -> None:
        """Share so many threads of each process that uses the ``file``."""
        self._held_most = max(AT_ONCE, threads * 3 // 4)
        self._file, self._lock = file, FileLock(file)
        self._changed = threading.Condition()
        self._held: Counter[str] = Counter()  # threads
        self._working: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._seen: dict[str, float] = {}  # the two tenants that were served last, by all processes, and when
        self._told_at = 0.0

    @contextmanager
    def work_of(self, tenant_id: str) -> Iterator[None]:
        """Do the body of the ``with`` when it is the tenant's turn; raises ``TenantBusy`` if that has too many."""
        with self._changed:
            self._note(tenant_id)
            if self._held[tenant_id] >= self._held_most and self._others_are_served(tenant_id):
                raise _busy()
            self._held[tenant_id] += 1
        try:
            with self._share_of(tenant_id):
                yield
        finally:
            with self._changed:
                self._less(self._held, tenant_id)
                self._note(tenant_id)

    @contextmanager
    def _share_of(self, tenant_id: str) -> Iterator[None]:
        with self._changed:
            if self._must_wait(tenant_id) or (self._waiting[tenant_id] and self._others_are_served(tenant_id)):
                self._wait(tenant_id)
            self._working[tenant_id] += 1
        with contextlib.ExitStack() as share:
            share.callback(self._give_up, tenant_id)
            token = _give_up.set(share.close)  # which gives it up once only
            try:
                yield
            finally:
                _give_up.reset(token)

    def _give_up(self, tenant_id: str) -> None:
        with self._changed:
            self._less(self._working, tenant_id)
            self._changed.notify_all()

    def _wait(self, tenant_id: str) -> None:
        self._waiting[tenant_id] += 1
        try:
            if not self._changed.wait_for(lambda: not self._must_wait(tenant_id), WAIT_SECONDS):
                raise _busy()
            self._changed.wait_for(lambda: self._working.total() == self._working[tenant_id], YIELD_SECONDS)
            if not self._changed.wait_for(lambda: not self._must_wait(tenant_id), WAIT_SECONDS):
                raise _busy()
        finally:
            self._less(self._waiting, tenant_id)

    @staticmethod
    def _less(counter: Counter[str], tenant_id: str) -> None:
        counter[tenant_id] -= 1
        if not counter[tenant_id]:
            del counter[tenant_id]

    def _must_wait(self, tenant_id: str) -> bool:
        return self._working[tenant_id] >= AT_ONCE and self._others_are_served(tenant_id)

    def _others_are_served(self, tenant_id: str) -> bool:
        since = time.monotonic() - OTHERS_SECONDS
        return any(other != tenant_id for other in self._held) or any(
            other != tenant_id and at >= since for other, at in self._seen.items()
        )

    def _note(self, tenant_id: str) -> None:
        self._seen[tenant_id] = now = time.monotonic()  # one clock for all processes
        if now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            self._exchange()
        self._seen = _newest(self._seen)

    def _exchange(self) -> None:
        """Tell the others whom this process serves, and learn whom they do; if that fails it shares by itself."""
        with contextlib.suppress(OSError), self._lock.try_hold() as is_free:
            if not is_free:
                return
            for tenant_id, at in self._told().items():
                self._seen[tenant_id] = max(at, self._seen.get(tenant_id, 0.0))
            with self._file.open("r+b", buffering=0) as file:
                file.write(json.dumps(_newest(self._seen)).encode().ljust(_BYTES))

    def _told(self) -> dict[str, float]:
        try:
            return {str(tenant_id): float(at) for tenant_id, at in json.loads(self._file.read_bytes()).items()}
        except (ValueError, TypeError, AttributeError):  # a new file, or a damaged one, which is written over
            return {}


def _newest(seen: dict[str, float]) -> dict[str, float]:
    return dict(sorted(seen.items(), key=lambda item: -item[1])[:2])


def _busy() -> TenantBusy:
    return TenantBusy(
        "The tenant has as many requests under way as it may beside those of others; try again in a second.", 1
    )
