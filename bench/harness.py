"""Starts a portal with its broker for a benchmark, sets processes racing, sums up what they measured."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "bench" / "client.py"
START_SECONDS = 120.0  # on a busy machine, with a thousand tenants
STOP_SECONDS = 20.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def stopped_in_order() -> Iterator[None]:
    """Let SIGTERM end the benchmark as Ctrl-C does, so that what it started is stopped and its folder removed."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("Interrupted; everything is stopped.")


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder that the broker's user may pass through, with a path short enough for a unix socket; removed after."""
    try:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix="pb-"))
    except OSError as error:
        sys.exit(f"No folder can be made in {parent} ({error.strerror}); choose another one with --folder.")
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync_milliseconds(folder: Path, times: int = 100) -> float:
    """Median time of making 4 KiB durable on the disk of ``folder``: what every registration waits for."""
    taken = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(times):
            os.write(file.fileno(), bytes(4096))
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)


@contextlib.contextmanager
def slower_syncs(folder: Path, milliseconds: float) -> Iterator[None]:
    """Have programs that are started in the body of the ``with`` take so much longer for each sync.

    What is measured then is what they would do on a disk whose sync takes so long, with the processors of this machine.
    """
    if not milliseconds:
        yield
        return
    library, source = folder / "slower_sync.so", ROOT / "bench" / "slower_sync.c"
    if not (compiler := shutil.which("cc")):
        sys.exit("A C compiler is needed for slower syncs; install gcc.")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    variables = {"LD_PRELOAD": str(library), "SLOWER_SYNC_MS": str(milliseconds)}
    os.environ |= variables
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


# --- The portal ---------------------------------------------------------------------------------------------------


