"""The session of the README, run again; what the operator's guide says of the data folder."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import ROOT, Deployment, deployed, wait_until
from tests.support.shell_session import ShellSession, masked

pytestmark = pytest.mark.system

README = (ROOT / "README.md").read_text()
HOME = "/opt/onboarding-portal"  # where the README's session was recorded
# Files of a portal that has a second tenant or quotas, whose CA keys live in a token or were moved there, whose CA
# waits for its certificate, or whose HTTPS has a certificate of another issuer.
OF_SOME = {
    ".folder-id",
    "secrets/installation-key",
    "rates",
    "secrets/audit-keys/",
    "audit-checkpoints/",
    "ca/*.token.json",
    "ca/*.destroyed",
    "ca/.pin-refused-*",
    "ca/*.csr.pem",
    "ca/*.key.pem.moved",
    "portal-ca.pem",
    "broker-ca.pem",
}
DEVICE_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A portal in a folder that looks like the project's."""
    with deployed(PORTAL_VENV=sys.prefix) as running:
        (running.folder / "portal").symlink_to(ROOT / "portal")
        running.wait_ready()
        yield running


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def session() -> list[tuple[str, str]]:
    """The commands with what the README shows beneath them; that of scripts/run has a test of its own."""
    text = "".join(block for block in blocks("console") if not block.startswith("$ scripts/run"))
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
    return [(command, shown.strip("\n")) for command, shown in zip(parts[::2], parts[1::2], strict=True)]


def test_the_session_prints_what_the_readme_shows(deployment: Deployment) -> None:
    commands = session()
    assert len(commands) >= 10
    ids: dict[str, str] = {}
    with ShellSession(deployment.folder, deployment.environment) as shell:
        for command, shown in commands:
            actual_command = DEVICE_ID.sub(lambda match: ids[match[0]], command)
            printed = shell.run(actual_command).replace(str(deployment.folder), HOME)
            assert masked(printed) == masked(shown), command
            for theirs, ours in zip(DEVICE_ID.findall(shown), DEVICE_ID.findall(printed), strict=True):
                assert ids.setdefault(theirs, ours) == ours
    assert len(ids) == 1


def test_the_program_of_the_readme_runs(deployment: Deployment) -> None:
    [program] = blocks("bash")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", program],
        cwd=deployment.folder,
        env=deployment.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    decoder = json.JSONDecoder()
    device, end = decoder.raw_decode(done.stdout)
    revoked = json.loads(done.stdout[end:])
    assert (device["name"], device["status"]) == ("pump-2", "active")
    assert device["broker"] in ("pending", "enforced")  # a registration waits for the journal, and for no proof of it
    assert (revoked["device_id"], revoked["broker"]) == (device["device_id"], "enforced")
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", "data/ca.pem", "pump-2.pem"]
    subprocess.run(verify, cwd=deployment.folder, check=True, capture_output=True)


def test_the_program_of_the_readme_shows_why_it_is_refused_and_goes_no_further(deployment: Deployment) -> None:
    [program] = blocks("bash")
    refused = program.replace("source data/operator.env\n", "source data/operator.env\nPORTAL_TOKEN=wrong\n")
    assert refused != program
    done = subprocess.run(
        ["bash", "-c", refused],  # as in a terminal, which goes on after an error
        cwd=deployment.folder,
        env=deployment.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert json.loads(done.stdout)["code"] == "unauthenticated"  # that of the first call alone
    assert re.findall(r"^curl: .*", done.stderr, re.MULTILINE) == ["curl: (22) The requested URL returned error: 401"]


def modes_of_the_guide() -> list[tuple[str, int]]:
    guide = (ROOT / "docs" / "operating.md").read_text()
    rows = re.findall(r"^\| `([\w./*-]+)` \| (\d{4}) \|", guide, re.MULTILINE)
    return [(path, int(mode, 8)) for path, mode in rows]


def test_the_data_folder_is_as_the_guide_says(deployment: Deployment) -> None:
    rows = modes_of_the_guide()
    assert len(rows) >= 10
    for pattern, mode in rows:

        def found(pattern: str = pattern.rstrip("/")) -> list[Path]:
            return list(deployment.data.glob(pattern))

        if pattern not in OF_SOME:
            wait_until(found)  # a job writes some, soon after the start
        for path in found():
            assert stat.S_IMODE(path.stat().st_mode) == mode, path
    named = {Path(pattern).parts[0] for pattern, _ in rows}
    there = {path.name for path in deployment.data.iterdir()}
    # The lock files and the database's own companions say nothing to an operator.
    assert {name for name in there if not name.startswith((".", "portal.db-"))} - named == {"broker-mosquitto.conf"}
