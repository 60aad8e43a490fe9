"""``portal-server config``, and what each command of that program does with a file and an output that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from onboarding_portal import portal_server; portal_server()"]


def run(
    *args: str, stdout: int | None = subprocess.PIPE, program: list[str] = PROGRAM, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PORTAL_")}
    return subprocess.run(
        [*program, *args],
        env=kept | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "portal.toml"
    path.touch(mode=0o600)
    path.write_text(f'data_dir = "{tmp_path}/data"\nworkers = 3\nca_passphrase = "a passphrase to keep"\n')
    return path


def test_check_says_where_each_value_comes_from_and_shows_no_secret(file: Path) -> None:
    result = run("--config", str(file), "config", "check", PORTAL_THREADS="4")
    assert result.returncode == 0, result.stderr
    rows = [
        line.split(maxsplit=2) for line in result.stdout.splitlines() if line.startswith(("workers", "threads", "ca_"))
    ]
    assert rows == [
        ["workers", "3", f"line 2 of {file}"],
        ["threads", "4", "PORTAL_THREADS"],
        ["ca_passphrase", "********", f"line 3 of {file}"],
    ]
    assert "to keep" not in result.stdout + result.stderr
    assert not (file.parent / "data").exists()


def test_check_names_every_problem_and_fails(file: Path) -> None:
    file.write_text('workers = 0\nwrokers = 1\nca_passphrase = "short"\n')
    result = run("config", "check", "--json", PORTAL_CONFIG=str(file), PORTAL_TYPO="1")
    assert (result.returncode, result.stderr) == (1, "")
    answer = json.loads(result.stdout)
    assert [sentence.split()[0] for sentence in answer["problems"]] == [
        "PORTAL_TYPO",
        "wrokers",
        "workers",
        "ca_passphrase",
    ]
    assert "short" not in result.stdout
    other = run("--config", str(file), "doctor")
    assert other.returncode == 1
    assert f"There are 2 more problems; see all by: portal-server --config {file} config check" in other.stderr


def test_show_has_all_settings_as_they_count(file: Path) -> None:
    settings = {
        row["setting"]: row
        for row in json.loads(run("--config", str(file), "config", "show", "--json").stdout)["settings"]
    }
    assert settings["workers"] == {"setting": "workers", "value": "3", "source": f"line 2 of {file}"}
    assert settings["database_url"]["value"] == f"sqlite:///{file.parent}/data/portal.db"
    assert settings["link_hours"]["source"] == "default"


def test_the_commands_use_the_file_and_hand_it_on_in_operator_env(file: Path, tmp_path: Path) -> None:
    assert run("--config", str(file), "init").returncode == 0
    assert (tmp_path / "data" / "portal.db").exists()
    assert run("--config", str(file), "admin-token").returncode == 0
    assert f"export PORTAL_CONFIG={file}\n" in (tmp_path / "data" / "operator.env").read_text()
    # Flask's own program knows the variable.
    flask = run("settings", program=[sys.executable, "-m", "flask", "--app", "app"], PORTAL_CONFIG=str(file))
    assert f"PORTAL_DATA_DIR={tmp_path}/data\n" in flask.stdout


@pytest.mark.parametrize("program", [PROGRAM, [sys.executable, "-m", "flask", "--app", "app"]], ids=["own", "flask"])
def test_output_that_cannot_be_written_is_a_sentence(program: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = run("config", "show", stdout=full.fileno(), program=program)
    assert result.returncode == 1
    assert result.stderr == "Error: Standard output cannot be written to: no space left on device.\n"
    reader, writer = os.pipe()
    os.close(reader)
    result = run("config", "show", stdout=writer, program=program)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_help_text_that_cannot_be_written_is_a_sentence() -> None:
    with open("/dev/full", "w") as full:
        result = run("--help", stdout=full.fileno())
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
