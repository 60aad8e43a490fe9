"""What a node is seen to believe, by sessions as it would answer them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.probe import ProbeCertificate
from broker.rabbitmq.answers import LATE_SECONDS
from broker.rabbitmq.probe import Believed, NodeProbe
from broker.session import SessionClosed
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable

GOOD = ProbeCertificate(Path("good.pem"), Path("good.key"))
BELIEVED = Believed("client", 1000, 0.0)


class Node(NodeProbe):
    """A node that answers each message as ``answer`` does, by its topic."""

    answer: Callable[[str], None]

    def publish(self, topic: str) -> int:
        self.answer(topic)
        return 0

    @contextmanager
    def _as_device(  # type: ignore[override]
        self, good: ProbeCertificate, client_id: str, deadline: float, more_seconds: float = 0.0
    ) -> Iterator[Node]:
        assert client_id == BELIEVED.client_id or more_seconds == LATE_SECONDS
        yield self


@pytest.fixture
def node(tmp_path: Path) -> Node:
    nodes = [{"name": "rabbit@a", "mqtt": "127.0.0.1:1", "management": "http://127.0.0.1:2"}]
    environment = {
        "PORTAL_DATA_DIR": str(tmp_path),
        "PORTAL_BROKER_CONTROL": "rabbitmq",
        "PORTAL_RABBITMQ_NODES": json.dumps(nodes),
        "PORTAL_RABBITMQ_PASSWORD_FILE": str(tmp_path / "password"),
        "PORTAL_RABBITMQ_BIND": "127.0.0.1:8445",
        "PORTAL_RABBITMQ_URL": "https://localhost:8445",
    }
    settings = Settings.from_env(environment)
    return Node(settings.rabbitmq_nodes[0], settings)


def soon() -> float:
    return time.monotonic() + 0.2


def test_an_answer_that_a_node_keeps_believing_is_said(node: Node) -> None:
    node.answer = lambda topic: None
    with pytest.raises(BrokerNotEnforcing, match="PORTAL_RABBITMQ_CACHE_SECONDS"):
        node.see_forgotten(GOOD, BELIEVED, soon())


def test_a_node_that_refuses_all_has_not_shown_that_it_forgets(node: Node) -> None:
    def refuse(topic: str) -> None:
        raise SessionClosed("the broker closed the connection")

    node.answer = refuse
    with pytest.raises(BrokerUnavailable) as caught:
        node.see_forgotten(GOOD, BELIEVED, soon())
    assert not isinstance(caught.value, BrokerNotEnforcing)


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), ConnectionError("another packet")])
def test_a_connection_that_is_lost_is_no_refusal(node: Node, error: OSError) -> None:
    def lose(topic: str) -> None:
        if topic.endswith(f"/{BELIEVED.ends}"):
            raise error

    node.answer = lose
    with pytest.raises(BrokerUnavailable):
        node.see_forgotten(GOOD, BELIEVED, soon())


def test_what_is_refused_alone_is_forgotten(node: Node) -> None:
    asked: list[str] = []

    def forget(topic: str) -> None:
        asked.append(topic)
        if topic.endswith(f"/{BELIEVED.ends}") and len(asked) > 2:
            raise SessionClosed("the broker closed the connection")

    node.answer = forget
    assert not node.see_forgotten(GOOD, BELIEVED, soon())  # the first time it was believed
    assert node.see_forgotten(GOOD, BELIEVED, soon())


def test_a_node_waits_too_long_if_it_takes_an_answer_that_comes_late(node: Node) -> None:
    def give_up(topic: str) -> None:
        if topic.startswith("portal/late/"):
            raise SessionClosed("the broker closed the connection")

    node.answer = give_up
    assert not node.takes_late_answers(GOOD, soon())
    node.answer = lambda topic: None
    assert node.takes_late_answers(GOOD, soon())


def test_a_node_that_refuses_all_has_not_shown_how_long_it_waits(node: Node) -> None:
    def refuse(topic: str) -> None:
        raise SessionClosed("the broker closed the connection")

    node.answer = refuse
    with pytest.raises(BrokerUnavailable):
        node.takes_late_answers(GOOD, soon())
