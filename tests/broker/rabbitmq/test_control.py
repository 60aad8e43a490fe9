"""The control of a RabbitMQ cluster, where no node is needed; tests/system/test_rabbitmq_control.py has real ones."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from broker.rabbitmq.control import RabbitmqControl
from config import Settings
from tests.support.ports import free_port


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_node_is_up_if_clients_reach_it(tmp_path: Path, listening: int) -> None:
    ports = {"rabbit@a": listening, "rabbit@b": free_port()}
    nodes = [
        {"name": name, "mqtt": f"127.0.0.1:{port}", "management": "http://127.0.0.1:1"} for name, port in ports.items()
    ]
    environment = {
        "PORTAL_DATA_DIR": str(tmp_path),
        "PORTAL_BROKER_CONTROL": "rabbitmq",
        "PORTAL_RABBITMQ_NODES": json.dumps(nodes),
        "PORTAL_RABBITMQ_PASSWORD_FILE": str(tmp_path / "password"),
        "PORTAL_RABBITMQ_BIND": "127.0.0.1:8445",
        "PORTAL_RABBITMQ_URL": "https://localhost:8445",
    }
    control = RabbitmqControl(Settings.from_env(environment), lambda: datetime.now(UTC))
    assert control.nodes() == {"rabbit@a": True, "rabbit@b": False}
