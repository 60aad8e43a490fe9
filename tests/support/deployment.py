"""A whole portal for tests: the server's processes, a real Mosquitto, the CLI, MQTT clients that we did not write."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import shlex
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import paho.mqtt.client as paho
import requests
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.enums import MQTTProtocolVersion as Version
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import BrokerUnavailable
from operations.doctor.base import Finding, State
from operations.doctor.doctor import exit_status
from tests.support import programs
from tests.support.harness import copy_with_groups, first_start
from tests.support.mosquitto import Mosquitto, short_folder
from tests.support.ports import free_port
from tests.support.programs import CLI, SERVER, Process

ROOT = programs.ROOT
SECONDS = 60.0  # what a machine with much other work may take
PLAIN = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}  # a registration


_made: dict[tuple[tuple[str, str], ...], Path] = {}  # data folders by the settings with which they were made


class Deployment:
    """A portal on a temporary data folder and free ports with a broker beside it; by default under the guard."""

    fake: Mapping[str, str] = MappingProxyType({})  # variables by which the broker goes by another clock
    under: tuple[str, ...] = ()  # the program, with its first arguments, under which the server runs
    mqtt_host = "localhost"

    def __init__(self, **environment: str) -> None:
        self.folder = short_folder()
        self.data = self.folder / "data"
        self.mqtt_port = free_port()
        self.url = f"https://127.0.0.1:{free_port()}"
        self.pki_url = f"http://127.0.0.1:{free_port()}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PORTAL_")},
            "PORTAL_DATA_DIR": str(self.data),
            "PORTAL_BIND": self.url.removeprefix("https://"),
            "PORTAL_PKI_BIND": self.pki_url.removeprefix("http://"),
            "PORTAL_MQTT_PORT": str(self.mqtt_port),
            "PORTAL_ENFORCE_TIMEOUT": "20",  # on a machine with much other work
            "PORTAL_BROKER_RESTART": f"sh -c 'echo >{self.folder}/restart'",
            "PORTAL_BROKER_CONTROL": "guard",
            **environment,
        }
        self.processes: list[Process] = []
        self.log = self.folder / "portal.log"
        self.broker: Mosquitto | None = None
        self.session = requests.Session()
        os.mkfifo(self.folder / "restart")
        threading.Thread(target=self._supervise, daemon=True).start()
        self.session.trust_env = False  # else REQUESTS_CA_BUNDLE would outweigh the portal's ca.pem

    def __enter__(self) -> Self:
        try:
            self.make_data_folder()
            if self.environment["PORTAL_BROKER_CONTROL"] != "none":
                self.start_broker()
            self.start_portal()
        except BaseException:
            if self.log.exists():
                print(self.log.read_text())  # pytest shows it with the failure
            self.stop_portal(signal.SIGKILL)
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_portal()
        self.stop_broker()
        self.session.close()
        (self.folder / "restart").open("w").close()  # ends the thread
        shutil.rmtree(self.folder)

    def make_data_folder(self) -> None:
        """Do what ``flask init`` does; further portals with the same settings on SQLite start from a copy of it."""
        own = {"PORTAL_DATA_DIR", "PORTAL_BIND", "PORTAL_PKI_BIND", "PORTAL_MQTT_PORT", "PORTAL_BROKER_RESTART"}
        settings = tuple(sorted(item for item in self.environment.items() if item[0].startswith("PORTAL_")))
        key = tuple(item for item in settings if item[0] not in own)
        if "PORTAL_DATABASE_URL" in self.environment or key not in _made:
            first_start(Settings.from_env(self.environment))
            if "PORTAL_DATABASE_URL" not in self.environment:
                _made[key] = Path(tempfile.mkdtemp(prefix="made-"))
                atexit.register(shutil.rmtree, _made[key], ignore_errors=True)
                copy_with_groups(self.data, _made[key])
        else:
            copy_with_groups(_made[key], self.data)

    # --- Processes

    def run_flask(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the server's own."""
        return programs.run(SERVER, arguments, env=self.environment, check=check, timeout=SECONDS)

    @property
    def is_guarded(self) -> bool:
        return self.environment["PORTAL_BROKER_CONTROL"] == "guard"

    def start_broker(self) -> Mosquitto:
        oldest = self.environment.get("PORTAL_MQTT_TLS", "")
        self.broker = Mosquitto(self.data / "broker", self.mqtt_port, guard=self.is_guarded, oldest_tls=oldest)
        self.broker.fake = self.fake
        return self.broker.start()

    def stop_broker(self) -> None:
        if self.broker is not None:
            self.broker.stop()
            self.broker = None

    def start_portal(self, *, others: dict[str, str] | None = None) -> Process:
        """Start the server; returns once it answers, which the first one says by writing operator.env."""
        environment_file = self.data / "operator.env"
        first = not self.processes
        if first:
            environment_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            environment = self.environment | (others or {})
            process = programs.start(SERVER, ["serve"], env=environment, stdout=log, stderr=log, under=self.under)
        self.processes.append(process)
        if not first:
            address = (others or {}).get("PORTAL_BIND", self.environment["PORTAL_BIND"])
            wait_until(lambda: is_answered(f"https://{address}/healthz") or process.poll() is not None)
            assert process.poll() is None, self.log.read_text()
            return process
        wait_until(lambda: environment_file.exists() or process.poll() is not None)
        assert process.poll() is None, self.log.read_text()
        lines = environment_file.read_text().splitlines()
        self.operator = dict(line.removeprefix("export ").split("=", 1) for line in lines)
        self.session.verify = self.operator["PORTAL_CA"]
        self.session.headers["Authorization"] = f"Bearer {self.operator['PORTAL_TOKEN']}"
        return process

    def stop_portal(self, how: signal.Signals = signal.SIGTERM) -> list[int]:
        """Stop the server's processes; returns their exit statuses."""
        self.session.close()  # else they wait two seconds for further requests on connections that are kept
        statuses = []
        for process in self.processes:
            process.send_signal(how)
            statuses.append(process.wait(SECONDS))
        self.processes.clear()
        return statuses

    def workers(self) -> list[int]:
        """The processes that serve HTTPS; the first child of the master, which has the plain listener, is left out."""
        master = self.processes[0].pid
        return [int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split()][1:]

    def _supervise(self) -> None:
        """Restart the broker whenever the portal asks for that, as a service's manager does."""
        while (self.folder / "restart").read_text():
            if self.broker is not None:
                self.broker.restart()

    def restart_broker(self) -> None:
        """Have the broker restarted as the portal does, by the command in PORTAL_BROKER_RESTART; wait until it runs."""
        assert self.broker is not None
        before = self.broker.pid
        subprocess.run(shlex.split(self.environment["PORTAL_BROKER_RESTART"]), check=True)
        wait_until(lambda: self.broker is not None and self.broker.running and self.broker.pid != before)

    # --- The portal's interface

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> requests.Response:
        """Make a request as the first operator."""
        return self.session.request(method, self.url + path, json=body, timeout=SECONDS, **options)

    def register(self, **fields: Any) -> dict[str, Any]:
        """Register a device as an operator's program does."""
        answer = self.call("POST", "/register", PLAIN | fields)
        assert answer.status_code == 201, answer.text
        registered: dict[str, Any] = answer.json()
        return registered

    def wait_ready(self) -> None:
        """Wait until the portal is ready, and until nothing waits for a restart of the broker that it can make."""
        try:
            wait_until(lambda: self.call("GET", "/readyz").status_code == 200)
        except AssertionError:
            print(self.call("GET", "/readyz").text, self.log.read_text()[-20000:], sep="\n")
            raise
        if not self.environment["PORTAL_BROKER_RESTART"]:
            return
        variables = {name: value for name, value in self.environment.items() if name.startswith("PORTAL_")}
        broker = BrokerProvisioning(Settings.from_env(variables))

        def has_all() -> bool:
            with contextlib.suppress(BrokerUnavailable):
                return broker.control.waits(time.monotonic() + SECONDS) is None
            return False

        wait_until(has_all)

    def cli(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the CLI with what operator.env holds."""
        done = programs.run(CLI, arguments, env=self.environment | self.operator, timeout=2 * SECONDS, **options)
        assert done.returncode == 0 or not check, done.stderr
        return done

    def onboard(self, name: str = "pump-1", *options: str) -> Onboarded:
        """Register a device through the CLI, fetch its bundle and unpack it."""
        out = self.folder / f"device-{time.monotonic_ns()}"
        done = self.cli(
            "register", name, "--type", "pump", "--location", "hall 1", "--firmware", "1.0",
            "--out", str(out), "--json", *options,
        )  # fmt: skip
        answer = json.loads(done.stdout)
        return Onboarded(answer["device_id"], out, self.mqtt_port)

    def add_application(self, name: str, *topics: str, out: Path | None = None) -> Onboarded:
        """Register an application through the CLI, with topics such as ``devices/#:read``."""
        out = out or self.folder / f"application-{time.monotonic_ns()}"
        options = [word for topic in topics for word in ("--topic", topic)]
        done = self.cli("application", "add", name, *options, "--out", str(out), "--json")
        return Onboarded(json.loads(done.stdout)["application_id"], out, self.mqtt_port)


@dataclass(frozen=True, slots=True)
class Onboarded:
    """A device, or an application, with its credentials in a folder."""

    id: str
    folder: Path
    port: int

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def client(self) -> Client:
        """An MQTT client with the device's credentials, connected."""
        client = Client(self)
        client.connect()
        return client

    def refusal(self) -> str:
        """How the broker refuses the device; fails where the device may do anything.

        Until the broker has the new CRL the guard alone refuses: whatever the device tries after CONNECT.
        """
        client = Client(self)
        try:
            client.connect()
        except (OSError, AssertionError) as error:
            return str(error)
        try:
            assert client.is_refused(f"devices/{self.id}/x"), "the broker let the device in"
            return "not authorized"
        finally:
            client.close()


class Client:
    """An MQTT client by paho-mqtt, driven by events."""

    def __init__(self, device: Onboarded, *, session_seconds: int = 0, version: Version = Version.MQTTv5) -> None:
        """``session_seconds``: for how long the broker is to keep the session while the client is away."""
        self.device = device
        self._session_seconds = session_seconds
        self._version = version
        self.messages: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.session_present = False  # whether the broker had kept its session when it connected
        self._connected: queue.Queue[str] = queue.Queue()
        self._disconnected: queue.Queue[str] = queue.Queue()
        self._acknowledged: queue.Queue[tuple[int, str]] = queue.Queue()
        self._subscribed: queue.Queue[str] = queue.Queue()
        clean = None if version is Version.MQTTv5 else session_seconds == 0
        self.paho = paho.Client(CallbackAPIVersion.VERSION2, device.id, clean_session=clean, protocol=version)
        self.paho.tls_set(
            device.file("ca.pem"),
            device.file("chain.pem"),
            device.file("device.key"),
            tls_version=ssl.PROTOCOL_TLS_CLIENT,
        )
        self.paho.on_connect = self._on_connect
        self.paho.on_disconnect = lambda _c, _u, _f, reason, _p: self._disconnected.put(str(reason))
        self.paho.on_message = lambda _c, _u, message: self.messages.put((message.topic, bytes(message.payload)))
        self.paho.on_publish = lambda _c, _u, mid, reason, _p: self._acknowledged.put((mid, str(reason)))
        self.paho.on_subscribe = lambda _c, _u, _mid, reasons, _p: self._subscribed.put(str(reasons[0]))
        self.paho.reconnect_delay_set(3600, 3600)

    def _on_connect(self, _client: object, _user: object, flags: Any, reason: object, _properties: object) -> None:
        self.session_present = flags.session_present
        self._connected.put(str(reason))

    def connect(self) -> None:
        """Connect, or raise what kept it from it."""
        options: dict[str, Any] = {}
        if self._version is Version.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho has no types here
            properties.SessionExpiryInterval = self._session_seconds
            options = {"clean_start": self._session_seconds == 0, "properties": properties}
        self.paho.connect("localhost", self.device.port, keepalive=30, **options)
        self.paho.loop_start()
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                reason = self._connected.get(timeout=0.02)
                if reason == "Success":
                    return
                self.close()
                raise AssertionError(reason)
            with contextlib.suppress(queue.Empty):
                reason = self._disconnected.get_nowait()
                self.close()
                raise ConnectionRefusedError(reason)
        self.close()
        raise TimeoutError("no CONNACK")

    def publish(self, topic: str, payload: bytes = b"hello", *, retain: bool = False) -> str:
        """Publish with QoS 1 and return the broker's reason."""
        info = self.paho.publish(topic, payload, qos=1, retain=retain)
        while True:
            mid, reason = self._acknowledged.get(timeout=SECONDS)
            if mid == info.mid:
                return reason

    def is_refused(self, topic: str) -> bool:
        """Whether a message with QoS 1 is refused, or the session is ended for it."""
        info = self.paho.publish(topic, b"hello", qos=1)
        wait_until(lambda: self._disconnected.qsize() or self._acknowledged.qsize())
        acknowledged = [] if self._acknowledged.empty() else [self._acknowledged.get()]
        return all(mid == info.mid and reason == "Not authorized" for mid, reason in acknowledged)

    def subscribe(self, pattern: str) -> str:
        self.paho.subscribe(pattern, qos=1)
        return self._subscribed.get(timeout=SECONDS)

    def wait_cut(self) -> str:
        """Wait until the broker ends the session, and return its reason."""
        return self._disconnected.get(timeout=SECONDS)

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()
        # Without them it is in no cycle with this object, and closes its sockets when it is freed. In a cycle the
        # garbage collector may come to a socket first, which then says that nobody has closed it.
        for name in ("connect", "disconnect", "message", "publish", "subscribe"):
            setattr(self.paho, f"on_{name}", None)


def examine(deployment: Deployment, *options: str) -> tuple[int, dict[str, str]]:
    """The exit status, and what is said of each check that is not well."""
    done = deployment.run_flask("doctor", "--json", *options, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    findings = [
        Finding(one["name"], State(one["state"]), one["detail"], one["advice"]) for one in json.loads(done.stdout)
    ]
    assert done.returncode == exit_status(findings)
    bad = {one.name: f"{one.state}: {one.detail} {one.advice}" for one in findings if one.state is not State.OK}
    return done.returncode, bad


def is_answered(url: str) -> bool:
    """Whether anything answers there, as curl sees it."""
    command = ["curl", "-sk", "--noproxy", "*", "-o", "/dev/null", "--max-time", "5", url]
    return subprocess.run(command, check=False).returncode == 0


def wait_until(condition: Any, seconds: float = SECONDS) -> None:
    """Look again and again, after 10 milliseconds and then more seldom: for what other processes do unannounced."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < seconds, "it did not happen in time"
        select.select([], [], [], min(0.01 + waited / 10, 0.2))


@contextlib.contextmanager
def deployed(**environment: str) -> Iterator[Deployment]:
    """A deployment for the body of a ``with``."""
    with Deployment(**environment) as deployment:
        yield deployment
