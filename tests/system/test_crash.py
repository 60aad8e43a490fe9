"""A portal that is killed at any moment loses nothing that it answered, and never accepts a revoked device."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from bench.harness import make_csr
from tests.support.crash import Ledger, Load, Victim, acl_blocks, read_crl, refusal_of
from tests.support.crash_check import Check
from tests.support.deployment import PLAIN, wait_until
from tests.support.receiver import Receiver, receiving

pytestmark = pytest.mark.system

KILLS = 8
ANSWERS_BETWEEN_KILLS = 12


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    """A portal of one worker, so that it is the process that is asked that works for the broker, too."""
    # The control with the more steps; the broker is not restarted for topics that no test here needs it to have.
    files = {"PORTAL_BROKER_CONTROL": "files", "PORTAL_ACL_STYLE": "per-device", "PORTAL_BROKER_RESTART": ""}
    with Victim(**files, PORTAL_WORKERS="1", PORTAL_WEBHOOK_ALLOW="127.0.0.0/8,::1") as running:
        yield running


def killed_at(victim: Victim, plan: str, method: str, url: str, **request: object) -> None:
    """Have the portal killed, all its processes, at a named step of a request."""
    arm(victim, plan)
    die(victim, method, url, **request)


def arm(victim: Victim, plan: str) -> None:
    """Have a portal running that will be killed at a named step."""
    failing = {"PORTAL_FAILPOINT": f"{plan}=killgroup"}
    if victim.processes and victim.started_with == failing:
        return
    victim.kill_portal()
    assert victim.start_portal(others=failing).poll() is None, victim.log.read_text()
    victim.wait_ready()


def die(victim: Victim, method: str, url: str, **request: object) -> None:
    """Make the request that the portal is killed in."""
    with pytest.raises(requests.ConnectionError):
        victim.session.request(method, url, timeout=20, **request)  # type: ignore[arg-type]  # as requests has it
    wait_until(lambda: victim.processes[0].poll() is not None)
    victim.kill_portal()


def start_again(victim: Victim) -> None:
    """Have the portal running as it does with nothing in its environment to fail at."""
    if victim.processes and "PORTAL_FAILPOINT" not in victim.started_with:
        return
    victim.kill_portal()
    assert victim.start_portal().poll() is None, victim.log.read_text()
    victim.wait_ready()


def is_accepted(victim: Victim, device: dict[str, str]) -> bool:
    key, ca = victim.folder / f"{device['name']}.key", victim.operator["PORTAL_CA"]
    # Its topics would be in force after a restart of the broker only, which is not what is tried here.
    return refusal_of(ca, device["chain"], key, device["device_id"], victim.mqtt_port, victim.folder, topics=0) == ""


REGISTER_STEPS = {
    "register.before_commit": False,
    "register.after_commit": True,
    "register.before_answer": True,
}


@pytest.mark.parametrize("step", REGISTER_STEPS)
def test_a_registration_cut_off_is_whole_or_not_there_and_a_repeat_makes_no_second_one(
    victim: Victim, step: str
) -> None:
    body = PLAIN | {"name": step}
    repeatable = {"Idempotency-Key": f"a-key-for-{step}"}
    killed_at(victim, step, "POST", f"{victim.url}/register", json=body, headers=repeatable)
    start_again(victim)
    found = victim.call("GET", f"/devices?q={step}").json()["devices"]
    assert len(found) == REGISTER_STEPS[step]
    answer = victim.call("POST", "/register", body, headers=repeatable).json()
    again = victim.call("GET", f"/devices?q={step}").json()["devices"]
    assert [device["device_id"] for device in again] == [answer["device_id"]]
    assert not found or found[0]["device_id"] == answer["device_id"]
    assert victim.session.get(answer["download_url"], timeout=20).content.startswith(b"PK")
    wait_until(lambda: answer["device_id"] in acl_blocks(victim.data / "broker"))


REVOKE_STEPS = {
    "revoke.before_commit": False,
    "revoke.after_commit": True,
    "revoke.after_commit>apply.begin": True,
    "revoke.after_commit>apply.after_snapshot": True,
    "revoke.after_commit>apply.after_crl_signed": True,
    "revoke.after_commit>apply.after_crl_committed": True,
    "revoke.after_commit>install.staged": True,
    "revoke.after_commit>install.renamed:1": True,  # the CRL
    "revoke.after_commit>install.renamed:2": True,  # the ACL
    "revoke.after_commit>install.renamed:3": True,  # the record of both
    "revoke.after_commit>apply.after_install": True,
    "revoke.after_commit>apply.after_reload": True,
    "revoke.after_commit>apply.after_cut": True,
    "revoke.after_commit>apply.after_probe": True,
    "revoke.after_commit>apply.before_recorded": True,
    "revoke.after_commit>apply.after_recorded": True,
}
STEP_AFTER = dict(itertools.pairwise(REVOKE_STEPS))


@pytest.mark.parametrize("step", REVOKE_STEPS)
def test_a_revocation_cut_off_is_finished_by_the_next_start_with_nobody_asking(victim: Victim, step: str) -> None:
    arm(victim, step)
    device, other = (
        victim.register(name=name, csr=make_csr(victim.folder, name).read_text())
        for name in ("to be revoked", "to stay")
    )
    assert is_accepted(victim, device)
    die(victim, "POST", f"{victim.url}/revoke/{device['device_id']}")
    broker = victim.data / "broker"
    assert read_crl(broker, victim.data / "ca.pem")[1] == ""  # what is there is whole and current
    # The portal that is to be killed in the next revocation is the one that finishes this one.
    if step in STEP_AFTER:
        arm(victim, STEP_AFTER[step])
    else:
        start_again(victim)
    committed = REVOKE_STEPS[step]
    status = victim.call("GET", f"/devices/{device['device_id']}").json()["status"]
    assert status == ("revoked" if committed else "active")
    assert is_accepted(victim, device) is not committed
    assert is_accepted(victim, other)
    assert (device["device_id"] in acl_blocks(broker)) is not committed
    listed, problem = read_crl(broker, victim.data / "ca.pem")
    assert problem == ""
    assert (int(device["serial_number"], 16) in listed) is committed
    assert not list(broker.glob(".*"))  # nothing of a write that was cut off is left lying about


def test_what_was_cut_off_in_suspending_resuming_or_renewing_is_whole_or_not_done(victim: Victim) -> None:
    start_again(victim)
    csr = make_csr(victim.folder, "to be parked").read_text()
    device = victim.register(name="to be parked", csr=csr)
    path = f"/devices/{device['device_id']}"
    renewal: dict[str, Any] = {
        "json": {"csr": csr, "overlap_hours": 0},
        "headers": {"Idempotency-Key": "a-key-for-the-renewal"},
    }
    # The portal that is to be killed at a step is the one that shows what has become of the step before.
    for step, status in (
        ("suspend.before_commit", "active"),
        ("suspend.after_commit", "active"),
        ("resume.before_commit", "suspended"),
        ("resume.after_commit", "suspended"),
        ("renew.before_commit", "active"),
        ("renew.after_commit", "active"),
    ):
        arm(victim, step)
        assert victim.call("GET", path).json()["status"] == status
        assert len(victim.call("GET", f"{path}/certificates").json()["certificates"]) == 1
        assert is_accepted(victim, device) is (status == "active")
        operation = step.partition(".")[0]
        die(victim, "POST", f"{victim.url}{path}/{operation}", **(renewal if operation == "renew" else {}))
    start_again(victim)
    assert not is_accepted(victim, device)  # its certificate was to end at once, and ends with nobody asking
    answer = victim.session.post(f"{victim.url}{path}/renew", timeout=20, **renewal)
    assert answer.status_code == 201
    assert len(victim.call("GET", f"{path}/certificates").json()["certificates"]) == 2
    assert is_accepted(victim, device | answer.json())


def test_an_event_whose_portal_was_killed_before_it_was_sent_is_sent_by_the_next_start(victim: Victim) -> None:
    start_again(victim)
    with receiving() as receiver:
        webhook = victim.call(
            "POST", "/webhooks", {"name": "a receiver", "url": receiver.url, "events": ["registered"]}
        ).json()
        killed_at(victim, "register.after_commit", "POST", f"{victim.url}/register", json=PLAIN | {"name": "told"})
        before = list(receiver.requests)
        start_again(victim)
        (device,) = victim.call("GET", "/devices?q=told").json()["devices"]
        wait_until(lambda: receiver.requests)
        victim.call("DELETE", f"/webhooks/{webhook['webhook_id']}")
        assert before == []
        told = {(event["type"], event["device_id"]) for event in map(json.loads, bodies(receiver))}
        assert told == {("registered", device["device_id"])}


def bodies(receiver: Receiver) -> list[bytes]:
    return [request.body for request in receiver.requests]


DELIVER_STEPS = {"deliver.before_commit": False, "deliver.after_commit": True}


@pytest.mark.parametrize("step", DELIVER_STEPS)
def test_a_fetch_cut_off_has_used_its_link_if_and_only_if_that_was_committed(victim: Victim, step: str) -> None:
    start_again(victim)
    link = victim.register()["download_url"]
    killed_at(victim, step, "GET", link)
    start_again(victim)
    first, second = (victim.session.get(link, timeout=20) for _ in range(2))
    if DELIVER_STEPS[step]:  # the bundle is lost: the operator renews
        assert (first.status_code, first.json()["code"]) == (410, "link_used")
    else:
        assert first.content.startswith(b"PK")
    assert (second.status_code, second.json()["code"]) == (410, "link_used")


@pytest.mark.long
def test_killed_again_and_again_under_load_nothing_that_was_answered_is_lost() -> None:
    with Victim() as victim:
        ledger = Ledger(victim.folder, seed=1)
        check = Check(victim, ledger, "guard")
        for _ in range(KILLS):
            with Load(ledger, victim, "guard") as load:
                enough = ledger.answers.total() + ANSWERS_BETWEEN_KILLS
                wait_until(lambda enough=enough: ledger.answers.total() >= enough)
                victim.kill_portal()
                load.stop()
            check.refuses(2, "enforced")  # with no portal there
            assert victim.start_portal().poll() is None, victim.log.read_text()
            check.quick()
        check.everything()
        assert ledger.said == []
        assert check.done["revoked devices refused"] > 0
        assert victim.run_flask("audit", "verify").stdout.startswith("All ")
