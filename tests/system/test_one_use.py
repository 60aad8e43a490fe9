"""One use is one use, however many ask at once, over HTTPS and with several processes that answer."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.support.crash import access_on_disk, read_crl
from tests.support.deployment import PLAIN, Deployment, deployed, wait_until

pytestmark = pytest.mark.system

AT_ONCE = 50
DEVICES = 20
Ask = Callable[[requests.Session], requests.Response]


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with deployed(PORTAL_WORKERS="3") as running:
        yield running


@pytest.fixture(scope="module")
def sessions(deployment: Deployment) -> Iterator[list[requests.Session]]:
    """Clients whose connections stand before they ask."""
    made = []
    for _ in range(AT_ONCE):
        session = requests.Session()
        session.trust_env = False
        session.verify = deployment.session.verify
        session.headers.update(deployment.session.headers)
        assert session.get(f"{deployment.url}/healthz", timeout=20).status_code == 200
        made.append(session)
    yield made
    for session in made:
        session.close()


def at_once(sessions: list[requests.Session], asked: list[Ask]) -> list[requests.Response]:
    """Each client asks its question, all at the same moment."""
    barrier = threading.Barrier(len(asked))

    def ask(session: requests.Session, question: Ask) -> requests.Response:
        barrier.wait(20)
        return question(session)

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(ask, sessions, asked))


def statuses(answers: list[requests.Response]) -> dict[int, int]:
    return dict(collections.Counter(answer.status_code for answer in answers))


def test_fifty_fetches_of_a_link_at_once_give_one_bundle(
    deployment: Deployment, sessions: list[requests.Session]
) -> None:
    for _ in range(5):
        registered = deployment.register()
        link = registered["download_url"]
        fetches: list[Ask] = [lambda session: session.get(link, timeout=60)] * AT_ONCE  # noqa: B023 - used here only
        answers = at_once(sessions, fetches)
        assert statuses(answers) == {200: 1, 410: AT_ONCE - 1}
        (bundle,) = [answer.content for answer in answers if answer.status_code == 200]
        assert bundle.startswith(b"PK")
        assert {answer.json()["code"] for answer in answers if answer.status_code == 410} == {"link_used"}
        of_device = {"object": f"device:{registered['device_id']}", "action": "bundle:deliver"}
        wait_until(lambda: len(entries(deployment, **of_device)) == 1)  # noqa: B023 - used here only
        assert len(entries(deployment, **of_device | {"action": "bundle:fetch", "outcome": "done"})) == 1


def test_fifty_fetches_of_a_link_at_once_with_a_key_for_each_pair_give_the_bundle_to_one_pair(
    deployment: Deployment, sessions: list[requests.Session]
) -> None:
    registered = deployment.register()
    link = registered["download_url"]

    def fetch(key: str) -> Ask:
        return lambda session: session.get(link, headers={"Idempotency-Key": key}, timeout=60)

    answers = at_once(sessions, [fetch(f"the-key-of-the-pair-{number // 2}") for number in range(AT_ONCE)])
    assert statuses(answers) == {200: 2, 410: AT_ONCE - 2}
    (first, second) = (number for number, answer in enumerate(answers) if answer.status_code == 200)
    assert first // 2 == second // 2
    assert answers[first].content == answers[second].content
    of_device = {"object": f"device:{registered['device_id']}", "outcome": "done"}
    wait_until(lambda: len(entries(deployment, **of_device, action="bundle:repeat")) == 1)
    assert len(entries(deployment, **of_device, action="bundle:deliver")) == 1


def test_fifty_registrations_with_one_idempotency_key_at_once_make_one_device(
    deployment: Deployment, sessions: list[requests.Session]
) -> None:
    for number in range(3):
        body = PLAIN | {"name": f"once-{number}"}
        key = {"Idempotency-Key": f"one-key-for-all-of-them-{number}"}
        url = f"{deployment.url}/register"
        registrations: list[Ask] = [
            lambda session: session.post(url, json=body, headers=key, timeout=60)  # noqa: B023 - used here only
        ] * AT_ONCE
        answers = at_once(sessions, registrations)
        assert statuses(answers) == {201: AT_ONCE}
        assert len({answer.text for answer in answers}) == 1
        found = deployment.call("GET", f"/devices?q=once-{number}").json()["devices"]
        assert [device["device_id"] for device in found] == [answers[0].json()["device_id"]]
        assert len(deployment.call("GET", f"/devices/{found[0]['device_id']}/certificates").json()["certificates"]) == 1


def test_changes_and_revocations_at_once_have_one_order_and_revoked_wins(
    deployment: Deployment, sessions: list[requests.Session]
) -> None:
    devices = [deployment.register()["device_id"] for _ in range(DEVICES)]

    def change(device_id: str, number: int) -> Ask:
        topics = [{"filter": f"devices/{{id}}/{number}", "access": "write"}]
        body = {"location": f"hall {number}", "topics": topics}
        return lambda session: session.patch(f"{deployment.url}/devices/{device_id}", json=body, timeout=60)

    def revoke(device_id: str) -> Ask:
        return lambda session: session.post(f"{deployment.url}/revoke/{device_id}", timeout=60)

    counted: collections.Counter[int] = collections.Counter()
    for start in range(0, DEVICES, 10):
        some = devices[start : start + 10]
        asked = [
            question
            for device_id in some
            for question in (change(device_id, 1), revoke(device_id), change(device_id, 2), revoke(device_id))
        ]
        answers = at_once(sessions, asked)
        for number, answer in enumerate(answers):
            if number % 2:  # a revocation
                assert answer.status_code == 200, answer.text
                assert answer.json()["broker"] == "enforced"
            else:
                assert answer.status_code in (200, 409), answer.text
                counted[answer.status_code] += 1
    assert sum(counted.values()) == 2 * DEVICES
    granted, _ = access_on_disk(deployment.data / "broker")
    for device_id in devices:
        shown = deployment.call("GET", f"/devices/{device_id}").json()
        assert shown["status"] == "revoked"
        assert device_id not in granted
        done = [entry["action"] for entry in entries(deployment, object=f"device:{device_id}", outcome="done")]
        assert done.count("device:revoke") == 1
        assert done[0] == "device:revoke"  # the newest: no change came after it
    deployment.wait_ready()


def test_everything_at_once_has_one_order_and_revoked_wins(
    deployment: Deployment, sessions: list[requests.Session]
) -> None:
    devices = [deployment.register()["device_id"] for _ in range(5)]

    def post(path: str) -> Ask:
        return lambda session: session.post(f"{deployment.url}{path}", timeout=60)

    def move(device_id: str) -> Ask:
        return lambda session: session.patch(
            f"{deployment.url}/devices/{device_id}", json={"location": "hall 2"}, timeout=60
        )

    asked = [
        question
        for device_id in devices
        for question in (
            *(post(f"/devices/{device_id}/{verb}") for verb in ("suspend", "resume", "renew", "suspend", "resume")),
            post(f"/revoke/{device_id}"),
            post(f"/devices/{device_id}/renew"),
            move(device_id),
            post(f"/devices/{device_id}/resume"),
            post(f"/revoke/{device_id}"),
        )
    ]
    answers = at_once(sessions, asked)
    for answer in answers:
        assert answer.status_code in (200, 201, 409), answer.text
    revoked: set[int] = set()
    granted, _ = access_on_disk(deployment.data / "broker")
    for number, device_id in enumerate(devices):
        of_device = answers[10 * number : 10 * (number + 1)]
        for revocation in (of_device[5], of_device[9]):
            assert (revocation.status_code, revocation.json()["broker"]) == (200, "enforced")
        assert deployment.call("GET", f"/devices/{device_id}").json()["status"] == "revoked"
        certificates = deployment.call("GET", f"/devices/{device_id}/certificates").json()["certificates"]
        assert len(certificates) == 1 + sum(answer.status_code == 201 for answer in of_device)
        assert {certificate["status"] for certificate in certificates} == {"revoked"}
        revoked |= {int(certificate["serial_number"], 16) for certificate in certificates}
        assert device_id not in granted
        for renewed in (of_device[2], of_device[6]):
            if renewed.status_code == 201:  # its bundle is of no use to anybody, and gone
                assert deployment.session.get(renewed.json()["download_url"], timeout=20).status_code == 410
        done = [entry["action"] for entry in entries(deployment, object=f"device:{device_id}", outcome="done")]
        assert done[0] == "device:revoke"  # the newest: nothing came after it
        assert done.count("device:revoke") == 1
        parked = [action for action in reversed(done) if action in ("device:suspend", "device:resume")]
        assert parked[::2] == ["device:suspend"] * len(parked[::2])  # one after the other, by turns
        assert parked[1::2] == ["device:resume"] * len(parked[1::2])
    deployment.wait_ready()
    broker, ca = deployment.data / "broker", deployment.data / "ca.pem"
    wait_until(lambda: revoked <= read_crl(broker, ca)[0])  # it follows the answers
    assert read_crl(broker, ca)[1] == ""


def entries(deployment: Deployment, **filters: str) -> list[dict[str, str]]:
    """Entries of the audit record, newest first."""
    found: list[dict[str, str]] = deployment.call("GET", "/audit", params=filters).json()["entries"]
    return found
