"""A tenant with many requests at once leaves room for those of another, and is held back by nothing if it is alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from core import fair_share
from core.errors import TenantBusy
from core.fair_share import AT_ONCE, FairShare
from core.served_tenants import ServedTenants

SOON = 10.0  # seconds, after which a test fails that waits in vain


class Request(threading.Thread):
    """A request that is worked on until it is told to end."""

    def __init__(self, share: FairShare, tenant: str) -> None:
        super().__init__(daemon=True)
        self.begun, self.may_end, self.refused = threading.Event(), threading.Event(), False
        self._share, self._tenant = share, tenant
        self.start()

    def run(self) -> None:
        try:
            with self._share.work_of(self._tenant):
                self.begun.set()
                self.may_end.wait(SOON)
        except TenantBusy:
            self.refused = True

    def end(self) -> None:
        self.may_end.set()
        self.join(SOON)


@pytest.fixture
def requests() -> Iterator[list[Request]]:
    """All of a test, ended after it."""
    sent: list[Request] = []
    yield sent
    for request in sent:
        request.may_end.set()
    for request in sent:
        request.join(SOON)


def until_waiting(share: FairShare, tenant: str, number: int) -> None:
    deadline = time.monotonic() + SOON
    while len(share._queues.get(tenant, ())) != number:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def send(requests: list[Request], share: FairShare, tenant: str, number: int) -> list[Request]:
    sent = [Request(share, tenant) for _ in range(number)]
    requests += sent
    return sent


@pytest.fixture
def served() -> ServedTenants:
    return ServedTenants()


@pytest.fixture
def share(served: ServedTenants) -> FairShare:
    return FairShare(8, served)


def test_a_tenant_that_is_alone_has_all_threads(share: FairShare, requests: list[Request]) -> None:
    for request in send(requests, share, "one", 20):
        assert request.begun.wait(SOON)


def test_beside_another_a_tenant_has_few_worked_on_and_the_other_does_not_wait(
    share: FairShare, requests: list[Request]
) -> None:
    with share.work_of("other"):
        pass
    busy = send(requests, share, "one", AT_ONCE + 3)
    until_waiting(share, "one", 3)
    assert sum(request.begun.is_set() for request in busy) == AT_ONCE
    with share.work_of("other"):
        pass
    for request in [one for one in busy if one.begun.is_set()]:
        request.end()
    until_waiting(share, "one", 3 - AT_ONCE)


def test_the_next_request_of_a_busy_tenant_waits_a_moment_for_one_of_another(
    share: FairShare, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_share, "YIELD_SECONDS", SOON)
    [first] = send(requests, share, "one", 1)
    assert first.begun.wait(SOON)
    with share.work_of("other"):
        [second] = send(requests, share, "one", 1)
        until_waiting(share, "one", 1)
        first.end()
        assert not second.begun.wait(0.05)
    assert second.begun.wait(SOON)


def test_another_process_that_serves_another_tenant_counts(
    share: FairShare, served: ServedTenants, requests: list[Request]
) -> None:
    elsewhere = FairShare(8, served)
    with elsewhere.work_of("other"):
        send(requests, share, "one", AT_ONCE + 1)
        until_waiting(share, "one", 1)
        send(requests, elsewhere, "other", 1)
        until_waiting(elsewhere, "other", 1)


def test_the_next_request_of_a_busy_tenant_waits_for_one_of_another_in_any_process_and_for_the_one_after_it(
    share: FairShare, served: ServedTenants, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_share, "YIELD_SECONDS", SOON)
    elsewhere = FairShare(8, served)
    monkeypatch.setattr(fair_share, "PAUSE_SECONDS", SOON)
    with elsewhere.work_of("other"):
        pass
    busy = send(requests, share, "one", 2)
    until_waiting(share, "one", 1)
    for request in [one for one in busy if one.begun.is_set()]:
        request.end()
    [second] = [one for one in busy if not one.begun.is_set()]
    with elsewhere.work_of("other"):
        assert not second.begun.wait(0.05)
    assert not second.begun.wait(0.05)
    monkeypatch.setattr(fair_share, "PAUSE_SECONDS", 0.0)
    with elsewhere.work_of("other"):
        pass
    assert second.begun.wait(SOON)


def test_two_tenants_with_many_requests_each_do_not_wait_for_each_other_in_two_processes(
    share: FairShare, served: ServedTenants, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_share, "YIELD_SECONDS", SOON)
    elsewhere = FairShare(8, served)
    both = ((share, "one"), (elsewhere, "other"))
    first = [request for each, tenant in both for request in send(requests, each, tenant, 1)]
    for request in first:
        assert request.begun.wait(SOON)
    for each, tenant in both:
        send(requests, each, tenant, 3)
        until_waiting(each, tenant, 3)
    for request in first:
        request.end()
    for each, tenant in both:
        until_waiting(each, tenant, 2)


def test_requests_of_a_tenant_are_worked_on_in_the_order_in_which_they_came(
    share: FairShare, requests: list[Request]
) -> None:
    with share.work_of("other"):
        pass
    sent = []
    for number in range(6):
        sent += send(requests, share, "one", 1)
        until_waiting(share, "one", number)
    for request in sent:
        assert request.begun.wait(SOON)
        assert sum(one.begun.is_set() for one in sent) == sent.index(request) + 1
        request.end()


def test_no_more_wait_than_leave_threads_for_others(share: FairShare, requests: list[Request]) -> None:
    with share.work_of("other"):
        send(requests, share, "one", 6)
        until_waiting(share, "one", 6 - AT_ONCE)
        with pytest.raises(TenantBusy) as refused, share.work_of("one"):
            pass
        assert refused.value.retry_after == 1


def test_a_request_that_waits_for_the_broker_lets_the_next_one_of_its_tenant_be_worked_on(
    share: FairShare, requests: list[Request]
) -> None:
    with share.work_of("other"), contextlib.ExitStack() as stack:
        for _ in range(AT_ONCE):
            stack.enter_context(share.work_of("one"))
        fair_share.give_up_share()
        fair_share.give_up_share()  # again: it has none left
        [second] = send(requests, share, "one", 1)
        assert second.begun.wait(SOON)
        send(requests, share, "one", 1)
        until_waiting(share, "one", 1)


def test_requests_that_wait_for_the_broker_leave_threads_for_others(share: FairShare) -> None:
    with share.work_of("other"):
        pass
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(share.work_of("one"))
            fair_share.give_up_share()
        with pytest.raises(TenantBusy), share.work_of("one"):
            pass
        with share.work_of("other"):
            pass


def test_who_has_waited_long_is_refused(share: FairShare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_share, "WAIT_SECONDS", 0.01)
    with share.work_of("other"), contextlib.ExitStack() as stack:
        for _ in range(AT_ONCE):
            stack.enter_context(share.work_of("one"))
        with pytest.raises(TenantBusy), share.work_of("one"):
            pass
    with share.work_of("one"):
        pass


def test_a_tenant_that_is_not_served_any_more_holds_nobody_back(
    share: FairShare, monkeypatch: pytest.MonkeyPatch, requests: list[Request]
) -> None:
    monkeypatch.setattr(fair_share, "OTHERS_SECONDS", 0.0)
    with share.work_of("other"):
        pass
    for request in send(requests, share, "one", 6):
        assert request.begun.wait(SOON)


def test_what_is_known_of_tenants_does_not_grow(share: FairShare) -> None:
    for number in range(100):
        with share.work_of(f"tenant-{number}"):
            pass
    assert (len(share._seen), len(share._working), len(share._held), len(share._queues)) == (2, 0, 0, 0)
