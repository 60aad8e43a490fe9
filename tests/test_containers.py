"""The container files: what can be seen of them without a container engine, and the broker's script at work."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from config import Settings
from core.broker_control import PLUGINS
from tests.support.deployment import wait_until
from tests.support.programs import ROOT

FOLDER = ROOT / "deploy" / "container"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
OURS = ("portal", "broker")
IMAGES = (*OURS, "agent")


def stages() -> dict[str, list[str]]:
    """The instructions of each stage of the Containerfile."""
    text = re.sub(r" *\\\n *", " ", (FOLDER / "Containerfile").read_text())
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\w+)", line):
            found[match[2]] = [*found.get(match[1], [])]
        elif found and line and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


def values(stage: str, instruction: str) -> list[str]:
    return [line.partition(" ")[2] for line in stages()[stage] if line.startswith(f"{instruction} ")]


def environment() -> dict[str, str]:
    """The portal's environment in the composed installation, with nothing chosen."""
    of_image = dict(re.findall(r'(PORTAL_\w+)=("[^"]*"|\S+)', " ".join(values("portal", "ENV"))))
    chosen = COMPOSE["services"]["portal"]["environment"].items()
    composed = {name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in chosen}
    return {name: value.strip('"') for name, value in of_image.items()} | composed


def test_what_is_copied_is_there_and_nothing_is_fetched_by_address() -> None:
    copied = [line for stage in stages() for line in values(stage, "COPY") if not line.startswith("--from")]
    assert len(copied) >= 5
    for line in copied:
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    assert not [line for stage in stages() for line in values(stage, "ADD")]


@pytest.mark.parametrize("stage", IMAGES)
def test_an_image_runs_as_a_user_without_rights_and_says_whether_it_lives(stage: str) -> None:
    # One with a group would lose the other groups that it is in.
    assert re.fullmatch(r"1\d{4}", " ".join(values(stage, "USER")))
    assert len(values(stage, "HEALTHCHECK")) == 1
    program = re.search(r"^(?:ENTRYPOINT|CMD) .*", "\n".join(stages()[stage]), re.MULTILINE)
    assert program is not None
    assert "[" in program[0]  # without a shell, so that signals arrive


def test_the_broker_has_the_guard_and_openssls_settings_where_they_are_looked_for() -> None:
    copied = dict(re.findall(r"(\S+) (/\S+)$", line)[0] for line in values("broker", "COPY"))
    assert copied["/usr/local/lib/portal_guard.so"] == str(PLUGINS[0])
    assert f"OPENSSL_CONF={copied['mosquitto/openssl.cnf']}" in values("broker", "ENV")
    assert copied["mosquitto/portal.conf"] in values("broker", "CMD")[0]


# Fails where a package of the environment is imported that is not among those given.
ONLY = """
import importlib.metadata, re, sys
allowed = {*sys.argv[1].split(), "annotated-types", "cffi", "pycparser", "python-dotenv", "typing-extensions",
           "typing-inspection", "pydantic-core"}
tops = importlib.metadata.packages_distributions()
class Refuser:
    def find_spec(self, name, path=None, target=None):
        of = {re.sub("[_.]", "-", one.lower()) for one in tops.get(name.partition(".")[0], ())}
        if of and not of & allowed:
            raise ImportError(f"{name} is of {of}")
sys.meta_path.insert(0, Refuser())
import operations.agent.commands, operations.agent.agent, operations.agent.joining
"""


def packages_of_agent() -> list[str]:
    [installed] = [line for line in values("agentbuild", "RUN") if "onboarding-agent" in line]
    return installed.partition("-c /tmp/constraints.txt ")[2].partition(" && ")[0].split()


def test_the_packages_of_the_agent_are_of_the_versions_of_the_portal_by_constraints_that_pip_takes() -> None:
    [installed] = [line for line in values("agentbuild", "RUN") if "onboarding-agent" in line]
    [makes] = [part for part in installed.split(" && ") if "/tmp/constraints.txt" in part and "sed" in part]
    command = makes.partition(" >")[0].replace("/src/", f"{ROOT}/")
    made = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20, check=True).stdout
    constraints = [Requirement(line) for line in made.splitlines() if line and not line.startswith(("#", "-"))]
    assert not [each for each in constraints if each.extras]
    assert {*packages_of_agent()} <= {each.name for each in constraints if str(each.specifier).startswith("==")}


@pytest.mark.parametrize("lacks", ["", "urllib3"])
def test_the_image_of_the_agent_has_the_packages_that_it_imports_and_no_others(lacks: str) -> None:
    packages = packages_of_agent()
    assert not {"flask", "sqlalchemy", "gunicorn", "psycopg"} & {*packages}
    command = [sys.executable, "-c", ONLY, " ".join(name for name in packages if name != lacks)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) is not bool(lacks), done.stderr


def test_the_agent_writes_where_the_broker_reads() -> None:
    environment = dict(re.findall(r'(PORTAL_\w+)=("[^"]*"|\S+)', " ".join(values("agent", "ENV"))))
    given = {name: value.strip('"') for name, value in environment.items()} | {"PORTAL_BROKER_GROUP": ""}
    settings = Settings.from_env(given)
    assert str(settings.broker_dir) in values("broker", "VOLUME")
    assert settings.broker_restart == f"touch {settings.broker_dir}/restart"


@pytest.mark.parametrize("name", list(COMPOSE["services"]))
def test_each_service_is_confined_and_watched(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert name in OURS or service["healthcheck"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_portal_and_broker_share_one_folder_which_is_the_portals_setting() -> None:
    settings = Settings.from_env(environment())
    volumes = [
        {volume.partition(":")[2] for volume in COMPOSE["services"][name]["volumes"] if volume.startswith("broker:")}
        for name in OURS
    ]
    assert volumes == [{str(settings.broker_dir)}] * 2
    assert str(settings.broker_dir) in values("broker", "VOLUME")
    assert settings.broker_restart == f"touch {settings.broker_dir}/restart"
    assert settings.database_url.startswith("sqlite:")
    assert COMPOSE["services"]["broker"]["depends_on"]["portal"]["condition"] == "service_healthy"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The script with a program in the broker's place, which writes a line at each start and end."""
    fake = tmp_path / "mosquitto"
    fake.write_text(
        "#!/bin/sh\ntrap 'echo ended >>log; exit 0' TERM\necho began >>log\nwhile true; do sleep 0.1; done\n"
    )
    fake.chmod(0o755)
    process = subprocess.Popen(
        [FOLDER / "run-broker", fake], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PORTAL_BROKER_DIR": str(tmp_path)}
    )
    yield process, tmp_path
    process.kill()
    process.wait()


def lines(folder: Path) -> list[str]:
    return (folder / "log").read_text().split() if (folder / "log").exists() else []


def test_the_broker_is_restarted_when_the_portal_asks_and_ends_with_its_container(
    broker: tuple[subprocess.Popen[bytes], Path],
) -> None:
    process, folder = broker
    wait_until(lambda: lines(folder) == ["began"])
    (folder / "restart").touch()
    wait_until(lambda: lines(folder) == ["began", "ended", "began"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert lines(folder) == ["began", "ended", "began", "ended"]


def test_a_broker_that_ends_by_itself_ends_its_container_with_its_status(tmp_path: Path) -> None:
    command = [str(FOLDER / "run-broker"), "sh", "-c", "exit 3"]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PORTAL_BROKER_DIR": str(tmp_path)}, timeout=20, check=False
    )
    assert done.returncode == 3
