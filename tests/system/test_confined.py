"""The portal within the bounds that its systemd unit sets for system calls."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import PLAIN, ROOT, Deployment

pytestmark = pytest.mark.system

UNIT = ROOT / "deploy" / "onboarding-portal.service"


class Confined(Deployment):
    under = (sys.executable, str(ROOT / "tests" / "support" / "confinement.py"), str(UNIT))


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Confined(PORTAL_WORKERS="2") as running:
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


def test_the_server_is_confined(deployment: Deployment) -> None:
    for pid in (deployment.processes[0].pid, *deployment.workers()):
        assert "\nSeccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text()


def test_a_device_is_registered_publishes_and_is_revoked(deployment: Deployment) -> None:
    device = deployment.onboard()
    client = device.client()
    assert deployment.call("POST", f"/revoke/{device.id}").json()["broker"] == "enforced"
    client.wait_cut()
    device.refusal()


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


def test_nothing_was_refused_that_is_needed(deployment: Deployment) -> None:
    assert "not permitted" not in deployment.log.read_text()
