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


class Writing(Request):
    """A request that writes when it is told to, and is answered when it has ended."""

    def __init__(self, share: FairShare, tenant: str) -> None:
        self.may_write, self.writes, self.answers = threading.Event(), threading.Event(), threading.Event()
        super().__init__(share, tenant)

    def run(self) -> None:
        with self._share.work_of(self._tenant):
            self.begun.set()
            self.may_write.wait(SOON)
            fair_share.give_way()
            self.writes.set()
            self.may_end.wait(SOON)
        self.answers.set()


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


def test_what_arrives_of_a_busy_tenant_leaves_another_first(
    share: FairShare, served: ServedTenants, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_share, "PAUSE_SECONDS", SOON)
    elsewhere = served.place()
    with share.work_of("one"):
        with share.work_of("other"):
            pass
        send(requests, share, "one", 1)
        until_waiting(share, "one", 1)
        assert elsewhere.put_another_first("one", time.monotonic())


def test_the_last_of_a_busy_tenants_requests_that_waits_goes_not_before_others(
    share: FairShare, served: ServedTenants, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    with share.work_of("other"):
        pass
    monkeypatch.setattr(fair_share, "YIELD_SECONDS", SOON)
    monkeypatch.setattr(fair_share, "PAUSE_SECONDS", SOON)
    elsewhere = served.place()
    with share.work_of("one"):
        [last] = send(requests, share, "one", 1)
        until_waiting(share, "one", 1)
    assert last.begun.wait(SOON)
    assert not elsewhere.put_another_first("other", time.monotonic())
    last.end()
    assert not elsewhere.put_another_first("other", time.monotonic())


@pytest.mark.parametrize(("near", "far", "begins"), [(0.0, SOON, True), (SOON, 0.0, False)])
def test_a_busy_tenant_waits_longer_for_one_that_goes_first_in_its_own_process(
    near: float,
    far: float,
    begins: bool,
    share: FairShare,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, seconds in {"NEAR": near, "YIELD": far, "LAST": SOON, "PAUSE": SOON}.items():
        monkeypatch.setattr(fair_share, f"{name}_SECONDS", seconds)
    with share.work_of("one"), share.work_of("other"):
        [second] = send(requests, share, "one", 1)
        until_waiting(share, "one", 1)
    assert second.begun.wait(SOON if begins else 0.05) is begins


@pytest.mark.parametrize("limit", ["LAST", "YIELD"])
def test_a_busy_tenants_next_request_begins_beside_one_of_another_that_takes_long(
    limit: str, share: FairShare, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NEAR", "YIELD", "LAST"):
        monkeypatch.setattr(fair_share, f"{name}_SECONDS", 0.0 if name == limit else SOON)
    [first] = send(requests, share, "one", 1)
    assert first.begun.wait(SOON)
    with share.work_of("other"):
        [second] = send(requests, share, "one", 1)
        until_waiting(share, "one", 1)
        first.end()
        assert second.begun.wait(SOON / 2)


def test_nobody_gives_way_to_a_request_that_takes_long(
    share: FairShare, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_share, "GIVE_WAY_SECONDS", SOON)
    monkeypatch.setattr(fair_share, "YIELD_SECONDS", 0.0)
    busy = Writing(share, "one")
    requests += [busy]
    send(requests, share, "one", 1)
    for request in requests:
        assert request.begun.wait(SOON)
    with share.work_of("other"):
        busy.may_write.set()
        assert busy.writes.wait(SOON / 2)


def test_a_busy_tenants_next_request_begins_when_one_that_goes_first_has_just_ended(
    share: FairShare, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"NEAR": 0.0, "YIELD": SOON, "LAST": SOON, "PAUSE": SOON}.items():
        monkeypatch.setattr(fair_share, f"{name}_SECONDS", seconds)
    [first] = send(requests, share, "one", 1)
    assert first.begun.wait(SOON)
    with share.work_of("other"):
        [second] = send(requests, share, "one", 1)
        until_waiting(share, "one", 1)
        first.end()
        assert not second.begun.wait(0.05)
    assert second.begun.wait(SOON / 2)


def test_in_all_processes_one_request_is_worked_on_beside_those_that_go_first(
    share: FairShare, served: ServedTenants, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"YIELD": 0.0, "LAST": SOON, "PAUSE": SOON}.items():
        monkeypatch.setattr(fair_share, f"{name}_SECONDS", seconds)
    with FairShare(8, served).work_of("other"):
        pass
    both = share, FairShare(8, served)
    waiting = []
    for each in both:
        with each.work_of("one"):
            waiting += send(requests, each, "one", 1)
            until_waiting(each, "one", 1)
        if each is share:
            assert waiting[0].begun.wait(SOON)
    assert not waiting[1].begun.wait(0.05)
    waiting[0].end()
    assert waiting[1].begun.wait(SOON)


def test_a_request_of_a_busy_tenant_gives_way_to_the_only_one_of_another_before_it_writes_and_before_its_answer(
    share: FairShare, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_share, "GIVE_WAY_SECONDS", SOON)
    monkeypatch.setattr(fair_share, "YIELD_SECONDS", SOON)
    busy = Writing(share, "one")
    requests += [busy]
    send(requests, share, "one", 1)
    for request in requests:
        assert request.begun.wait(SOON)
    for may, does in ((busy.may_write, busy.writes), (busy.may_end, busy.answers)):
        [light] = send(requests, share, "other", 1)
        assert light.begun.wait(SOON)
        may.set()
        assert not does.wait(0.05)
        light.end()
        assert does.wait(SOON)


@pytest.mark.parametrize(("own", "others"), [(1, 1), (2, 2), (1, 2)])
def test_requests_of_tenants_with_as_many_give_no_way_to_each_other(
    own: int, others: int, share: FairShare, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_share, "GIVE_WAY_SECONDS", 2 * SOON)
    monkeypatch.setattr(fair_share, "YIELD_SECONDS", 2 * SOON)
    writing = Writing(share, "one")
    requests += [writing]
    assert writing.begun.wait(SOON)
    assert send(requests, share, "other", 1)[0].begun.wait(SOON)
    for tenant, number in (("one", own - 1), ("other", others - 1)):
        send(requests, share, tenant, number)
        until_waiting(share, tenant, number)
    writing.may_write.set()
    assert writing.writes.wait(SOON)
    writing.end()
    assert writing.answers.wait(SOON)


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
    assert not share._began


def test_each_part_of_a_long_answer_is_made_in_a_turn_and_none_is_held_while_it_is_sent(
    share: FairShare, requests: list[Request]
) -> None:
    working: list[int] = []

    def made() -> Iterator[bytes]:
        for part in (b"a", b"", b"b"):
            working.append(share._working["one"])
            yield part

    with share.work_of("other"):  # which is served, too
        answer = share.in_parts("one", made())
        assert next(answer) == b"a"
        [busy] = send(requests, share, "one", 1)
        assert busy.begun.wait(SOON)  # it does not wait for the client that reads the answer
        rest = threading.Thread(target=lambda: working.append(len([*answer])), daemon=True)
        rest.start()
        until_waiting(share, "one", 1)  # the next part waits for its turn
        busy.end()
        rest.join(SOON)
    assert working == [1, 1, 1, 1]


def test_the_threads_of_long_answers_are_some_of_those_that_a_tenant_may_hold(share: FairShare) -> None:
    answers = [share.in_parts("one", iter([b"a", b"b"])) for _ in range(6)]  # three quarters of eight
    for answer in answers:
        assert next(answer) == b"a"
    with share.work_of("one"):
        pass  # nobody else is served
    with share.work_of("other"), pytest.raises(TenantBusy), share.work_of("one"):
        pass
    answers.pop().close()  # type: ignore[attr-defined]  # as the server does of a client that is gone
    with share.work_of("other"), share.work_of("one"):
        pass
