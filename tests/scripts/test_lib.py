"""Which Python the scripts make the virtual environment with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEW = '#!/bin/sh\ncase "$2" in *venv*) exit {lacks_venv} ;; *) exit {too_old} ;; esac\n'


def python(folder: Path, name: str, *, lacks_venv: bool = False, too_old: bool = False) -> Path:
    """A program that answers as a Python of that kind would."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(NEW.format(lacks_venv=int(lacks_venv or too_old), too_old=int(too_old)))
    program.chmod(0o755)
    return program


def found(distribution: Path, path: Path, *modules: str) -> str:
    script = f'. {ROOT}/scripts/lib.sh; DISTRIBUTION_PYTHON={distribution}; PATH={path}; find_python "$@"'
    done = subprocess.run(
        ["/bin/bash", "-c", script, "bash", *modules], capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip()


def test_the_python_of_the_distribution_comes_before_another_one_on_the_path(tmp_path: Path) -> None:
    distribution, _ = python(tmp_path / "usr", "python3"), python(tmp_path / "own", "python3")
    assert found(distribution, tmp_path / "own", "ensurepip", "venv") == str(distribution)


@pytest.mark.parametrize("fault", ["lacks_venv", "too_old", "missing"])
def test_another_one_is_used_where_that_of_the_distribution_will_not_do(tmp_path: Path, fault: str) -> None:
    distribution = tmp_path / "usr" / "python3"
    if fault != "missing":
        python(tmp_path / "usr", "python3", **{fault: True})
    other = python(tmp_path / "own", "python3.12")
    assert found(distribution, tmp_path / "own", "ensurepip", "venv") == str(other)


def test_one_without_venv_is_found_if_venv_is_not_asked_for(tmp_path: Path) -> None:
    distribution = python(tmp_path / "usr", "python3", lacks_venv=True)
    assert found(distribution, tmp_path / "none", "ensurepip", "venv") == ""
    assert found(distribution, tmp_path / "none") == str(distribution)
