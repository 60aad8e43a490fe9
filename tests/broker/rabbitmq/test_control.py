"""The control of a RabbitMQ cluster, where no node is needed; tests/system/test_rabbitmq_control.py has real ones."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from broker.guard.journal import NewJournal
from broker.probe import ProbeCertificate
from broker.rabbitmq import control as control_module
from broker.rabbitmq.cluster import Cluster
from broker.rabbitmq.control import RabbitmqControl
from broker.rabbitmq.probe import Believed, NodeProbe
from config import Settings
from core.errors import BrokerUnavailable
from tests.support.ports import free_port


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def control_of(tmp_path: Path, **ports: int) -> RabbitmqControl:
    nodes = [
        {"name": f"rabbit@{name}", "mqtt": f"127.0.0.1:{port}", "management": "http://127.0.0.1:1"}
        for name, port in ports.items()
    ]
    environment = {
        "PORTAL_DATA_DIR": str(tmp_path),
        "PORTAL_BROKER_CONTROL": "rabbitmq",
        "PORTAL_RABBITMQ_NODES": json.dumps(nodes),
        "PORTAL_RABBITMQ_PASSWORD_FILE": str(tmp_path / "password"),
        "PORTAL_RABBITMQ_BIND": "127.0.0.1:8445",
        "PORTAL_RABBITMQ_URL": "https://localhost:8445",
        "PORTAL_RABBITMQ_CACHE_SECONDS": "0.1",
    }
    return RabbitmqControl(Settings.from_env(environment), lambda: datetime.now(UTC))


def test_nothing_is_enforced_before_the_journal_is_durable_whoever_has_written_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = control_of(tmp_path, a=1)
    (tmp_path / "broker").mkdir()
    with NewJournal(control.files.journal, 1, mode=0o640, group=None) as writer:
        writer.commit(7)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(BrokerUnavailable, match="cannot be written: Input/output error"):
            control.enforce(7, time.monotonic() + 60)
    assert control.enforce(7, time.monotonic() + 60) == 7


def test_a_node_is_up_if_clients_reach_it(tmp_path: Path, listening: int) -> None:
    control = control_of(tmp_path, a=listening, b=free_port())
    assert control.nodes() == {"rabbit@a": True, "rabbit@b": False}


def test_what_is_forgotten_was_told_when_no_answer_of_before_could_be_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a node that was held up, and took an old answer late, has forgotten that, too."""
    told, forgotten = list[Believed](), list[Believed]()

    def prove(one: NodeProbe, good: ProbeCertificate, generation: int, deadline: float) -> Believed:
        assert generation == 7
        told.append(Believed(f"client-{len(told)}", int(time.time() * 1000), time.monotonic()))
        return told[-1]

    def see_forgotten(one: NodeProbe, good: ProbeCertificate, believed: Believed, deadline: float) -> bool:
        assert time.monotonic() >= believed.at + 0.1
        forgotten.append(believed)
        return True

    monkeypatch.setattr(control_module, "IN_FLIGHT_SECONDS", 0.2)
    monkeypatch.setattr(NodeProbe, "prove", prove)
    monkeypatch.setattr(NodeProbe, "see_forgotten", see_forgotten)
    monkeypatch.setattr(Cluster, "running", lambda *_: {"rabbit@a"})
    ended = list[str]()
    monkeypatch.setattr(Cluster, "end", lambda _, identity, __: ended.append(identity))
    monkeypatch.setattr(Cluster, "see_none", lambda *_: None)
    control = control_of(tmp_path, a=1)
    (tmp_path / "broker").mkdir()
    with NewJournal(control.files.journal, 1, mode=0o640, group=None) as writer:
        writer.commit(7)
    denied_at = time.monotonic()
    deadline = denied_at + 60
    assert control.enforce(7, deadline, shows=ProbeCertificate(Path("good.pem"), Path("good.key"))) == 7
    control.end_sessions(["x"], deadline)
    assert ended == ["x"]
    [_, last] = told
    assert forgotten == [last]
    assert last.at >= denied_at + 0.2
