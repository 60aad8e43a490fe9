"""Real RabbitMQ nodes for tests, one or a cluster, started from the configuration that an operator installs.

All that a node listens on, Erlang's port mapper among it, is on loopback addresses and ports of this process's own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.mosquitto import short_folder
from tests.support.ports import free_port

CONFIGURATION = Path(__file__).parents[2] / "rabbitmq"
# What starts a node: Debian's program, or another version's with what runs it, such as a chroot.
SERVER = shlex.split(os.environ.get("PORTAL_TEST_RABBITMQ", "/usr/lib/rabbitmq/bin/rabbitmq-server"))
INSTALLED_FOLDER, INSTALLED_ANSWERS = "/etc/rabbitmq/portal", "https://portal.example.org:8444"
USER = "portal-management"
START_SECONDS, STOP_SECONDS = 90.0, 30.0


# The portal looks at certificates; what a test asks of a node is for itself.
_UNVERIFIED = ssl._create_unverified_context()  # noqa: S323


def is_installed() -> bool:
    """Tell whether Debian's package is there; its service need not run, and should not."""
    return Path(SERVER[0]).exists()


class Node:
    """One node: its processes, and the files of it in ``folder``."""

    def __init__(self, cluster: RabbitmqCluster, number: int) -> None:
        self.name = f"rmq{number}@localhost"
        self.folder = cluster.folder / f"rmq{number}"
        self.portal_folder = self.folder / "portal"  # what the portal writes for it
        self.mqtt_port, self.management_port, self.distribution_port = free_port(), free_port(), free_port()
        self.tenant_ports = [free_port() for _ in range(cluster.tenants)]  # listeners beside that of the first tenant
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None
        self.portal_folder.mkdir(parents=True)

    @property
    def management_url(self) -> str:
        scheme = "http" if self._cluster.is_local else "https"
        return f"{scheme}://{self._cluster.address}:{self.management_port}"

    @property
    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log/*.log")))

    def launch(self) -> None:
        """Start it without waiting for anything."""
        for name, text in {**self._configuration(), "inetrc": self._hosts()}.items():
            (self.folder / name).write_text(text)
        cookie = self.folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(self._cluster.cookie)
            cookie.chmod(0o400)
        with (self.folder / "stdout").open("ab") as output:
            self._process = subprocess.Popen(
                SERVER,
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _hosts(self) -> str:
        """Erlang's own table of hosts, which is asked before the machine's."""
        hosts = [f'{{host, {{{at.replace(".", ",")}}}, ["{name}"]}}.' for name, at in self._cluster.hosts.items()]
        return "\n".join([*hosts, "{lookup, [file, native]}.\n"])

    def _environment(self) -> dict[str, str]:
        return {
            "ERL_INETRC": str(self.folder / "inetrc"),
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "HOME": str(self.folder),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._cluster.mapper_port),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.folder / "generated"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +S 2:2",
        }

    def _configuration(self) -> dict[str, str]:
        texts = {
            name: (CONFIGURATION / name).read_text() for name in ("rabbitmq.conf", "advanced.config", "enabled_plugins")
        }
        texts["advanced.config"] = texts["advanced.config"].replace(INSTALLED_FOLDER, str(self.portal_folder))
        text = texts["rabbitmq.conf"].replace(INSTALLED_ANSWERS, self._cluster.answers_url)
        text = text.replace("0.0.0.0:8883", f"{self._cluster.address}:{self.mqtt_port}")
        text = text.replace("management.tcp.port = 15672", f"management.tcp.port = {self.management_port}")
        if not self._cluster.is_local:  # as docs/how-to/rabbitmq.md says
            text = text.replace("management.tcp.", "management.ssl.")
            for option, name in (("cacertfile", "ca.pem"), ("certfile", "server.pem"), ("keyfile", "server.key")):
                text += f"management.ssl.{option} = {self.portal_folder / name}\n"
        for number, port in enumerate(self.tenant_ports, 2):
            text += f"mqtt.listeners.ssl.{number} = 127.0.0.1:{port}\n"
        for option, value in self._cluster.options.items():
            text, count = re.subn(f"(?m)^{re.escape(option)} = .*$", f"{option} = {value}", text)
            assert count == 1, option
        text = text.replace(".ip = 127.0.0.1", f".ip = {self._cluster.address}")
        text += f"default_user = {USER}\ndefault_pass = {self._cluster.password}\nlog.file.level = info\n"
        if len(self._cluster.nodes) > 1:
            text += "cluster_formation.peer_discovery_backend = classic_config\n"
            if self is self._cluster.nodes[0]:  # which finds none
                text += "cluster_formation.discovery_retry_limit = 1\n"
            text += "".join(
                f"cluster_formation.classic_config.nodes.{number} = {node.name}\n"
                for number, node in enumerate(self._cluster.nodes, 1)
            )
        return {**texts, "rabbitmq.conf": text}

    @property
    def was_launched(self) -> bool:
        return self._process is not None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def answers(self) -> bool:
        """Tell whether devices and the portal are served."""
        with contextlib.suppress(OSError), socket.create_connection((self._cluster.address, self.mqtt_port), 1):
            return self.get("/api/overview") is not None
        return False

    def wait(self) -> None:
        """Wait until it answers; its log is the error if it ends."""
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            assert self.running, f"{self.name} has ended:\n{self.log}\n{(self.folder / 'stdout').read_text()}"
            assert time.monotonic() < deadline, f"{self.name} does not answer:\n{self.log}"
            time.sleep(0.05)

    def get(self, path: str) -> Any:
        """Return what the management API says, ``None`` if it does not answer."""
        return self.ask("GET", path)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the management API; return its answer, ``None`` if there is none or it is empty."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.management_url + path, data, method=method)  # noqa: S310 - of this machine
        login = base64.b64encode(f"{USER}:{self._cluster.password}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
        request.add_header("Content-Type", "application/json")
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5, context=_UNVERIFIED) as answer:  # noqa: S310
            return json.loads(answer.read() or "null")
        return None

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it as a power cut does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as a service's manager does."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        # The virtual machine is a child of a shell; all are in a session of their own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + STOP_SECONDS
        while _group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class RabbitmqCluster:
    """One node or several, with a port mapper of their own; ``answers_url`` is where they ask about devices.

    Devices and the portal reach them at ``address``.
    """

    def __init__(self, answers_url: str, nodes: int = 1, *, tenants: int = 0, address: str = "127.0.0.1") -> None:
        self.answers_url, self.address = answers_url, address
        self.hosts: dict[str, str] = {}  # names that the nodes know, besides those of the machine
        self.is_local = address == "127.0.0.1"
        self.tenants = tenants
        self.options: dict[str, str] = {}  # of rabbitmq.conf that are otherwise than an operator installs them
        self.folder = short_folder(in_memory=True)
        self.cookie = secrets.token_hex(16).upper()
        self.password = secrets.token_urlsafe(24)
        self.mapper_port = free_port()
        self.nodes: Sequence[Node] = [Node(self, number) for number in range(1, nodes + 1)]
        self._mapper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Start all; returns once each serves devices, and all see each other."""
        self.launch()
        self.wait()
        return self

    def launch(self) -> None:
        """Start the first node without waiting for it; ``wait`` starts the others."""
        self._mapper = subprocess.Popen(
            ["epmd", "-address", "127.0.0.1", "-port", str(self.mapper_port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.nodes[0].launch()

    def wait(self) -> None:
        """Wait until each node serves devices, and all see each other.

        One joins the cluster after the other: of those that do so at once RabbitMQ 3.10 may leave one out of what keeps
        the client ids, which refuses every client from then on (MQTT return code 3).
        """
        for node in self.nodes:
            if not node.was_launched:
                node.launch()
            node.wait()
        self.wait_for(lambda: all(len(self.running_at(node)) == len(self.nodes) for node in self.nodes))

    def running_at(self, node: Node) -> set[str]:
        """Return the nodes that run, as one of them sees it."""
        return {one["name"] for one in node.get("/api/nodes") or () if one.get("running")}

    def wait_for(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n".join(node.log[-3000:] for node in self.nodes)
            time.sleep(0.05)

    def stop(self) -> None:
        """End all processes, and remove the files."""
        for node in self.nodes:
            node.kill()
        if self._mapper is not None:
            self._mapper.terminate()
            self._mapper.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
