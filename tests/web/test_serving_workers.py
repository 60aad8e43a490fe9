"""The workers of a listener share its connections; one that ends, is busy or cannot start takes none with it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Set
from pathlib import Path

import pytest

from core.errors import StartupError
from core.processors import AVAILABLE
from core.setting_values import Address
from tests.support.deployment import wait_until
from tests.support.serving_process import Server, children, facts, request, running
from tests.support.sockets import waiting
from web import listeners
from web.listeners import listen

CONNECTIONS = 24  # of two sockets, the kernel chooses one for all of them once in eight million times
# A thread of gunicorn's waits for what a client sends first, and a worker can get all clients of a test.
THREADS = 2 * CONNECTIONS


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(workers=2, threads=THREADS) as it:
        yield it


def masters(server: Server) -> dict[int, int]:
    """The process of each gunicorn, by its port; the plain listener's is the first child of the other."""
    return {server.port: server.process.pid, server.pki_port: children(server.process.pid)[0]}


def workers(server: Server, port: int) -> list[int]:
    """Both workers of a listener, once it has them."""
    master, others = masters(server)[port], int(port == server.port)
    wait_until(lambda: len(children(master)) == others + 2)
    return children(master)[others:]


@contextlib.contextmanager
def stopped(processes: list[int]) -> Iterator[None]:
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        # One that gets no processor takes a SIGTERM first that comes before it has stopped, as that has a lower number.
        wait_until(lambda: all(map(has_stopped, processes)))
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def has_stopped(process: int) -> bool:
    status = Path(f"/proc/{process}/stat").read_text()
    return status.rpartition(")")[2].split()[0] == "T"


