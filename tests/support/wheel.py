"""Builds the project's wheel, and installs it into virtual environments that hold only what it says it needs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

from tests.support.programs import ROOT

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")


def build(folder: Path) -> Path:
    """Build the wheel without the network: its build backend is one of the packages for development."""
    command = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    [wheel] = folder.glob("*.whl")
    return wheel


def needed_by(requirements: list[str]) -> set[str]:
    """The names of the installed packages that these requirements need, directly or not."""
    found: set[str] = set()
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        requirement = waiting.pop()
        extras = {"", *requirement.extras}
        name = importlib.metadata.distribution(requirement.name).name
        if name in found and not requirement.extras:
            continue
        found.add(name)
        for each in importlib.metadata.requires(name) or []:
            inner = Requirement(each)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)
    return found


def _link(names: Iterable[str], packages: Path) -> None:
    """Link packages of this environment into the folder of another one."""
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())


def _packages_of(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))


def install_beside(wheel: Path, folder: Path, requirements: list[str]) -> Path:
    """Install the wheel alone into a new virtual environment that has these packages, and what they need, by links.

    Return its folder of programs.
    """
    venv.create(folder, symlinks=True)
    _link(needed_by(requirements), _packages_of(folder))
    command = [*PIP, "--python", str(folder / "bin" / "python"), "install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "bin"


def install(wheel: Path, folder: Path, *, extra: str = "") -> Path:
    """Install the wheel into a new virtual environment and return its folder of programs.

    What it depends on comes from the environment of this process, by links; pip then finds it, or the wheel does not
    name all that it needs.
    """
    venv.create(folder, symlinks=True)
    packages = _packages_of(folder)
    [metadata] = importlib.metadata.distributions(path=[str(wheel)])
    wanted = [
        each for each in metadata.requires or [] if (marker := Requirement(each).marker) is None or
        (extra and marker.evaluate({"extra": extra}))
    ]  # fmt: skip
    _link(needed_by(wanted), packages)
    target = f"device-onboarding-portal[{extra}] @ {wheel.as_uri()}" if extra else str(wheel)
    command = [*PIP, "--python", str(folder / "bin" / "python"), "install", "--no-index", target]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "bin"
