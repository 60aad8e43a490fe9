"""One person at the command line, in a folder and an environment of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import cli
from tests.support.portal_stub import TOKEN, PortalStub

PROJECT = Path(__file__).parents[2]
CONNECTION = (
    *("PORTAL_URL", "PORTAL_CA", "PORTAL_TOKEN", "PORTAL_PROFILE", "PORTAL_BUNDLE_PASSWORD"),
    *("PORTAL_DEBUG", "NO_COLOR"),
)


@dataclass
class Session:
    """``run`` calls the command line in this process, ``spawn`` as a process of its own; neither has a terminal."""

    folder: Path
    environment: dict[str, str]

    def run(self, *args: str, stdin: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        result = CliRunner().invoke(cli, args, input=stdin, env={**self.environment, **(env or {})})
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    def json(self, *args: str, **kwargs: Any) -> Any:
        result = self.run(*args, "--json", **kwargs)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def command(self, *args: str) -> list[str]:
        return [sys.executable, str(PROJECT / "cli.py"), *args]

    def spawn(self, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args),
            input=stdin,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.full_environment(),
            timeout=30,
            check=False,
        )

    def full_environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in CONNECTION}
        return kept | self.environment


def session_for(stub: PortalStub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    for name in CONNECTION:
        monkeypatch.delenv(name, raising=False)
    work = folder / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    environment = {"PORTAL_URL": stub.url, "PORTAL_TOKEN": TOKEN, "XDG_CONFIG_HOME": str(folder / "config")}
    return Session(work, environment)
