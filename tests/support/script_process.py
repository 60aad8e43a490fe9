"""The project's scripts as processes on folders and ports of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import requests

from tests.support.deployment import SECONDS, wait_until
from tests.support.mosquitto import short_folder
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
SBIN_LINE = "PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin"


def script_environment(**settings: str) -> dict[str, str]:
    """The caller's environment without settings of a portal, with the Python environment that runs the tests."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PORTAL_")}
    return plain | {"PORTAL_VENV": sys.prefix} | settings


def processes_with(text: str) -> list[int]:
    """Ids of the processes that have ``text`` in their environment, such as a folder of which only they know."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                environment = (process / "environ").read_bytes()
            except OSError:  # of another user, or gone
                continue
            if text.encode() in environment:
                found.append(int(process.name))
    return found


def machine_without(folder: Path, *programs_begin: str) -> tuple[Path, str]:
    """A copy of the project whose scripts find no program that begins so; with the PATH for it."""
    programs, root = folder / "bin", folder / "portal"
    programs.mkdir()
    for program in (*Path("/usr/bin").iterdir(), *Path("/usr/sbin").iterdir()):
        if not program.name.startswith(programs_begin) and not (programs / program.name).exists():
            (programs / program.name).symlink_to(program)
    root.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("scripts", "data", ".git", "__pycache__"):
            (root / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "scripts", root / "scripts")
    library = root / "scripts" / "lib.sh"
    text = library.read_text()
    assert SBIN_LINE in text
    library.write_text(text.replace(SBIN_LINE, "PATH=$PATH"))
    return root, str(programs)


class Run:
    """A ``scripts/run`` on a data folder, stopped at the end of the ``with``."""

    def __init__(self, data: Path, settings: dict[str, str] | None = None, *, root: Path = ROOT) -> None:
        self.data = data
        self.root = root
        self.ports = {"PORTAL_BIND": free_port(), "PORTAL_PKI_BIND": free_port(), "PORTAL_MQTT_PORT": free_port()}
        self.environment = script_environment(
            **{"PORTAL_DATA_DIR": str(data)}
            | {name: f"127.0.0.1:{port}" if "BIND" in name else str(port) for name, port in self.ports.items()}
            | (settings or {})
        )
        self.log = data.parent / f"{data.name}-run-{free_port()}.log"

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [self.root / "scripts" / "run"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(SECONDS)

    @property
    def addresses(self) -> dict[str, str]:
        """Its settings of ports, for another one on the same."""
        return {name: self.environment[name] for name in self.ports}

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def wait_ready(self) -> Self:
        """Wait until it has said that all is ready."""
        wait_until(lambda: "Ctrl-C stops everything." in self.printed or self.process.poll() is not None)
        assert self.process.poll() is None, self.printed
        return self

    def wait_in_force(self) -> None:
        """Wait until the portal has seen the broker obey."""
        wait_until(self._is_in_force)

    def _is_in_force(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            url = f"https://{self.environment['PORTAL_BIND']}/readyz"
            return requests.get(url, verify=str(self.data / "ca.pem"), timeout=SECONDS).status_code == 200
        return False

    def wait_end(self) -> int:
        """Wait until it ends by itself."""
        return self.process.wait(SECONDS)

    def press_ctrl_c(self) -> int:
        """Interrupt it as a terminal does, with everything in its foreground."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(SECONDS)

    def terminate(self) -> int:
        """Stop it as a system does."""
        self.process.terminate()
        return self.process.wait(SECONDS)

    def bash(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a shell that has loaded operator.env, in the project's folder."""
        line = f". '{self.data}/operator.env' && {command}"
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.root,
            env=script_environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )


class ScriptFolder:
    """A temporary folder that the broker's user may pass through, removed at the end of the ``with``."""

    def __enter__(self) -> Path:
        self._folder = short_folder()
        return self._folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder)
