"""The processes that issue the credentials of an upload."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator

import pytest

from core.errors import InputInvalid, TokenUnavailable, Unavailable
from operations.wiring import Portal
from pki.csr import read_csr
from tests.support.deployment import wait_until
from tests.support.harness import ON_SQLITE, csr_pem
from workflows.bulk import processes
from workflows.bulk.processes import FEW, NICENESS, CredentialJob, CredentialProcesses
from workflows.bundles import Bundles
from workflows.credentials import CredentialIssuer, DeviceRequest, IssuedCredentials

LINK_KEYS = ["a-key-of-many-characters"]


@pytest.fixture
def issuing(portal: Portal) -> Iterator[CredentialProcesses]:
    here = CredentialIssuer(portal.settings, portal.authority, Bundles(portal.settings, portal.authority, LINK_KEYS))
    built = CredentialProcesses(portal.settings, LINK_KEYS, here)
    yield built
    built.close()


@pytest.fixture
def jobs(portal: Portal) -> Callable[[int], list[CredentialJob]]:
    def make(count: int) -> list[CredentialJob]:
        request = DeviceRequest(name="pump-1", type="pump", location="hall 1", firmware="1.0")
        tenant = portal.tenant_terms.of(portal.first_tenant)
        return [CredentialJob(tenant, str(uuid.uuid4()), request, None, portal.clock()) for _ in range(count)]

    return make


def running() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


@ON_SQLITE
def test_a_few_devices_are_worth_no_process(
    issuing: CredentialProcesses, jobs: Callable[[int], list[CredentialJob]]
) -> None:
    assert len(issuing.results(issuing.issue(jobs(FEW)))) == FEW
    assert running() == []


@ON_SQLITE
def test_results_come_in_the_order_of_their_jobs_and_one_that_fails_stops_no_other(
    issuing: CredentialProcesses, jobs: Callable[[int], list[CredentialJob]]
) -> None:
    wanted = jobs(100)
    csr = read_csr(csr_pem())
    bad = DeviceRequest(
        name="pump-2", type="pump", location="hall 1", firmware="1.0", csr=csr, bundle_password="a long enough one"
    )
    wanted[50] = dataclasses.replace(wanted[50], request=bad)
    results = issuing.results(issuing.issue(wanted))
    assert isinstance(results.pop(50), InputInvalid)
    assert [result.device_id for result in results if isinstance(result, IssuedCredentials)] == [
        job.device_id for job in wanted if job.request.csr is None
    ]


@ON_SQLITE
def test_the_processes_yield_to_the_server_and_survive_an_interrupt_from_the_terminal(
    issuing: CredentialProcesses, jobs: Callable[[int], list[CredentialJob]]
) -> None:
    issuing.results(issuing.issue(jobs(100)))
    lower = os.getpriority(os.PRIO_PROCESS, 0) + NICENESS
    wait_until(lambda: {os.getpriority(os.PRIO_PROCESS, pid) for pid in running()} == {lower})  # one may still start
    for pid in running():
        os.kill(pid, signal.SIGINT)
    assert len(issuing.results(issuing.issue(jobs(100)))) == 100


@ON_SQLITE
def test_a_killed_process_fails_what_was_under_way_and_is_replaced(
    issuing: CredentialProcesses, jobs: Callable[[int], list[CredentialJob]]
) -> None:
    issuing.results(issuing.issue(jobs(100)))
    killed = running()
    under_way = issuing.issue(jobs(600))
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        issuing.results(under_way)
    assert len(issuing.results(issuing.issue(jobs(100)))) == 100
    assert not set(running()) & set(killed)


@ON_SQLITE
def test_a_process_that_hangs_is_ended(
    issuing: CredentialProcesses, jobs: Callable[[int], list[CredentialJob]], monkeypatch: pytest.MonkeyPatch
) -> None:
    issuing.results(issuing.issue(jobs(100)))
    hanging = running()
    for pid in hanging:
        os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(processes, "ANSWER_SECONDS", 0.2)
    with pytest.raises(Unavailable):
        issuing.results(issuing.issue(jobs(100)))
    for pid in hanging:
        os.kill(pid, signal.SIGCONT)  # from here on it sees that it is not wanted any more
    wait_until(lambda: not set(running()) & set(hanging))


@ON_SQLITE
def test_the_processes_stay_for_the_next_part_of_a_file_and_end_when_none_comes(
    issuing: CredentialProcesses, jobs: Callable[[int], list[CredentialJob]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with issuing.in_use():
        issuing.results(issuing.issue(jobs(100)))
    first = running()
    monkeypatch.setattr(processes, "IDLE_SECONDS", 0.1)
    with issuing.in_use():
        issuing.results(issuing.issue(jobs(100)))
        assert set(first) <= set(running())
    wait_until(lambda: not running())


def test_the_processes_take_no_part_in_the_counts_of_the_server() -> None:
    program = "import workflows.bulk.processes, sys; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class FailingToken:
    """Issues nothing for a while, as while a token is restarted."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.asked = 0

    def issue(self, _tenant: object, device_id: str, *_: object, **__: object) -> str:
        self.asked += 1
        if self.asked <= self.times:
            raise TokenUnavailable("The token is not there.")
        return device_id


@ON_SQLITE
def test_an_upload_waits_for_a_token_that_is_restarted_but_not_for_ever(
    jobs: Callable[[int], list[CredentialJob]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TOKEN_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(processes, "_token_fails_since", None)
    restarted, wanted = FailingToken(3), jobs(2)
    monkeypatch.setattr(processes, "_opened", restarted)
    assert [str(result) for result in processes._issue_here(wanted)] == [job.device_id for job in wanted]
    gone = FailingToken(1000000)
    monkeypatch.setattr(processes, "_opened", gone)
    monkeypatch.setattr(processes, "TOKEN_PATIENCE_SECONDS", 0.05)
    results = processes._issue_here(wanted)
    assert all(isinstance(result, TokenUnavailable) for result in results)
    before = gone.asked
    processes._issue_here(wanted)
    assert gone.asked == before + 2  # known to be away for long, so that no other row waits