class RunningPortal:
    """A portal as an operator runs it, on a data folder in ``folder`` and free ports, with Mosquitto beside it.

    As a context manager it starts both and stops them, whatever happens. ``environment`` holds further settings; one
    without a value is left at its default. ``fill`` is called with the data folder before anything serves.
    ``start_seconds`` is what the start took.
    ``root`` is the checkout whose portal it is.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        fill: Callable[[Path], None] | None = None,
        root: Path = ROOT,
    ) -> None:
        self.start_seconds = 0.0
        self.root = root
        self._fill = fill
        self.data = folder / "data"
        self.mqtt_port = free_port()
        self.log = folder / "portal.log"
        pki_bind = f"127.0.0.1:{free_port()}"
        self.pki_url = f"http://{pki_bind}"
        self._settings = {
            "PORTAL_DATA_DIR": str(self.data),
            "PORTAL_MQTT_PORT": str(self.mqtt_port),
            "PORTAL_BIND": f"127.0.0.1:{free_port()}",
            "PORTAL_PKI_BIND": pki_bind,
            "PORTAL_THREADS": "32",  # a connection that was opened and has sent no request yet holds a thread
            "PORTAL_BROKER_CONTROL": "files" if "PORTAL_ACL_STYLE" in environment else "guard",
            **environment,
        }
        self._settings = {name: value for name, value in self._settings.items() if value}
        guard = self._settings["PORTAL_BROKER_CONTROL"] == "guard"
        self._broker = Mosquitto(self.data / "broker", self.mqtt_port, guard=guard)
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._run("init").wait()
            if self._fill is not None:
                self._fill(self.data)
                self._run("init").wait()  # writes the broker's files again
            if self._settings["PORTAL_BROKER_CONTROL"] != "none":
                self._broker.start()
            started = time.monotonic()
            self._server = self._run("serve")
            self._wait_until_ready(self._server)
            self.start_seconds = time.monotonic() - started
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def access(self) -> dict[str, str]:
        """Address, CA file and operator token, under the names that the CLI knows them by."""
        lines = (self.data / "operator.env").read_text().splitlines()
        words = (shlex.split(line.removeprefix("export ")) for line in lines)
        return dict(word[0].split("=", 1) for word in words)

    @property
    def environment(self) -> dict[str, str]:
        """What a command of the server's own must have in its environment to work on this portal."""
        kept_out = ("PORTAL_", "PYTHONDONTWRITEBYTECODE")  # each start would compile all modules again
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(kept_out)}
        return inherited | self._settings

    def pids(self) -> list[int]:
        """The portal's processes: the master, then the workers."""
        assert self._server is not None
        return [self._server.pid, *_children(self._server.pid)]

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time used until now by the portal's processes and by the broker."""
        portal = 0.0
        for pid in self.pids():
            with contextlib.suppress(OSError):  # it has just ended, and its parent has its time
                portal += cpu_seconds(pid)
        return {"portal": portal, "broker": cpu_seconds(self._broker.pid)}

    def resident_bytes(self) -> dict[str, int]:
        """Memory in RAM of all the portal's processes, and of the broker."""
        return {"portal": sum(map(_resident, self.pids())), "broker": _resident(self._broker.pid)}

    def _run(self, command: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flask", "--app", "app", command],
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _wait_until_ready(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not (self.data / "operator.env").exists():
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"The portal did not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def _stop(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self._server.terminate()
            try:
                self._server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                for pid in (*_children(self._server.pid), self._server.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self._server.wait()
        self._broker.stop()


def _children(pid: int) -> list[int]:
    """Return the processes that the threads of a process have started, and those below them."""
    children: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [*children, *(below for child in children for below in _children(child))]


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used until now, with that of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # proc(5); the first one here is state
    return sum(map(int, fields[11:15])) / _CLOCK_TICKS


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- Races --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Race:
    """What several processes did at the same time: per second, with each one's times in milliseconds, sorted."""

    rate: float
    times: tuple[float, ...]
    client_cpu: float  # seconds of processor time, of all of them together
    seconds: float


def race(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> Race:
    """Start all ``commands``, let them begin together, wait for all.

    Each prints a line when it is ready, begins at a line on its standard input, and ends with a line of JSON:
    ``{"seconds": how long it took, "times": [milliseconds of each piece of work], "cpu": seconds}``.
    """
    racers = [
        subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    try:
        for racer in racers:
            if not _stream(racer.stdout).readline():
                sys.exit(f"{shlex.join(map(str, racer.args))} could not begin.")  # type: ignore[arg-type]  # a list
        for racer in racers:
            _stream(racer.stdin).write("go\n")
            _stream(racer.stdin).flush()
        results: list[dict[str, Any]] = [json.loads(_stream(racer.stdout).readline() or "null") for racer in racers]
    finally:
        for racer in racers:
            if racer.poll() is None and sys.exc_info()[0] is not None:
                racer.terminate()
            racer.communicate()
    if None in results:
        sys.exit("A client failed; its message is above.")
    times = sorted(time for result in results for time in result["times"])
    seconds = max(result["seconds"] for result in results)
    return Race(len(times) / seconds, tuple(times), sum(result["cpu"] for result in results), seconds)


@contextlib.contextmanager
def background(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Let a racer run beside the body of the ``with``, at a lower priority; its first requests are sent at once.

    The portal cuts off some of many connections on which nothing is sent for a quarter of a second.
    """
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as racer:
        try:
            _lower(racer.pid)
            if not _stream(racer.stdout).readline():
                sys.exit(f"{shlex.join(map(str, command))} could not begin.")
            _stream(racer.stdin).write("go\n")
            _stream(racer.stdin).flush()
            yield racer
            if racer.poll() is not None:
                sys.exit("The load ended before its time; its message is above.")
        finally:
            racer.kill()


def _lower(pid: int) -> None:
    """Put a process behind this one, also where that has a real-time priority, see sched(7)."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    if policy in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(pid, policy, os.sched_param(max(1, priority - 1)))
    else:
        os.setpriority(os.PRIO_PROCESS, pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10))


def _stream(stream: Any) -> Any:
    assert stream is not None
    return stream


def make_csr(folder: Path, name: str = "device") -> Path:
    """A CSR with its key (P-256) in ``folder``, made by openssl, each named so; returns the CSR's path."""
    csr = folder / f"{name}.csr"
    command = "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj /CN=bench"
    files = ["-keyout", str(folder / f"{name}.key"), "-out", str(csr)]
    subprocess.run([*command.split(), *files], check=True, stderr=subprocess.DEVNULL)
    return csr


# --- Figures ------------------------------------------------------------------------------------------------------


def percentile(times: Sequence[float], share: float) -> float:
    """The smallest of ``times`` (sorted) that at least ``share`` of them do not exceed (nearest rank)."""
    return times[max(0, math.ceil(share * len(times)) - 1)]


def latency(times: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum of sorted times."""
    figures = {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99), "max": times[-1]}
    return {name: round(value, 1) for name, value in figures.items()}
