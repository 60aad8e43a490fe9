"""A Mosquitto elsewhere with an agent beside it, for tests with whole portals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from config import Settings
from store import brokers, generations
from store.brokers import BrokerRecord
from store.database import Database
from store.scope import ALL_TENANTS
from tests.support.deployment import ROOT, Deployment, Onboarded, wait_until
from tests.support.mosquitto import Mosquitto, short_folder
from tests.support.ports import free_port

PROGRAM = (sys.executable, "-c", "from onboarding_portal import portal_server; portal_server()", "agent")


class Edge:
    """A broker with an agent, whose data folder is its own."""

    def __init__(self, portal: Deployment, name: str = "edge", **environment: str) -> None:
        self.portal, self.name = portal, name
        self.folder = short_folder()
        self.data = self.folder / "data"
        self.port = free_port()
        self.log = self.folder / "agent.log"
        self.broker = Mosquitto(self.data / "broker", self.port, guard=True)
        self.program: tuple[str, ...] = PROGRAM
        self.under: tuple[str, ...] = ()  # a command that runs the agent
        self.agent: subprocess.Popen[bytes] | None = None
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PORTAL_")},
            "PYTHONPATH": str(ROOT),
            "PORTAL_DATA_DIR": str(self.data),
            "PORTAL_ENFORCE_TIMEOUT": "20",
            "PORTAL_LOG_FORMAT": "json",
            **environment,
        }

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the agent's."""
        done = subprocess.run(
            [*self.program, *arguments],
            env=self.environment,
            cwd=self.folder,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    def add(self) -> dict[str, Any]:
        """Add the broker at the portal."""
        body = {"name": self.name, "address": f"localhost:{self.port}"}
        answer = self.portal.call("POST", "/brokers", body)
        assert answer.status_code == 201, answer.text
        added: dict[str, Any] = answer.json()
        return added

    def join(self) -> None:
        """Add the broker, and let its agent join."""
        added = self.add()
        self.run("join", added["code"], "--url", added["url"], "--fingerprint", added["fingerprint"])

    def start_agent(self) -> None:
        """Start the agent."""
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(
                [*self.under, *self.program, "run"], env=self.environment, cwd=self.folder, stderr=log
            )

    def stop_agent(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop the agent."""
        if self.agent is not None:
            with contextlib.suppress(ProcessLookupError):
                self.agent.send_signal(signal.SIGCONT)
                self.agent.send_signal(how)
            self.agent.wait(30)
            self.agent = None

    def start(self) -> None:
        """Let the agent join and run, and start the broker once its files are there."""
        self.join()
        self.start_agent()
        wait_until((self.data / "broker" / "projection.json").exists)
        self.broker.start()
        self.wait_enforced()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction in the portal's database."""
        settings = Settings.from_env(
            {name: value for name, value in self.portal.environment.items() if name.startswith("PORTAL_")}
        )
        database = Database(settings.database_url, folder=settings.data_dir, threads=1)
        with contextlib.closing(database), database.transaction(sees=ALL_TENANTS) as tx:
            yield tx

    def record(self) -> BrokerRecord:
        """What the portal knows of the broker."""
        with self.transaction() as tx:
            return brokers.get_broker(tx, self.name)

    def newest(self) -> int:
        """The newest generation of the portal."""
        with self.transaction() as tx:
            return generations.get_broker_state(tx).generation

    def is_enforcing(self) -> bool:
        """Whether the broker was seen to enforce the newest generation."""
        return self.record().applied_generation == self.newest()

    def wait_enforced(self) -> None:
        """Wait until the broker was seen to enforce the newest generation."""
        wait_until(self.is_enforcing)

    def here(self, device: Onboarded) -> Onboarded:
        """The device, as it connects to this broker."""
        return Onboarded(device.id, device.folder, self.port)

    def logged(self, message: str) -> list[dict[str, Any]]:
        """The agent's log lines with a message."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("message") == message]

    def close(self) -> None:
        """Stop both, and remove the folder."""
        self.stop_agent(signal.SIGKILL)
        self.broker.stop()
        shutil.rmtree(self.folder)


@contextmanager
def edge_of(portal: Deployment, name: str = "edge", *, start: bool = True, **environment: str) -> Iterator[Edge]:
    """A broker elsewhere that enforces what a portal says; the agent's log is shown if a test fails."""
    edge = Edge(portal, name, **environment)
    try:
        if start:
            edge.start()
        yield edge
    except BaseException:
        if edge.log.exists():
            print(edge.log.read_text())
        raise
    finally:
        edge.close()


def journal(edge: Edge) -> Path:
    """The journal beside its broker."""
    return edge.data / "broker" / "guard.journal"
