"""Three nodes on one PostgreSQL behind haproxy: enforced means refused at the broker of each, whoever is killed."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import requests

from store.listening import CHANNEL, WAITS
from tests.support.databases import POSTGRES_URL
from tests.support.deployment import Deployment, Onboarded, wait_until
from tests.support.nodes import Installation, by_another_clock, installation, is_let_in, kill, leaders, stopped

pytestmark = [pytest.mark.system, pytest.mark.skipif(not POSTGRES_URL, reason="needs PostgreSQL")]


@pytest.fixture(scope="module")
def three() -> Iterator[Installation]:
    with installation(3, PORTAL_ENFORCE_TIMEOUT="10") as made:
        yield made


def at(node: Deployment, device: Onboarded) -> Onboarded:
    """A device as it connects to the broker of a node."""
    return dataclasses.replace(device, port=node.mqtt_port)


@contextmanager
def waiting_requests(made: Installation) -> Iterator[Callable[[], bool]]:
    """Listen as nodes do; yields whether a request waits for other nodes since the last time."""
    url = made.nodes[0].environment["PORTAL_DATABASE_URL"].replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"LISTEN {CHANNEL}")
        yield lambda: WAITS in [told.payload for told in connection.notifies(timeout=0)]


def revoke(node: Deployment, device: Onboarded) -> dict[str, Any]:
    answer = node.call("POST", f"/revoke/{device.id}", {})
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


def test_registered_at_one_connected_at_each_and_revoked_at_another(three: Installation) -> None:
    first, second, third = three.nodes
    device = first.onboard()
    for node in three.nodes:
        wait_until(lambda node=node: is_let_in(at(node, device)))
    client = at(third, device).client()
    # The third node begins only once the request waits for it; it is said after its broker, too, has proven it.
    with ThreadPoolExecutor(1) as pool, waiting_requests(three) as one_waits:
        with stopped(third):
            answer = pool.submit(revoke, second, device)
            wait_until(lambda: one_waits() or answer.done())
            assert is_let_in(at(third, device))
            assert not answer.done()
        assert answer.result()["broker"] == "enforced"
        assert not any(is_let_in(at(node, device)) for node in three.nodes)
    client.wait_cut()
    client.close()


def test_while_a_node_is_killed_nothing_is_enforced_and_its_broker_has_all_once_it_is_back(three: Installation) -> None:
    first, second, third = three.nodes
    device = first.onboard("pump-2")
    wait_until(lambda: is_let_in(at(third, device)))
    kill(third)
    said = revoke(second, device)
    assert said["broker"] == "pending"
    assert not is_let_in(at(first, device))
    started = time.monotonic()
    third.start_portal()
    wait_until(lambda: revoke(second, device)["broker"] == "enforced")
    assert not is_let_in(at(third, device))
    print(f"{time.monotonic() - started:.1f} s from the start of the node to enforced")


@pytest.mark.long
def test_another_node_leads_at_once_when_the_one_that_leads_is_killed(three: Installation) -> None:
    wait_until(lambda: len(leaders(three.nodes[0])) == 1)
    [before] = leaders(three.nodes[0])
    for node in three.nodes:
        kill(node)
        started = time.monotonic()
        if before in leaders(three.nodes[0]):  # it was another one that led
            node.start_portal()
            continue
        wait_until(lambda: len(leaders(three.nodes[0])) == 1)
        print(f"{time.monotonic() - started:.1f} s until another node led")
        node.start_portal()
        return
    pytest.fail("no node led")


@pytest.mark.long
@pytest.mark.parametrize("kept", [False, True])
def test_a_rolling_restart_fails_no_request(three: Installation, kept: bool) -> None:
    """Though the load balancer is told nothing; ``kept``: each client keeps its connection as long as the node does."""
    first = three.nodes[0]
    stopping, answers = [False], []

    def load(number: int) -> None:
        session = requests.Session()
        session.trust_env, session.verify = False, first.session.verify
        session.headers["Authorization"] = first.session.headers["Authorization"]
        if not kept:
            session.headers["Connection"] = "close"
        count = 0
        while not stopping[0]:
            count += 1
            plain = {"name": f"load-{kept}-{number}-{count}", "type": "pump", "location": "hall 1", "firmware": "1.0"}
            answers.append(session.post(f"{three.url}/register", json=plain, timeout=60).status_code)
        session.close()

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load, number) for number in range(4)]
        try:
            for node in three.nodes:
                assert node.stop_portal(signal.SIGTERM) == [0]
                node.start_portal()
                wait_until(lambda node=node: three.is_up(node))
        finally:
            stopping[0] = True
        for one in running:
            one.result()
    assert set(answers) == {201}
    print(f"{len(answers)} requests during three restarts")


def test_postgresql_that_ends_all_sessions_loses_no_acknowledged_device(three: Installation) -> None:
    first, second, third = three.nodes
    registered = [node.register(name=f"kept-{number}")["device_id"] for number, node in enumerate(three.nodes)]
    url = first.environment["PORTAL_DATABASE_URL"].replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    started = time.monotonic()
    wait_until(lambda: all(node.call("GET", "/readyz").status_code == 200 for node in three.nodes))
    wait_until(lambda: len(leaders(first)) == 1)
    print(f"{time.monotonic() - started:.1f} s until all nodes were ready and one led")
    for device_id in registered:
        assert third.call("GET", f"/devices/{device_id}").status_code == 200
        assert second.call("POST", f"/revoke/{device_id}", {}).json()["broker"] == "enforced"


@pytest.mark.long
@pytest.mark.parametrize("ahead", ["+60s", "-60s"])
def test_a_node_whose_clock_is_a_minute_off_agrees_with_the_others(three: Installation, ahead: str) -> None:
    first, second, third = three.nodes
    with by_another_clock(third, ahead):
        for number, (one, other) in enumerate(((first, third), (third, second))):
            device = first.onboard(f"clock-{number}{ahead}")
            for node in three.nodes:
                wait_until(lambda node=node, device=device: is_let_in(at(node, device)))
            registered = third.register(name=f"late-{number}{ahead}")["device_id"]
            assert one.call("GET", f"/devices/{registered}").status_code == 200
            assert revoke(other, device)["broker"] == "enforced"
            assert not any(is_let_in(at(node, device)) for node in three.nodes)
