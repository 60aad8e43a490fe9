"""A cluster as its management API has it, by fakes that answer as real nodes do not do on demand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from broker.probe import ProbeCertificate
from broker.rabbitmq.cluster import Cluster
from broker.rabbitmq.control import RabbitmqControl
from broker.rabbitmq.probe import NodeProbe, NodeStopped
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from tests.support.management_api import Answer, FakeManagement

NAMES = "rabbit@a", "rabbit@b"
RUNNING = [{"name": name, "running": True, "partitions": []} for name in NAMES]
DEVICE = "0189c0de-0000-7000-8000-000000000001"
GOOD = ProbeCertificate(Path("good.pem"), Path("good.key"))


class Site:
    """Two nodes, each of which answers as its function in ``nodes`` is told to."""

    def __init__(self, folder: Path, nodes: list[FakeManagement]) -> None:
        self.nodes = nodes
        password = folder / "password"
        password.touch(mode=0o600)
        password.write_text("secret")
        listed = [
            {"name": name, "mqtt": f"127.0.0.1:{port}", "management": node.url, "folder": str(folder / name)}
            for port, name, node in zip((1, 2), NAMES, nodes, strict=True)
        ]
        self.settings = Settings.from_env(
            {
                "PORTAL_DATA_DIR": str(folder / "data"),
                "PORTAL_BROKER_CONTROL": "rabbitmq",
                "PORTAL_RABBITMQ_NODES": json.dumps(listed),
                "PORTAL_RABBITMQ_PASSWORD_FILE": str(password),
                "PORTAL_RABBITMQ_BIND": "127.0.0.1:8445",
                "PORTAL_RABBITMQ_URL": "https://localhost:8445",
            }
        )
        self.cluster = Cluster(self.settings)

    def say(self, *answers: Answer) -> None:
        """Have each node answer everything in one way."""
        for node, said in zip(self.nodes, answers, strict=True):
            node.answer = lambda method, path, said=said: said  # type: ignore[misc]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        nodes = [stack.enter_context(FakeManagement(lambda method, path: (200, RUNNING))) for _ in NAMES]
        yield Site(tmp_path, nodes)


def soon(seconds: float = 10) -> float:
    return time.monotonic() + seconds


# --- Which node is asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [None, (500, {}), (200, {"a": 1}), (404, {})], ids=["hangs", "500", "odd", "404"])
def test_if_a_node_does_not_answer_as_it_should_another_is_asked_and_first_from_then_on(
    site: Site, said: Answer
) -> None:
    site.say(said, (200, RUNNING))
    assert site.cluster.running(soon(2)) == {*NAMES}
    asked = len(site.nodes[0].asked)
    assert site.cluster.running(soon(2)) == {*NAMES}
    assert len(site.nodes[0].asked) == asked == 1


def test_a_node_that_hangs_leaves_time_to_see_that_the_cluster_answers(site: Site) -> None:
    site.say(None, (200, {"name": "portal"}))
    assert site.cluster.answers(soon(1))


def test_with_no_node_that_answers_the_first_problem_is_told(site: Site) -> None:
    site.say((500, {}), (503, {}))
    with pytest.raises(BrokerUnavailable, match=r"rabbit@a .* status 500"):
        site.cluster.running(soon())
    assert not site.cluster.answers(soon())


def test_a_node_that_refuses_the_portals_user_is_not_passed_over(site: Site) -> None:
    site.say((401, {}), (200, RUNNING))
    with pytest.raises(BrokerNotEnforcing, match="refuses the user portal"):
        site.cluster.running(soon())


def test_an_answer_that_comes_byte_by_byte_takes_no_longer_than_there_is_time(site: Site) -> None:
    endless = b"[" + b" " * 400 + b"]"
    site.say(endless, endless)
    with pytest.raises(BrokerUnavailable, match="TimeoutError"):
        site.cluster.running(soon(1))
    site.say((200, RUNNING), (200, RUNNING))
    assert site.cluster.running(soon()) == {*NAMES}


def test_after_an_answer_that_is_too_long_the_next_is_read(site: Site) -> None:
    site.say((200, "x" * (9 << 20)), (500, {}))
    with pytest.raises(BrokerUnavailable):
        site.cluster.running(soon())
    site.say((200, RUNNING), (500, {}))
    assert site.cluster.running(soon()) == {*NAMES}


# --- Which nodes run -------------------------------------------------------------------------------------------------


def node(name: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "running": True, "partitions": [], **more}


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([*RUNNING, node("rabbit@c")], "rabbit@c, which PORTAL_RABBITMQ_NODES does not name"),
        (RUNNING[:1], "rabbit@b is not in the cluster"),
        ([RUNNING[0], node("rabbit@b", partitions=["rabbit@a"])], "parted"),
        ([RUNNING[0], node("rabbit@b", running=False, partitions=["rabbit@a"])], "parted"),
    ],
)
def test_a_cluster_that_is_another_one_or_has_parted_is_told(site: Site, listed: object, said: str) -> None:
    site.say((200, listed), (200, RUNNING))
    with pytest.raises(BrokerNotEnforcing, match=said):
        site.cluster.running(soon())


@pytest.mark.parametrize(
    "listed", [None, 1, "x", ["x"], [[]], [{}], [node([])], [node(1), node("x")], [{"name": "rabbit@a"}], {"name": 1}]
)
def test_a_list_of_nodes_that_is_none_is_told(site: Site, listed: object) -> None:
    site.say((200, listed), (200, listed))
    with pytest.raises(BrokerUnavailable, match="unknown way") as caught:
        site.cluster.running(soon())
    assert not isinstance(caught.value, BrokerNotEnforcing)


# --- Sessions --------------------------------------------------------------------------------------------------------


def test_sessions_are_ended_at_another_node_if_the_first_does_not_answer(site: Site) -> None:
    site.say((500, {}), (204, None))
    site.cluster.end(DEVICE, soon())
    queues = [f"/api/queues/%2F/mqtt-subscription-{DEVICE}qos{quality}" for quality in (0, 1)]
    wanted = [f"/api/connections/username/{DEVICE}", *queues]
    assert site.nodes[1].asked == [("DELETE", path) for path in wanted]


def test_each_node_that_runs_is_seen_to_have_no_connection(site: Site) -> None:
    site.say((200, []), (200, []))
    site.cluster.see_none(DEVICE, {*NAMES}, soon())
    assert [len(one.asked) for one in site.nodes] == [1, 1]


@pytest.mark.parametrize(
    "said", [(404, {}), (200, None), (200, {}), (200, ""), (200, 0), (200, [{}])], ids=lambda said: str(said)
)
def test_only_an_empty_list_of_connections_shows_that_there_are_none(site: Site, said: Answer) -> None:
    site.say((200, []), said)
    with pytest.raises(BrokerUnavailable, match="rabbit@b"):
        site.cluster.see_none(DEVICE, {*NAMES}, soon(0.5))


# --- Who is connected ------------------------------------------------------------------------------------------------


def test_all_pages_are_read_and_what_is_known_in_part_is_left_out(site: Site) -> None:
    whole = {"user": DEVICE, "protocol": "MQTT 3-1-1", "connected_at": 1000}
    others: list[Any] = [
        {"user": "y"},
        {**whole, "user": None},
        {**whole, "user": "amqp", "protocol": "AMQP 0-9-1"},
        {**whole, "user": "late", "connected_at": 1 << 70},
        {**whole, "user": "odd", "connected_at": "x"},
    ]

    def answer(method: str, path: str) -> Answer:
        return 200, {"items": [whole] if path.endswith("page=2") else others, "page_count": 2}

    for one in site.nodes:
        one.answer = answer
    assert site.cluster.connected(soon()) == {DEVICE: datetime.fromtimestamp(1, UTC)}


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {"items": []},
        {"items": None, "page_count": 1},
        {"items": ["x"], "page_count": 1},
        {"items": [], "page_count": float("inf")},
        {"items": [], "page_count": "many"},
    ],
    ids=str,
)
def test_a_list_of_connections_that_is_none_is_told(site: Site, said: object) -> None:
    site.say((200, said), (200, said))
    with pytest.raises(BrokerUnavailable, match="unknown way"):
        site.cluster.connected(soon())


# --- What the control makes of it ------------------------------------------------------------------------------------


@pytest.fixture
def control(site: Site, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Does something at each node, where nothing listens at the second; returns where it was done."""
    control = RabbitmqControl(site.settings, lambda: datetime.now(UTC))

    def do(one: NodeProbe) -> None:
        if one.node.name == "rabbit@b":
            raise NodeStopped

    return lambda: {one.node.name for one in control._at_each(do, control._probes, soon(2))}


def test_a_node_that_does_not_run_as_others_see_it_does_not_count(site: Site, control: Callable[[], set[str]]) -> None:
    site.say((200, [RUNNING[0], node("rabbit@b", running=False)]), None)
    assert control() == {"rabbit@a"}


@pytest.mark.parametrize("said", [(200, RUNNING), (200, RUNNING[:1]), (200, []), (500, {}), None], ids=str)
def test_a_node_at_which_nothing_listens_counts_unless_another_says_that_it_does_not_run(
    site: Site, control: Callable[[], set[str]], said: Answer
) -> None:
    site.say(said, said)
    with pytest.raises(BrokerUnavailable, match=r"rabbit@"):
        control()
