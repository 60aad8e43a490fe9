"""Portal and broker within the bounds that their systemd units set for users, privileges and system calls."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import PLAIN, ROOT, Deployment, Onboarded, wait_until
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.system

CONFINEMENT = (sys.executable, str(ROOT / "tests" / "support" / "confinement.py"))
UNIT = ROOT / "deploy" / "onboarding-portal.service"
BROKER_UNIT = ROOT / "deploy" / "mosquitto-override.conf"
# Systemd changes user and group, and takes the capabilities, before it starts the program. Only root can do the same.
AS_ITS_USER = ("setpriv", "--reuid=mosquitto", "--regid=mosquitto", "--clear-groups", "--bounding-set=-all", "--")


class ConfinedBroker(Mosquitto):
    def command(self) -> list[str]:
        as_its_user = AS_ITS_USER if os.geteuid() == 0 else ()
        return [*as_its_user, *CONFINEMENT, str(BROKER_UNIT), *super().command()]


class Confined(Deployment):
    under = (*CONFINEMENT, str(UNIT))

    def start_broker(self) -> Mosquitto:
        self.broker = ConfinedBroker(self.data / "broker", self.mqtt_port, guard=True).start()
        return self.broker


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Confined(PORTAL_WORKERS="2", PORTAL_BROKER_CONTROL="guard") as running:
        yield running


def children(pid: int) -> list[int]:
    """The processes that any thread of a process has started."""
    found: list[int] = []
    for thread in threads(pid):
        with contextlib.suppress(OSError):  # it has just ended
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def threads(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def test_server_and_broker_are_confined(deployment: Deployment) -> None:
    assert deployment.broker is not None
    for pid in (deployment.processes[0].pid, *deployment.workers(), deployment.broker.pid):
        assert "\nSeccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text()
    status = Path(f"/proc/{deployment.broker.pid}/status").read_text()
    assert "\nCapEff:\t0000000000000000\n" in status
    assert "\nNoNewPrivs:\t1\n" in status


def test_a_device_is_registered_publishes_and_is_revoked(deployment: Deployment) -> None:
    device = deployment.onboard()
    client = device.client()
    assert deployment.call("POST", f"/revoke/{device.id}").json()["broker"] == "enforced"
    client.wait_cut()
    wait_until(lambda: refused_by_tls(device))  # once the broker has read the CRL that follows the answer


def refused_by_tls(device: Onboarded) -> bool:
    with contextlib.suppress(AssertionError):
        return bool(device.refusal())
    return False


def test_an_upload_is_worked_on_by_processes_of_its_own(deployment: Deployment) -> None:
    access = deployment.operator
    headers = ["-H", f"Authorization: Bearer {access['PORTAL_TOKEN']}", "-H", "Content-Type: application/x-ndjson"]
    command = ["curl", "-sS", "--no-buffer", "--fail-with-body", "--cacert", access["PORTAL_CA"], *headers]
    command += ["-X", "POST", "-T", ".", f"{deployment.url}/register/bulk"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as upload:
        assert upload.stdin is not None
        assert upload.stdout is not None
        upload.stdin.write((json.dumps(PLAIN) + "\n") * 300)
        upload.stdin.flush()
        answers = [json.loads(upload.stdout.readline()) for _ in range(250)]
        makers = [child for worker in deployment.workers() for child in children(worker)]
        assert makers
        upload.stdin.close()
        answers += [json.loads(line) for line in upload.stdout]
        assert upload.wait(20) == 0
    assert len({answer["device_id"] for answer in answers}) == 300


def test_the_broker_writes_its_database_and_starts_again(deployment: Deployment) -> None:
    device = deployment.onboard()
    database = deployment.data / "broker" / "mosquitto.db"
    database.unlink(missing_ok=True)
    deployment.stop_broker()
    assert database.stat().st_size > 0
    deployment.start_broker()
    deployment.wait_ready()
    device.client().close()


def test_nothing_was_refused_that_is_needed(deployment: Deployment) -> None:
    assert deployment.broker is not None
    for log in (deployment.log.read_text(), deployment.broker.log):
        assert "not permitted" not in log
