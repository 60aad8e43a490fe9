"""Under a guard that reads what is new before it refuses somebody, a grant waits for its line in the journal alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from broker.control import Draft
from broker.guard.control import GUARD_VERSION, TENANTS_VERSION
from broker.guard.journal import read_access
from config import Settings
from core.broker_control import JOURNAL_FILE
from core.errors import Unavailable
from core.files import FileLock
from operations.wiring import Portal, open_portal, prepare
from tests.support.guard_stub import GuardStub
from tests.support.harness import ON_SQLITE
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.access import complete_draft
from workflows.prompt import Outcome

pytestmark = ON_SQLITE


@dataclass
class Guarded:
    """A portal whose broker has a guard, and what is done with it."""

    portal: Portal
    guard: GuardStub
    running: ExitStack

    def register(self) -> str:
        """Register a device with a CSR: the answer has its certificate."""
        return self.portal.registrations.register(OPERATOR, request_of(1, csr=True)).device_id

    def access(self, device_id: str) -> str:
        """What the journal says of a device."""
        return read_access(self.guard.journal)[device_id].partition(" ")[0]

    def is_proven(self) -> bool:
        state = self.portal.reconciler.own_state()
        return state.applied_generation == state.generation

    def prove(self) -> None:
        newest = self.portal.reconciler.own_state().generation
        assert self.portal.reconciler.apply(newest).covers(newest)
        assert self.is_proven()

    def asks(self) -> int:
        """How often the guard was asked for a proof."""
        return sum("/prove/" in topic for topic in self.guard.topics)


@pytest.fixture
def seconds() -> str:
    """How long a request waits for the broker."""
    return "5"


@pytest.fixture
def guarded(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, seconds: str) -> Iterator[Guarded]:
    """One whose guard speaks the newest version, which the portal does not know yet; no job runs beside the test."""
    settings = make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_ENFORCE_TIMEOUT=seconds)
    portal = open_portal(settings)
    monkeypatch.setattr(portal.broker, "probe", lambda *_arguments, **_options: None)  # it asks the broker itself
    prepare(portal)
    with ExitStack() as running:
        guard = running.enter_context(GuardStub(settings.broker_socket, settings.broker_file(JOURNAL_FILE)))
        yield Guarded(portal, guard, running)
    portal.close()


@contextmanager
def held_up(guarded: Guarded, device_id: str) -> Iterator[None]:
    """Revoke a device; the body runs while the proof of that is under way."""
    begun, over = threading.Event(), threading.Event()
    enforce = guarded.portal.broker.control.enforce

    def prove(*arguments: Any, **options: Any) -> int:
        begun.set()
        over.wait()
        return enforce(*arguments, **options)

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(1) as pool:
        patched.setattr(guarded.portal.broker.control, "enforce", prove)
        revoking = pool.submit(guarded.portal.revocations.revoke, OPERATOR, device_id, "key_compromise")
        begun.wait()
        try:
            yield
        finally:
            over.set()
        assert revoking.result().enforced


def test_a_device_is_registered_once_its_line_is_written_and_the_proof_follows(guarded: Guarded) -> None:
    guarded.register()  # by which the portal sees what guard there is
    assert guarded.is_proven()
    asked = guarded.asks()
    new = [guarded.register() for _ in range(3)]
    assert [guarded.access(one) for one in new] == ["allow"] * 3
    assert not guarded.is_proven()
    assert guarded.asks() == asked
    guarded.prove()
    assert guarded.asks() == asked + 1


@pytest.mark.parametrize("version", [GUARD_VERSION, TENANTS_VERSION])
def test_each_device_waits_for_the_proof_of_an_older_guard(guarded: Guarded, version: int) -> None:
    guarded.guard.versions = {*range(GUARD_VERSION, version + 1)}
    for asked in (1, 2, 3):
        guarded.register()
        assert guarded.is_proven()
        assert guarded.asks() == asked


def test_a_device_does_not_wait_for_the_proof_of_a_revocation_which_holds_for_what_it_wrote(guarded: Guarded) -> None:
    first, second = guarded.register(), guarded.register()
    with held_up(guarded, first):
        new = guarded.register()
        assert guarded.access(new) == "allow"
        assert not guarded.is_proven()
    assert guarded.portal.revocations.revoke(OPERATOR, second, "key_compromise").enforced
    assert {guarded.access(one) for one in (first, second)} == {"deny"}
    assert guarded.is_proven()


def test_a_device_waits_for_the_guard_to_follow_a_journal_of_a_new_epoch(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = guarded.register()
    waits, apply = threading.Event(), guarded.portal.reconciler.apply

    def waiting(generation: int, **options: Any) -> Outcome:
        waits.set()
        return apply(generation, **options)

    guarded.portal.broker.begin_again()
    with ThreadPoolExecutor(1) as pool, held_up(guarded, first):
        monkeypatch.setattr(guarded.portal.reconciler, "apply", waiting)
        registering = pool.submit(guarded.register)
        assert waits.wait(10)
    assert guarded.access(registering.result()) == "allow"
    assert guarded.is_proven()


@pytest.mark.parametrize("seconds", ["0.2"])
def test_a_device_is_not_given_out_once_the_guard_was_seen_not_to_follow(guarded: Guarded) -> None:
    guarded.register()
    guarded.guard.stopped = True
    guarded.register()  # nobody knows yet
    newest = guarded.portal.reconciler.own_state().generation
    assert not guarded.portal.reconciler.apply(newest).covers(newest)
    with pytest.raises(Unavailable, match="does not know the device's newest state yet"):
        guarded.register()


def test_a_device_waits_for_the_proof_as_soon_as_the_guard_has_not_followed(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded.register()
    control: Any = guarded.portal.broker.control
    waits, over = threading.Event(), threading.Event()
    await_proof = control._await

    def waiting(*arguments: Any) -> None:
        waits.set()
        over.wait()
        guarded.guard.stopped = False
        await_proof(*arguments)

    monkeypatch.setattr(control, "_await", waiting)
    _, generation = registered_with_a_bundle(guarded)
    guarded.guard.stopped = True
    with ThreadPoolExecutor(1) as pool:
        applying = pool.submit(guarded.portal.reconciler.apply, generation)
        assert waits.wait(10)
        is_granted = guarded.portal.reconciler._granting.grant(generation)
        over.set()
        assert applying.result().covers(generation)
    assert not is_granted
    assert guarded.portal.reconciler._granting.grant(generation)


def test_a_device_is_given_out_while_the_broker_does_not_run(guarded: Guarded) -> None:
    guarded.register()
    guarded.running.close()
    assert guarded.access(guarded.register()) == "allow"  # in the journal, which the broker reads at its start
    newest = guarded.portal.reconciler.own_state().generation
    assert not guarded.portal.reconciler.apply(newest).covers(newest)
    assert guarded.access(guarded.register()) == "allow"


# --- Sharing -------------------------------------------------------------------------------------------------------


@dataclass
class Threads:
    """Threads that ask for grants while another process writes."""

    guarded: Guarded
    lock: FileLock
    asked: threading.Semaphore
    takes: list[FileLock]  # of the lock, by this process

    def grant(self, generation: int, meanwhile: Callable[[], object], *, count: int) -> list[bool]:
        """Ask from so many threads, each of which then waits for the lock; return what they were answered."""
        granting = self.guarded.portal.reconciler._granting
        with ThreadPoolExecutor(count) as pool:
            with self.lock.hold():
                self.takes.clear()
                answers = [pool.submit(granting.grant, generation) for _ in range(count)]
                for _ in range(count):
                    assert self.asked.acquire(timeout=10)
                meanwhile()
            return [answer.result() for answer in answers]


@pytest.fixture
def threads(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> Threads:
    made = Threads(guarded, FileLock(guarded.portal.settings.data_dir / ".install.lock"), threading.Semaphore(0), [])
    monkeypatch.setattr("workflows.granting.give_up_share", made.asked.release)
    take = FileLock._take

    def counted(lock: FileLock, *arguments: Any) -> None:
        made.takes.append(lock)
        take(lock, *arguments)

    monkeypatch.setattr(FileLock, "_take", counted)
    guarded.register()
    return made


def registered_with_a_bundle(guarded: Guarded) -> tuple[str, int]:
    """Register a device whose answer does not wait; return it with the generation of which nothing is written."""
    device_id = guarded.portal.registrations.register(OPERATOR, request_of(2, csr=False)).device_id
    return device_id, guarded.portal.reconciler.own_state().generation


def test_threads_that_wait_share_what_the_first_of_them_writes(threads: Threads) -> None:
    device_id, generation = registered_with_a_bundle(threads.guarded)
    assert threads.grant(generation, lambda: None, count=4) == [True] * 4
    assert threads.guarded.access(device_id) == "allow"
    assert len(threads.takes) == 1


def test_a_thread_that_has_waited_looks_again_whether_a_line_is_enough(threads: Threads) -> None:
    device_id, generation = registered_with_a_bundle(threads.guarded)
    socket = threads.guarded.portal.settings.broker_socket
    assert threads.grant(generation, lambda: os.utime(socket, (1, 1)), count=1) == [False]  # as at the broker's start
    assert device_id not in read_access(threads.guarded.guard.journal)


def test_a_journal_that_is_begun_anew_is_drafted_by_the_reconciliation_alone(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_id, generation = registered_with_a_bundle(threads.guarded)
    drafted: list[int] = []

    def complete(draft: Draft, *arguments: Any) -> None:
        drafted.append(draft.since)
        complete_draft(draft, *arguments)

    monkeypatch.setattr("workflows.granting.complete_draft", complete)
    threads.guarded.portal.broker.begin_again()  # as if it had grown too long
    assert threads.grant(generation, lambda: None, count=3) == [False] * 3
    assert drafted == []
    threads.guarded.prove()
    assert drafted == [0]
    assert threads.guarded.access(device_id) == "allow"


def test_what_another_process_has_written_is_not_waited_for(threads: Threads) -> None:
    first = threads.guarded.portal
    device_id, generation = registered_with_a_bundle(threads.guarded)
    assert not first.reconciler._granting.is_granted(generation)
    other = open_portal(first.settings)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(other.broker, "probe", lambda *_arguments, **_options: None)
        assert other.reconciler.apply(generation).covers(generation)
    other.close()
    with threads.lock.hold():
        threads.takes.clear()
        assert first.reconciler._granting.grant(generation)
        assert threads.takes == []
    assert threads.guarded.access(device_id) == "allow"
