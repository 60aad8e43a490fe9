"""The portal, broker and clients of the demo, as processes on a temporary folder and free ports."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 30.0  # the longest that any one thing may take


class StepFailed(Exception):
    """A step did not happen as it should; the text says what was seen."""


def expect(happened: bool, otherwise: str) -> None:
    """Raise ``StepFailed`` unless it happened."""
    if not happened:
        raise StepFailed(f"{otherwise}.")


class Site:
    """A portal with its broker on a folder of its own, as scripts/run starts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = _free_ports(3)
        portal, pki, self.mqtt_port = self.ports
        # Settings of the caller's, a saved login and options for mosquitto_pub in his home folder stay out of it.
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PORTAL_")} | {
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder),
            "PORTAL_VENV": sys.prefix,
            "PORTAL_DATA_DIR": str(folder / "data"),
            "PORTAL_BIND": f"127.0.0.1:{portal}",
            "PORTAL_PKI_BIND": f"127.0.0.1:{pki}",
            "PORTAL_MQTT_PORT": str(self.mqtt_port),
        }

    def start(self) -> subprocess.Popen[bytes]:
        """Start scripts/run in a process group of its own, so that Ctrl-C reaches the demo alone."""
        with (self.folder / "run.log").open("wb") as log:
            return subprocess.Popen(
                [ROOT / "scripts" / "run"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self, run: subprocess.Popen[bytes]) -> None:
        """Wait until the portal has written how to reach it, then until it says that broker and all are well."""
        operator = self.folder / "data" / "operator.env"
        deadline = time.monotonic() + 3 * SECONDS
        while not operator.exists():
            if run.poll() is not None or time.monotonic() > deadline:
                raise StepFailed("scripts/run did not start them:\n" + (self.folder / "run.log").read_text().strip())
            time.sleep(0.02)
        for word in shlex.split(operator.read_text()):
            name, assigned, value = word.partition("=")
            if assigned:
                self.environment[name] = value
        while self.command("./portal", "status", cwd=ROOT).returncode != 0:
            expect(time.monotonic() < deadline, self.command("./portal", "status", cwd=ROOT).stdout.strip())

    def command(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program in the folder."""
        return subprocess.run(
            words,
            cwd=cwd or self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def portal(self, *words: str) -> dict[str, Any]:
        """Run a command of the CLI that should succeed, and return its answer."""
        done = self.command(str(ROOT / "portal"), *words, "--json")
        expect(done.returncode == 0, f"portal {words[0]} failed: {done.stderr.strip()}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def refused(self, *words: str) -> dict[str, Any]:
        """Run a command of the CLI that the portal should refuse, and return why it did."""
        done = self.command(str(ROOT / "portal"), *words, "--json")
        expect(done.returncode == 1, f"portal {words[0]} ended with status {done.returncode}: {done.stderr.strip()}")
        error: dict[str, Any] = json.loads(done.stderr)["error"]
        return error

    def register(self, name: str, topic: str, *options: str) -> dict[str, Any]:
        """Register a device that has its own topics and one more."""
        return self.portal(
            *("register", name, "--type", name.partition("-")[0], "--location", "Hall 2", "--firmware", "1.0"),
            *("--topic", "devices/{id}/#:readwrite", "--topic", topic, *options),
        )

    def revoke(self, device_id: str, client: Subscriber) -> tuple[float, float]:
        """Revoke a device; returns the seconds until its client was cut off, then those until the answer."""
        began = time.monotonic()
        words = [str(ROOT / "portal"), "revoke", device_id, "--reason", "key_compromise", "--yes", "--json"]
        with subprocess.Popen(
            words, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ) as revoking:
            while client.is_connected():
                if time.monotonic() > began + SECONDS:
                    revoking.kill()
                    raise StepFailed(f"pump-1 was not cut off within {SECONDS:g} s.")
                time.sleep(0.001)
            cut = time.monotonic() - began
            output, _ = revoking.communicate(timeout=SECONDS)
        answered = time.monotonic() - began
        expect(revoking.returncode == 0, "portal revoke failed")
        answer = json.loads(output)
        enforced = (answer["status"], answer["broker"]) == ("revoked", "enforced")
        expect(enforced, f"the answer to the revocation was {answer}")
        return cut, answered

    def files(self, device: str) -> str:
        """The files of a bundle with their modes; what is secret must be readable by its owner only."""
        files = sorted((self.folder / device).iterdir())
        modes = {file.name: stat.filemode(file.stat().st_mode) for file in files}
        expect(modes.get("device.key") == "-rw-------", f"the files are {modes}")
        return "\n".join(f"{mode}  {name}" for name, mode in modes.items())

    def publish(self, device: str, topic: str, message: str) -> str:
        """Publish by mosquitto_pub with what the bundle holds; returns what it says, nothing where all is well."""
        words = [*_client_options(self.folder / device), "-V", "mqttv5", "-q", "1", "-t", topic, "-m", message]
        done = self.command("mosquitto_pub", *words, cwd=self.folder / device)
        return (done.stdout + done.stderr).strip()

    def subscribed(self, device: str, *topics: str) -> Subscriber:
        """A subscriber by mosquitto_sub with what the bundle holds."""
        return Subscriber(self.folder / device, self.environment, topics)

    def wait_alert(self, device: str) -> str:
        """Connect by TLS with the bundle's key and certificate until an alert ends it; returns the last one."""
        deadline, alert = time.monotonic() + SECONDS, ""
        while not alert and time.monotonic() < deadline:
            alert = self._alert(device)
        return alert

    def _alert(self, device: str) -> str:
        folder = self.folder / device
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "chain.pem", folder / "device.key")
        try:
            with (
                socket.create_connection(("localhost", self.mqtt_port), timeout=1) as connection,
                context.wrap_socket(connection, server_hostname="localhost") as session,
            ):
                session.recv(1)  # in TLS 1.3 the alert comes after the client's end of the handshake
        except ssl.SSLError as error:
            return re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", str(error))
        except TimeoutError:
            pass
        return ""

    def answers(self) -> bool:
        """Whether anything still listens on one of the ports."""
        for port in self.ports:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
        return False


class Subscriber:
    """A mosquitto_sub that runs until its end or that of the ``with``."""

    def __init__(self, folder: Path, environment: dict[str, str], topics: tuple[str, ...]) -> None:
        filters = [word for topic in topics for word in ("-t", topic)]
        # stdbuf: it would keep its lines to itself while they go to a pipe.
        self._words = ["stdbuf", "-oL", "mosquitto_sub", *_client_options(folder), "-d", "-q", "1", *filters]
        self._folder, self._environment = folder, environment
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Subscriber:
        with contextlib.ExitStack() as otherwise:
            otherwise.callback(self.__exit__)
            with _uninterrupted():
                self._process = subprocess.Popen(
                    [*self._words, "-F", "MESSAGE %t %p"],
                    cwd=self._folder,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            threading.Thread(target=self._read, daemon=True).start()
            self.wait_for("Subscribed")
            otherwise.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(SECONDS)

    def _read(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            for line in self._process.stdout:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, beginning: str) -> str:
        """Return the next line that begins so."""
        deadline = time.monotonic() + SECONDS
        seen: list[str] = []
        while (line := self._next(deadline)) is not None:
            if line.startswith(beginning):
                return line
            seen.append(line)
        raise StepFailed("mosquitto_sub did not get that far; it said:\n" + "\n".join(seen))

    def wait_refused(self) -> str:
        """Wait until it has tried to connect once more and was refused, by TLS or all that it asked for.

        Returns what it says of that.
        """
        deadline = time.monotonic() + SECONDS
        while (line := self._next(deadline)) is not None:
            expect(not line.startswith("MESSAGE"), "it was sent a message")
            if any(word in line.lower() for word in ("error", "denied", "not authorized")):
                return line
        raise StepFailed("mosquitto_sub did not say that it failed.")

    def _next(self, deadline: float) -> str | None:
        try:
            return self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None

    def is_connected(self) -> bool:
        """Whether it has an open TCP connection at this moment, as the kernel sees it."""
        process = Path(f"/proc/{self._process.pid if self._process else 0}")
        try:
            sockets = {os.readlink(descriptor) for descriptor in (process / "fd").iterdir()}
            tables = [(process / "net" / table).read_text() for table in ("tcp", "tcp6")]
            lines = [line.split() for table in tables for line in table.splitlines()]
        except FileNotFoundError:  # it closed a socket or ended meanwhile
            return False
        return any(line[3] == "01" and f"socket:[{line[9]}]" in sockets for line in lines)


def _client_options(folder: Path) -> list[str]:
    lines = (folder / "mosquitto-client.conf").read_text().splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split(" ", 1)]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextlib.contextmanager
def running() -> Iterator[Site]:
    """A site for the body of a ``with``, stopped and removed after it."""
    with contextlib.ExitStack() as at_the_end:
        with _uninterrupted():
            folder = Path(tempfile.mkdtemp(prefix="portal-demo-"))
            at_the_end.callback(shutil.rmtree, folder)
        folder.chmod(0o711)  # the broker's own user may pass through
        site = Site(folder)
        run = None
        try:
            with _uninterrupted():
                run = site.start()
            site.wait_ready(run)
            yield site
        except BaseException:
            if run is not None:
                _end(run)  # how it ends matters less than what went wrong before
            raise
        status = _end(run)
        expect(status == 0, f"scripts/run ended with status {status}")


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay a Ctrl-C until after the body: a process that is just being started would never be stopped."""
    pending: list[int] = []
    handlers = {
        number: signal.signal(number, lambda received, _: pending.append(received))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if pending:
        raise KeyboardInterrupt


def _end(run: subprocess.Popen[bytes]) -> int:
    """Stop scripts/run, which stops portal and broker; returns its exit status once its group is gone."""
    for stopping in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stopping, signal.SIG_IGN)
    deadline = time.monotonic() + 2 * SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            run.poll()
            os.killpg(run.pid, 0)
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGKILL)
    return run.wait(SECONDS)
