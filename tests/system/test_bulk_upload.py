"""An upload to the running portal by curl, its devices at the broker, and what is left of it after a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import Deployment, Onboarded, wait_until

pytestmark = pytest.mark.system

HEADER = "external_id,name,type,location,firmware\n"


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Deployment() as running:
        yield running


def curl(deployment: Deployment, source: str) -> list[str]:
    """The command that uploads a file, or . for what it is given, and writes the answers as they come."""
    access = deployment.operator
    headers = ["-H", f"Authorization: Bearer {access['PORTAL_TOKEN']}", "-H", "Content-Type: text/csv"]
    command = ["curl", "-sS", "--no-buffer", "--fail-with-body", "--cacert", access["PORTAL_CA"], *headers]
    return [*command, "-X", "POST", "-T", source, f"{deployment.url}/register/bulk"]


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def rows(first: int, last: int) -> str:
    return "".join(f"unit-{number},pump-{number},pump,hall 1,1.0\n" for number in range(first, last))


def issuing_processes(deployment: Deployment) -> set[int]:
    """The processes of the server that issue credentials for an upload."""
    return {pid for pid, parent in spawned_processes().items() if parent in deployment.workers()}


def spawned_processes() -> dict[int, int]:
    """The processes on this machine that Python's multiprocessing has started, each with its parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            status = (path.parent / "status").read_text()
        except OSError:
            continue
        if b"--multiprocessing-fork" in words:
            found[int(path.parent.name)] = int(status.partition("\nPPid:")[2].split()[0])
    return found


def kill_servers(deployment: Deployment) -> None:
    """SIGKILL to the server's master and workers, and to nothing that those have started."""
    for pid in (deployment.processes[0].pid, *deployment.workers()):
        os.kill(pid, signal.SIGKILL)
    deployment.processes.pop().wait()


def test_a_file_becomes_devices_that_the_broker_accepts(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "fleet.csv"
    file.write_text(HEADER + rows(0, 400))
    done = subprocess.run(curl(deployment, str(file)), check=True, capture_output=True, text=True)
    answers = lines_of(done.stdout)
    assert [answer["external_id"] for answer in answers] == [f"unit-{number}" for number in range(400)]
    last = answers[-1]
    folder = tmp_path / "device"
    password = tmp_path / "password"
    password.write_text(last["bundle_password"])
    deployment.cli("download", last["download_url"], "--out", str(folder), "--password-file", str(password))
    client = Onboarded(last["device_id"], folder, deployment.mqtt_port).client()
    assert client.publish(f"devices/{last['device_id']}/up") == "No matching subscribers"
    client.close()


def test_answers_come_before_the_upload_ends_and_a_killed_portal_leaves_whole_batches(deployment: Deployment) -> None:
    with subprocess.Popen(curl(deployment, "."), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as upload:
        assert upload.stdin is not None
        assert upload.stdout is not None
        upload.stdin.write(HEADER + rows(400, 500))
        upload.stdin.flush()
        answers = [json.loads(upload.stdout.readline()) for _ in range(100)]
        ours = issuing_processes(deployment)
        assert ours
        kill_servers(deployment)
        upload.stdin.close()
        assert upload.wait(20) != 0
    wait_until(lambda: not ours & spawned_processes().keys())
    deployment.start_portal()
    text = HEADER + rows(400, 520)
    done = subprocess.run(curl(deployment, "."), input=text, check=True, capture_output=True, text=True)
    again = lines_of(done.stdout)
    assert [answer.get("repeated", False) for answer in again] == [number < 100 for number in range(120)]
    assert [answer["device_id"] for answer in again[:100]] == [answer["device_id"] for answer in answers]


def test_an_operator_without_the_permission_is_refused_before_the_file_is_sent(
    deployment: Deployment, tmp_path: Path
) -> None:
    file = tmp_path / "fleet.csv"
    file.write_text(HEADER + rows(0, 100_000))
    command = curl(deployment, str(file))
    command[command.index("-H") + 1] = "Authorization: Bearer wrong"
    done = subprocess.run([*command, "-w", "%{size_upload}"], check=False, capture_output=True, text=True)
    problem, _, sent = done.stdout.rpartition("}")
    assert json.loads(problem + "}")["code"] == "unauthenticated"
    assert int(sent) < file.stat().st_size
