"""A PostgreSQL of a test's own, durable as an operator's is, that may be killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self


class Cluster:
    """A PostgreSQL server in a temporary folder, reached by a unix socket only."""

    def __init__(self, *settings: str, parent: Path = Path("/tmp")) -> None:
        """``settings`` are the server's own, such as ``synchronous_commit=off``; its folder is made in ``parent``."""
        self.settings = settings
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self.programs = programs[-1] if programs else Path(shutil.which("initdb") or "").parent
        self.folder = Path(tempfile.mkdtemp(dir=parent, prefix="pg-"))
        self.url = f"postgresql://portal@/postgres?host={self.folder}"

    def __enter__(self) -> Self:
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
        self.folder.chmod(0o711)
        self.run("initdb", "-U", "portal", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    def run(self, program: str, *arguments: str, check: bool = True) -> None:
        """Run a program of PostgreSQL's, which refuses to run as root."""
        as_postgres = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        subprocess.run(
            [*as_postgres, str(self.programs / program), "-D", str(self.folder / "data"), *arguments],
            cwd=self.folder,
            check=check,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )

    def start(self) -> None:
        settings = " ".join(f"-c {setting}" for setting in ("listen_addresses=''", *self.settings))
        options = f"-k {self.folder} {settings}"
        self.run("pg_ctl", "start", "-w", "-s", "-l", str(self.folder / "log"), "-o", options)

    def processes(self) -> list[int]:
        """The server's processes."""
        head = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        return [head, *map(int, Path(f"/proc/{head}/task/{head}/children").read_text().split())]

    def become_standby(self) -> None:
        """Start it again as a standby, as a failover leaves the server that was the first: it can only be read."""
        self.run("pg_ctl", "stop", "-s", "-m", "fast")
        (self.folder / "data" / "standby.signal").touch()
        self.start()

    def promote(self) -> None:
        """Make the standby the first again."""
        self.run("pg_ctl", "promote", "-w", "-s")

    def kill_at_once(self) -> None:
        """SIGKILL to the server's first process, and start it again once its others have ended by themselves."""
        os.kill(self.processes()[0], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.start()
            except subprocess.CalledProcessError:  # what they share is still in use
                if time.monotonic() > deadline:
                    raise

    def kill(self) -> None:
        """Stop it as a crash does: what was not durable is gone."""
        self.run("pg_ctl", "stop", "-s", "-m", "immediate", check=False)
