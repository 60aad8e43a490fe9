"""The whole portal's figures: whichever worker process is asked, and whichever was killed."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest

from tests.support.deployment import Deployment, wait_until
from tests.support.exposition import Samples, samples_of, total_of, value_of
from tests.support.sockets import serves

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Deployment(PORTAL_WORKERS="3", PORTAL_LOGIN_FAILURES="10") as running:
        yield running


def scrape(deployment: Deployment) -> Samples:
    deployment.session.close()  # a new connection, which any worker may have
    answer = deployment.call("GET", "/metrics")
    assert answer.status_code == 200, answer.text
    return samples_of(answer.text)


def counted(deployment: Deployment) -> float:
    return requests_in(scrape(deployment))


def requests_in(samples: Samples) -> float:
    return total_of(samples, "portal_http_requests_total", route="/healthz")


@contextmanager
def connection_to(deployment: Deployment, worker: int) -> Iterator[http.client.HTTPSConnection]:
    """Open connections until this worker has one."""
    address = urlsplit(deployment.url)
    context = ssl.create_default_context(cafile=deployment.operator["PORTAL_CA"])
    for _ in range(1000):
        with closing(http.client.HTTPSConnection(address.hostname or "", address.port, context=context)) as connection:
            connection.connect()
            if serves(worker, connection.sock):
                yield connection
                return
    pytest.fail("The worker got none of 1,000 connections.")


def ask(connection: http.client.HTTPSConnection, deployment: Deployment, path: str) -> str:
    connection.request("GET", path, headers={"Authorization": f"Bearer {deployment.operator['PORTAL_TOKEN']}"})
    answer = connection.getresponse()
    assert answer.status == 200
    return answer.read().decode()


def test_every_worker_reports_the_same_and_all_of_it(deployment: Deployment) -> None:
    wait_until(lambda: len(deployment.workers()) == 3)  # the first of them has been ready
    before = counted(deployment)
    workers = deployment.workers()
    for worker in workers:
        with connection_to(deployment, worker) as connection:
            for _ in range(4):
                ask(connection, deployment, "/healthz")
    told = []
    for worker in workers:
        with connection_to(deployment, worker) as connection:
            told.append(requests_in(samples_of(ask(connection, deployment, "/metrics"))))
    assert told == [before + 12] * 3
    assert deployment.workers() == workers


def test_a_revocation_is_counted_with_the_time_until_the_broker_refused_the_device(deployment: Deployment) -> None:
    before = scrape(deployment)
    device = deployment.register()["device_id"]
    assert deployment.call("POST", f"/revoke/{device}").json()["broker"] == "enforced"
    after = scrape(deployment)
    for name in ("portal_registrations_total", "portal_revocations_total", "portal_enforce_seconds_count"):
        assert total_of(after, name) == total_of(before, name) + 1
    assert value_of(after, "portal_generation_pending_seconds") == 0
    assert value_of(after, "portal_broker_up") == 1


def test_killed_workers_take_no_counts_with_them_and_leave_no_files(deployment: Deployment) -> None:
    before = counted(deployment)
    for _ in range(3):
        for _ in range(4):
            deployment.session.close()
            assert deployment.call("GET", "/healthz").status_code == 200
        there = deployment.workers()
        os.kill(there[0], signal.SIGKILL)
        wait_until(lambda gone=there[0]: gone not in deployment.workers() and len(deployment.workers()) == 3)
    assert counted(deployment) == before + 12
    assert (
        len([*(deployment.data / "metrics").glob("*.db")]) <= 14
    )  # two for each process of both listeners, and a spare


def test_the_workers_count_failed_logins_together(deployment: Deployment) -> None:
    statuses = []
    for _ in range(15):
        deployment.session.close()
        answer = deployment.call("GET", "/devices", headers={"Authorization": "Bearer op_guess"})
        statuses.append(answer.status_code)
    assert statuses == [401] * 10 + [429] * 5
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert deployment.call("GET", "/devices").status_code == 200
    assert value_of(scrape(deployment), "portal_refusals_total", code="too_many_attempts") == 5
