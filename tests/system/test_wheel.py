"""The wheel in fresh virtual environments: what it adds to them, and that its two programs work from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from onboarding_portal import VERSION
from tests.support import wheel
from tests.support.deployment import wait_until
from tests.support.mosquitto import short_folder
from tests.support.ports import free_port
from tests.support.programs import ROOT

pytestmark = pytest.mark.system
SECONDS = 60.0


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def client(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with what `portal` needs."""
    return wheel.install(built, tmp_path_factory.mktemp("client") / "venv")


@pytest.fixture(scope="module")
def server(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with what `portal-server` needs."""
    return wheel.install(built, tmp_path_factory.mktemp("server") / "venv", extra="server")


def run(program: Path, *arguments: str, cwd: Path, status: int = 0, **environment: str) -> str:
    """What a program prints, away from the source tree and without its variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PORTAL_", "PYTHON"))}
    done = subprocess.run(
        [program, *arguments],
        cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_an_environment_gets_one_name_and_two_programs(client: Path) -> None:
    [packages] = client.parent.glob("lib/python*/site-packages")
    ours = {path.name for path in packages.iterdir() if not path.is_symlink()}
    assert ours == {"onboarding_portal", f"device_onboarding_portal-{VERSION}.dist-info"}
    assert {path.name for path in client.glob("portal*")} == {"portal", "portal-server"}
    for place in ("man/man1/portal-register.1", "man/man1/portal-server-doctor.1", "zsh/site-functions/_portal"):
        assert (client.parent / "share" / place).is_file()
    assert (client.parent / "share/fish/vendor_completions.d/portal.fish").is_file()
    assert (client.parent / "share/bash-completion/completions/portal-server").is_file()


def test_the_client_alone_brings_nothing_of_the_server(client: Path, tmp_path: Path) -> None:
    [packages] = client.parent.glob("lib/python*/site-packages")
    assert not {"flask", "sqlalchemy", "pydantic", "gunicorn", "alembic"} & {each.name for each in packages.iterdir()}
    assert run(client / "portal", "--version", cwd=tmp_path) == f"portal, version {VERSION}\n"
    said = run(client / "portal-server", "--help", cwd=tmp_path, status=1)
    assert "pip install 'device-onboarding-portal[server]'" in said
    assert "Traceback" not in said


def test_the_wheel_carries_what_is_no_module(server: Path, tmp_path: Path) -> None:
    run(server / "portal-server", "files", "kept/here", cwd=tmp_path)
    for folder in ("mosquitto", "rabbitmq", "deploy", "device"):
        listed = ["git", "ls-files", folder, ":!mosquitto/guard/tests"]
        tracked = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        for path in tracked:
            assert (tmp_path / "kept/here" / path).read_bytes() == (ROOT / path).read_bytes()
    assert "cannot be written" in run(server / "portal-server", "files", "kept/here", cwd=tmp_path, status=1)


@pytest.fixture(scope="module")
def served(server: Path) -> Iterator[Path]:
    """A folder with the data of a portal that the installed program serves."""
    folder = short_folder()
    settings = {
        "PORTAL_BIND": f"127.0.0.1:{free_port()}",
        "PORTAL_PKI_BIND": f"127.0.0.1:{free_port()}",
        "PORTAL_BROKER_CONTROL": "files",
        "PATH": os.environ["PATH"],
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server / "portal-server", "run"], cwd=folder, env=settings, stderr=log)
        try:
            wait_until(lambda: (folder / "data" / "operator.env").exists() or process.poll() is not None)
            assert process.poll() is None, (folder / "log").read_text()
            yield folder
        finally:
            process.terminate()
            process.wait(SECONDS)


def log_in_register_and_list_by_name(program: Path, served: Path, home: Path) -> None:
    given = dict(re.findall(r"^export (\w+)=(.*)$", (served / "data" / "operator.env").read_text(), re.MULTILINE))
    (home / "token").write_text(given["PORTAL_TOKEN"])
    (home / "token").chmod(0o600)

    def portal(*arguments: str) -> str:
        return run(program, *arguments, cwd=home, HOME=str(home))

    portal("login", "--url", given["PORTAL_URL"], "--ca-file", given["PORTAL_CA"], "--token-file", "token")
    portal("register", "pump-1", "--type", "pump", "--location", "hall 2", "--firmware", "1.0", "--out", "pump-1")
    assert (home / "pump-1" / "device.key").is_file()
    devices = json.loads(portal("list", "--q", "pump-1", "--json"))["devices"]
    assert {(device["name"], device["status"]) for device in devices} == {("pump-1", "active")}


def test_login_register_and_list_by_name_from_nothing_but_the_wheel(served: Path, client: Path, tmp_path: Path) -> None:
    log_in_register_and_list_by_name(client / "portal", served, tmp_path)


@pytest.mark.long
def test_pipx_installs_it_for_somebody_who_has_python_alone(served: Path, tmp_path: Path) -> None:
    """As README says, from a clone, with an empty home; what it needs comes from the package index."""
    sources, home, programs = tmp_path / "clone", tmp_path / "home", tmp_path / "pipx" / "bin"
    home.mkdir()
    subprocess.run(["git", "clone", "-q", ROOT, sources], check=True, timeout=SECONDS)
    venv.create(tmp_path / "pipx", with_pip=True)
    subprocess.run([programs / "pip", "install", "-q", "pipx"], check=True, timeout=5 * SECONDS)
    places = {"HOME": str(home), "PIPX_HOME": str(home / "pipx"), "PIPX_BIN_DIR": str(home / "bin")}
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name == "PATH"}
    subprocess.run([programs / "pipx", "install", "-q", "."], cwd=sources, env=kept | places, check=True, timeout=300)
    assert {path.name for path in (home / "bin").iterdir()} == {"portal", "portal-server"}
    log_in_register_and_list_by_name(home / "bin" / "portal", served, home)


def test_the_server_is_looked_after_without_a_token(served: Path, server: Path) -> None:
    def portal_server(*arguments: str, status: int = 0) -> str:
        return run(server / "portal-server", *arguments, cwd=served, status=status)

    secret = portal_server("token", "create", "second", "--role", "admin", "--days", "2").strip()
    [row] = [line for line in portal_server("token", "list").splitlines() if line.endswith("  second")]
    assert row.split()[1] == "admin"
    assert "Revoked" in portal_server("token", "revoke", row.split()[0])
    listed = portal_server("token", "list")
    assert "revoked" in next(line for line in listed.splitlines() if line.endswith("  second"))
    assert secret not in listed
    said = portal_server("ca", "retire", "nobody", status=1)
    assert "list them with: portal-server ca list" in said


def test_the_script_of_the_sources_is_the_same_program(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    said = run(
        ROOT / "portal-server",
        "ca",
        "retire",
        "nobody",
        cwd=ROOT,
        status=1,
        PORTAL_VENV=sys.prefix,
        PORTAL_DATA_DIR=data,
    )
    assert "Error: " in said
    version = run(ROOT / "portal-server", "--version", cwd=ROOT, PORTAL_VENV=sys.prefix)
    assert version == f"portal-server, version {VERSION}\n"


def test_what_is_pinned_is_what_the_wheel_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(each) for each in (*project["dependencies"], *project["optional-dependencies"]["server"])]
    pinned = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert {each.name for each in asked} == {each.name for each in pinned}
    for each in pinned:
        [wanted] = [one for one in asked if one.name == each.name]
        [version] = [specifier.version for specifier in each.specifier]
        assert wanted.specifier.contains(version), each
        assert wanted.extras == each.extras
