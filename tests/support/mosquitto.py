"""A real Mosquitto for tests, started from the configuration that an operator installs."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from broker.session import Session, connect_unix
from core.files import FileLock, replace_file

CONFIGURATION = Path(__file__).parents[2] / "mosquitto" / "portal.conf"
BESIDE = CONFIGURATION.with_name("beside.conf")  # the part of a broker that has other users
OPENSSL_CONFIGURATION = CONFIGURATION.with_name("openssl.cnf")
GUARD = CONFIGURATION.with_name("guard")
INSTALLED_PLUGIN = "/usr/local/lib/onboarding-portal/portal_guard.so"
INSTALLED_FOLDER, INSTALLED_PORT = "/var/lib/onboarding-portal/broker", "8883"
START_SECONDS = 30.0


def mosquitto_program() -> str:
    """Debian installs it where an ordinary user's PATH does not look."""
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin") or "mosquitto"


def short_folder(*, in_memory: bool = False) -> Path:
    """Make a temporary folder that the broker's user may pass through, with a path short enough for a unix socket.

    With ``in_memory`` it is in Linux's memory file system if there is one, where syncing to the disk takes no time.
    """
    parent = "/dev/shm" if in_memory and os.access("/dev/shm", os.W_OK | os.X_OK) else "/tmp"
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="mq-"))
    folder.chmod(0o711)
    return folder


@functools.cache
def guard_library() -> Path:
    """The guard's plugin, built once for these sources: a copy for this process, which the broker's user may read."""
    folder = short_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sources = [GUARD / "Makefile", *sorted(GUARD.glob("*.[ch]")), *sorted(Path("/usr/include").glob("mosquitto*.h"))]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    built = Path(sys.prefix) / f"guard-{digest[:16]}.so"  # as scripts/run has it
    with FileLock(built.with_name("guard.lock")).hold(120):
        if not built.exists():
            make = ["make", "-s", "-C", str(GUARD), f"BUILD={folder}"]
            subprocess.run(make, check=True, capture_output=True, timeout=120)
            replace_file(built, (folder / "portal_guard.so").read_bytes(), mode=0o644)
    return Path(shutil.copy(built, folder / "portal_guard.so"))


def without_guard(configuration: str) -> str:
    """The configuration for the control by files, as mosquitto/README.md says."""
    lines = configuration.replace("\ntls_version tlsv1.2\n", "\ntls_version tlsv1.3\n").splitlines(keepends=True)
    return "".join(line.removeprefix("#files ") for line in lines if not line.startswith("plugin"))


class StartFailed(Exception):
    """The broker ended before it answered; the text is its log."""


class Mosquitto:
    """A broker on the files in ``folder``, which the portal (or the test) has written there before."""

    def __init__(self, folder: Path, port: int, *, guard: bool = False, oldest_tls: str = "") -> None:
        self.guard = guard
        self.fake: Mapping[str, str] = {}  # variables by which it goes by another clock
        self.oldest_tls = oldest_tls  # the oldest version, if it is not the usual one
        self.folder = folder
        self.port = port
        self.socket = folder / "portal.sock"
        self.configuration = folder.parent / f"{folder.name}-mosquitto.conf"
        self._stderr: int | None = None  # a file in memory
        self._last_log = ""  # of a process that was stopped
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What it has logged since its start.

        It writes into a file, and each line before it answers the client that the line is about: so a test that has
        seen the answer reads the line.
        """
        if self._stderr is None:
            return self._last_log
        return os.pread(self._stderr, os.fstat(self._stderr).st_size, 0).decode(errors="replace")

    def start(self) -> Self:
        """Start it; returns once it answers CONNACK on the internal listener, raises ``StartFailed`` if it ends."""
        self.launch()
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if not self.running or time.monotonic() > deadline:
                self.stop()
                raise StartFailed(self.log)
            time.sleep(0.005)
        return self

    def launch(self) -> None:
        """Start the process without waiting for anything."""
        self.configuration.write_text(self.configuration_text())
        self.configuration.chmod(0o644)
        self._close_log()
        self._stderr = os.memfd_create("mosquitto.log")
        self._process = subprocess.Popen(
            self.command(),
            env={**os.environ, **self.variables, **self.fake},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )

    @property
    def variables(self) -> dict[str, str]:
        """What its environment has besides."""
        return {"OPENSSL_CONF": str(OPENSSL_CONFIGURATION)}

    def command(self) -> list[str]:
        """What is run."""
        return [mosquitto_program(), "-c", str(self.configuration)]

    def configuration_text(self) -> str:
        """The configuration that an operator installs, for this folder and port."""
        text = CONFIGURATION.read_text()
        assert INSTALLED_FOLDER in text
        text = text if self.guard else without_guard(text)
        if self.oldest_tls:
            text = re.sub("\ntls_version .*", f"\ntls_version tlsv{self.oldest_tls}", text)
        return self.filled_in(text)

    def filled_in(self, text: str) -> str:
        """A configuration with this folder and port."""
        text = text.replace(INSTALLED_PLUGIN, str(guard_library()))
        return text.replace(INSTALLED_FOLDER, str(self.folder)).replace(INSTALLED_PORT, str(self.port))

    def stop(self) -> None:
        """End it by SIGTERM; an abort at its exit is the early sign of damaged memory, which no reload causes here."""
        if self._process is None:
            return
        aborted = False
        if self._process.poll() is None:
            self._process.terminate()
            try:
                aborted = self._process.wait(10) not in (0, -signal.SIGKILL)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._close_log()
        assert not (aborted and self.guard), self.log

    def restart(self) -> None:
        """Stop it as a service's manager does, and start it again."""
        self.stop()
        assert self._process is not None
        assert self._process.returncode == 0, self.log
        self.start()

    def hang_up(self) -> None:
        """SIGHUP, as logrotate would send it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def wait_for_log(self, text: str, *, times: int = 1, seconds: float = START_SECONDS) -> None:
        """Wait for what it logs of its own accord, with no client that would be answered."""
        self._wait_for(lambda log: log.count(text) >= times, repr(text), seconds)

    def _wait_for(self, condition: Callable[[str], bool], what: str, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition(self.log):
            assert time.monotonic() < deadline, f"{what} is not in the broker's log:\n{self.log}"
            time.sleep(0.005)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            deadline = time.monotonic() + 1
            with Session(connect_unix(self.socket, deadline), deadline) as session:
                session.connect("ready")  # refused for want of a password, which is an answer
                return True
        return False

    def _close_log(self) -> None:
        if self._stderr is not None:
            self._last_log = self.log
            os.close(self._stderr)
            self._stderr = None
