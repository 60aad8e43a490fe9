"""The demo tells its story to the end, notices what does not happen, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import wait_until
from tests.support.script_process import (
    ROOT,
    ScriptFolder,
    machine_without,
    processes_with,
    script_environment,
)

pytestmark = pytest.mark.system

STEP = re.compile(r"^ ?(\d+)\. (.+?) +(\d+ ms|\d+\.\d s)$", re.MULTILINE)


@pytest.fixture
def folder() -> Iterator[Path]:
    with ScriptFolder() as made:
        yield made


def started(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The demo, with its temporary folder in ``folder``."""
    temporary = folder / "tmp"
    temporary.mkdir(mode=0o711)
    return subprocess.Popen(
        [ROOT / "scripts" / "demo"],
        env=script_environment(TMPDIR=str(temporary), COLUMNS="120", **environment),  # so that no line is wrapped
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(folder: Path) -> list[str]:
    """Files and processes of the demo; one that it was starting may need a moment to end."""
    processes = [f"process {process}" for process in processes_with(str(folder / "tmp"))]
    return processes + [str(path) for path in (folder / "tmp").iterdir()]


def test_the_demo_runs_to_its_end_and_leaves_nothing_behind(folder: Path) -> None:
    with started(folder) as demo:
        printed, errors = demo.communicate(timeout=180)
    assert (demo.returncode, errors) == (0, "")
    steps = STEP.findall(printed)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    assert re.search(rf"^All {len(steps)} steps happened as they should, in \d+\.\d s\.\n\Z", printed, re.MULTILINE)
    for seen in (
        "-rw-------  device.key",
        "410: This link was used at ",
        "devices/hall-2/pressure 2.4 bar",
        "Not authorized",
        "the broker cuts its session",
        "alert certificate revoked",
    ):
        assert seen in printed
    wait_until(lambda: left_behind(folder) == [])


def test_it_fails_where_a_step_does_not_happen(folder: Path) -> None:
    real = shutil.which("mosquitto_pub")
    silent = folder / "mosquitto_pub"
    silent.write_text(f'#!/bin/sh\nexec "{real}" "$@" >/dev/null 2>&1\n')
    silent.chmod(0o755)
    with started(folder, PATH=f"{folder}:{os.environ['PATH']}") as demo:
        printed, errors = demo.communicate(timeout=180)
    assert demo.returncode == 1
    assert errors.startswith(
        "\nThe demo failed: the broker's answer was ''.\nIt should have been: pump-1 tries a topic"
    )
    assert "happened as they should" not in printed
    wait_until(lambda: left_behind(folder) == [])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_stopped_at_any_time(folder: Path, how: signal.Signals) -> None:
    with started(folder) as demo:
        assert demo.stdout is not None
        wanted = "1." if how is signal.SIGTERM else "A device"
        for line in demo.stdout:
            if line.strip().startswith(wanted):
                break
        demo.send_signal(how)
        _, errors = demo.communicate(timeout=180)
    assert (demo.returncode, errors) == (130, "\nStopped; nothing is left running, nothing is left on the disk.\n")
    wait_until(lambda: left_behind(folder) == [])


def test_without_mosquitto_it_says_what_to_install(folder: Path) -> None:
    root, path = machine_without(folder, "mosquitto", "apt", "sudo")
    done = subprocess.run(
        [root / "scripts" / "demo"],
        env=script_environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "mosquitto is missing and could not be installed. Install it with: apt-get install mosquitto\n"
        "mosquitto_pub is missing and could not be installed. Install it with: apt-get install mosquitto-clients\n"
        "The demo needs a real broker and its clients; nothing was run.\n"
    )