@contextlib.contextmanager
def on_two_processors(processors: Set[int]) -> Iterator[None]:
    """What is started in the body of the ``with`` has these processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def opened(server: Server, port: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    return [stack.enter_context(server.tcp(port)) for _ in range(CONNECTIONS)]


def answered_by(server: Server, clients: list[socket.socket], stack: contextlib.ExitStack) -> Counter[int]:
    """How many of the connections each worker has answered on."""
    counts: Counter[int] = Counter()
    for client in clients:
        secured = client
        if client.getpeername()[1] == server.port:
            secured = stack.enter_context(server.context().wrap_socket(client, server_hostname="localhost"))
        secured.sendall(request())
        counts[facts(secured)["process"]] += 1
    return counts


@pytest.mark.skipif(len(AVAILABLE) < 2, reason="one processor")
def test_each_worker_keeps_to_a_processor_of_its_own_if_there_are_as_many() -> None:
    two = {*sorted(AVAILABLE)[:2]}
    with on_two_processors(two), running(workers=2, threads=THREADS) as server, contextlib.ExitStack() as stack:
        own: dict[int, list[int]] = {}
        for client in opened(server, server.pki_port, stack):
            client.sendall(request())
            answer = facts(client)
            assert own.setdefault(answer["process"], answer["processors"]) == answer["processors"]
    assert sorted(own.values()) == [[processor] for processor in sorted(two)]


def is_shared_evenly(connect: Callable[[], int]) -> bool:
    """Whether two connections after each other go to two workers; ``connect`` opens one and says whose it is."""
    counts: Counter[int] = Counter()
    while len(counts) < 2:  # One may not have begun to serve: it gets all until it has as many.
        counts[connect()] += 1
    for _ in range(counts.total()):
        counts[connect()] += 1
    return all(connect() != connect() for _ in range(CONNECTIONS // 2))


@pytest.mark.parametrize("listener", ["port", "pki_port"])
def test_each_worker_gets_as_many_connections_as_the_other_whatever_the_kernel_chooses(listener: str) -> None:
    with running(workers=2, threads=THREADS, idle_seconds=60.0) as server, contextlib.ExitStack() as stack:
        port = getattr(server, listener)

        def connect() -> int:
            (worker,) = answered_by(server, [stack.enter_context(server.tcp(port))], stack)
            return worker

        assert is_shared_evenly(connect)


def test_each_worker_gets_as_many_connections_of_a_front_server_as_the_other() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = f"{folder}/socket"
        stack.enter_context(running(workers=2, threads=THREADS, bind=[path, 0], idle_seconds=60.0))

        def connect() -> int:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(path)
            client.sendall(request())
            return int(facts(client)["process"])

        assert is_shared_evenly(connect)


def test_whoever_keeps_connections_at_one_worker_does_not_send_all_others_to_the_other() -> None:
    with running(workers=2, threads=THREADS, idle_seconds=0.0) as server, contextlib.ExitStack() as stack:

        def worker_of(client: socket.socket) -> int:
            client.sendall(request())
            return int(facts(client)["process"])

        kept: dict[int, list[socket.socket]] = {}
        while len(kept) < 2:
            for client in opened(server, server.pki_port, stack):
                kept.setdefault(worker_of(client), []).append(client)
        for client in kept.popitem()[1]:
            client.close()
        answered = []
        for _ in range(2 * CONNECTIONS):
            with server.tcp(server.pki_port) as client:
                answered.append(worker_of(client))
        assert len({*answered[CONNECTIONS:]}) == 2  # at first it may not have seen that those are closed


def test_connections_that_were_given_to_a_worker_that_hangs_are_answered_by_the_other() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = f"{folder}/socket"
        stack.enter_context(running(workers=2, threads=THREADS, bind=[path, 0], idle_seconds=60.0))

        def connect() -> socket.socket:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(path)
            client.sendall(request())
            return client

        seen: Counter[int] = Counter()
        while len(seen) < 2:  # both have begun to serve
            seen[facts(connect())["process"]] += 1
        with stopped([seen.most_common()[-1][0]]):  # the one with fewer, which is given the next ones
            clients = [connect() for _ in range(seen.total())]
            assert len({facts(client)["process"] for client in clients}) == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_connections_that_were_given_to_a_worker_that_ends_are_answered(end: signal.Signals) -> None:
    with running(workers=2, threads=THREADS) as server, contextlib.ExitStack() as stack:
        port = server.port
        _, sleeps = answered_by(server, opened(server, port, stack), stack)  # both have begun to serve
        with stopped([sleeps]):
            clients = opened(server, port, stack)
            # Of those that came to the other worker, it has given away what would make it have more.
            wait_until(lambda: 0 in waiting(port))
            os.kill(sleeps, end)
        assert answered_by(server, clients, stack).total() == CONNECTIONS


@pytest.mark.parametrize("listener", ["port", "pki_port"])
def test_connections_that_wait_for_a_worker_that_dies_are_answered_by_the_next_one(listener: str) -> None:
    with running(workers=2, threads=THREADS) as server, contextlib.ExitStack() as stack:
        port = getattr(server, listener)
        before = workers(server, port)
        with stopped(before):
            clients = opened(server, port, stack)
            for worker in before:
                os.kill(worker, signal.SIGKILL)
        counts = answered_by(server, clients, stack)
        assert counts.total() == CONNECTIONS
        assert not counts.keys() & before


def test_connections_that_wait_for_a_worker_when_the_server_is_told_to_stop_are_answered() -> None:
    with running(workers=2, threads=THREADS) as server, contextlib.ExitStack() as stack:
        port = server.port
        asked = [*answered_by(server, opened(server, port, stack), stack)]  # both have begun to serve
        with stopped(asked):
            clients = opened(server, port, stack)[:6]  # not more than send something within five seconds
            server.process.terminate()
            wait_until(lambda: all(is_told_to_end(worker) for worker in asked))
        assert answered_by(server, clients, stack).total() == 6
        assert server.process.wait(20) == 0


def is_told_to_end(process: int) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(status.partition("ShdPnd:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


def test_workers_that_are_told_to_end_leave_their_listeners_to_the_next_ones() -> None:
    with running(workers=2, threads=THREADS) as server, contextlib.ExitStack() as stack:
        before = answered_by(server, opened(server, server.port, stack), stack)  # both have begun to serve
        for worker in before:
            os.kill(worker, signal.SIGTERM)
        wait_until(lambda: not {*before} & {*children(server.process.pid)})
        assert answered_by(server, opened(server, server.port, stack), stack).total() == CONNECTIONS


def test_a_worker_that_cannot_start_beside_one_that_answers_gets_no_connections_until_it_can() -> None:
    with running(workers=2, threads=THREADS, broken="the other") as server, contextlib.ExitStack() as stack:
        assert server.process.stderr is not None
        failures = (line for line in server.process.stderr if "is tried again: The disk is full." in line)
        assert next(failures)
        assert next(failures)  # a second time its listener must not be shut down
        first = answered_by(server, opened(server, server.port, stack), stack)
        assert list(first.values()) == [CONNECTIONS]
        (server.folder / "first").unlink()  # what the worker looks at
        wait_until(lambda: len(waiting(server.port)) == 2)
        counts = first.copy()
        while counts.keys() == first.keys():  # The other listens, and is given connections a little later.
            counts += answered_by(server, opened(server, server.port, stack), stack)
        server.process.terminate()
        assert server.process.wait(20) == 0


def test_no_other_server_of_the_same_user_gets_a_share_of_a_port(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "KILLED_PORTAL_SECONDS", 0.0)
    with pytest.raises(StartupError, match=f"Port {server.port} on 127.0.0.1 is in use; stop what uses it or set P"):
        listen(Address("127.0.0.1", server.port), "PORTAL_BIND", 15.0, 2)


def test_no_signal_changes_how_many_workers_the_listeners_are_shared_out_among(server: Server) -> None:
    for port, master in masters(server).items():
        assert workers(server, port)  # so that the master has begun to serve
        status = Path(f"/proc/{master}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
        for number in (signal.SIGTTIN, signal.SIGTTOU):
            assert ignored >> (number - 1) & 1
