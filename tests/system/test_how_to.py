"""The pages of docs/how-to: their commands are run, in the order of their list and in one folder, by one reader."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import ROOT, SECONDS, Deployment, deployed

pytestmark = pytest.mark.system

PAGES = {path.stem: path.read_text() for path in (ROOT / "docs" / "how-to").glob("*.md")}
LISTED = re.findall(r"^- \[.+?\]\((.+?)\.md\)", PAGES["README"], re.MULTILINE)
STOPPED = "# The portal is stopped.\n"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in LISTED if blocks(page, "bash")])
def test_portal_is_called_where_a_page_begins_so_that_it_can_be_one_of_the_sources(page: str) -> None:
    for block in blocks(page, "bash"):
        depth = 0
        for line in block.splitlines():
            if line.startswith("cd "):
                depth += -1 if line == "cd .." else 1
            assert depth == 0 or not re.search(r"(^|[|(;&] *)portal", line), line


def test_git_does_not_offer_the_private_keys_that_a_reader_makes_in_the_folder_of_the_sources(tmp_path: Path) -> None:
    text = "\n".join([*PAGES.values(), (ROOT / "README.md").read_text()])
    made = re.findall(r"(?:--out|--password-out|-keyout) ([\w.-]+)|> (\w+\.token)\b", text)
    names = sorted({name or token for name, token in made} - {"device.key"})  # which is made in one of these folders
    assert {"pump-1", "sensor-2.key", "sensor-3.txt", "fleet", "admin.token"} <= {*names}
    for name in names:
        if "." not in name:
            (tmp_path / name).mkdir()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    asked = ["git", "check-ignore", "--stdin"]
    done = subprocess.run(
        asked, cwd=tmp_path, input="\n".join(names), capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.stdout.split() == names


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with deployed(PORTAL_VENV=sys.prefix) as running:
        running.wait_ready()
        programs = running.folder / "bin"
        programs.mkdir()
        for name in ("portal", "portal-server"):
            (programs / name).symlink_to(ROOT / name)
        running.environment["PATH"] = f"{programs}:{running.environment['PATH']}"
        yield running


def run(deployment: Deployment, folder_name: str, script: str) -> str:
    """What the script prints, run in a folder."""
    folder = deployment.folder / folder_name
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=deployment.environment | deployment.operator,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [page for page in LISTED if blocks(page, "bash")])
def test_the_commands_of_a_page_do_what_it_says(deployment: Deployment, page: str) -> None:
    served = [block for block in blocks(page, "bash") if not block.startswith(STOPPED)]
    printed = run(deployment, "reader", "\n".join(served))
    if page == "a-device-is-stolen":
        assert re.search(r"^broker\s+enforced$", printed, re.MULTILINE)
    if stopped := [block for block in blocks(page, "bash") if block.startswith(STOPPED)]:
        deployment.stop_portal()
        assert "Restored" in run(deployment, "reader", "\n".join(stopped))
        deployment.start_portal()


@pytest.fixture(scope="module")
def pump(deployment: Deployment) -> str:
    """The first block of the page about code, which registers a device, run in a folder of the tests of programs."""
    prepared = blocks("code-for-devices", "bash")[0].replace("pump-3", "pump-33")
    run(deployment, "programs", prepared)
    return "pump-33"


def test_the_python_program_for_devices_has_its_message_acknowledged(deployment: Deployment, pump: str) -> None:
    program = f"cd {pump}; portal show {pump} --snippet python > device.py; {sys.executable} device.py"
    assert "acknowledged: True" in run(deployment, "programs", program)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_the_program_for_node_has_its_message_acknowledged(deployment: Deployment, pump: str) -> None:
    program = f"cd {pump}; portal show {pump} --snippet node > device.js; npm install mqtt@5 >&2; node device.js"
    assert run(deployment, "programs", program) == "acknowledged\n"


def test_every_page_is_in_the_list_of_the_guides() -> None:
    assert sorted(LISTED) == sorted(set(PAGES) - {"README"})


def test_each_page_begins_with_its_task_and_is_no_wall_of_text() -> None:
    for name, text in PAGES.items():
        assert text.startswith("# "), name
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        paragraphs = [each for each in re.split(r"\n\n+", prose) if not each.startswith(("|", "    ", "- "))]
        assert max(map(len, paragraphs)) < 900, name
