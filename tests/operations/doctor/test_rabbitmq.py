"""What the doctor says of the nodes of a RabbitMQ cluster, by what their management API answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from broker.rabbitmq.management import all_nodes
from config import Settings
from core.broker_control import ControlKind
from core.rabbitmq_nodes import RabbitmqNode
from core.setting_values import Address
from operations.doctor import rabbitmq
from operations.doctor.base import Findings, Installation, State, well
from operations.doctor.doctor import CHECKS, examine
from operations.wiring import utc_now
from tests.broker.rabbitmq.test_management import Api
from tests.support.management_api import FakeManagement
from tests.support.ports import free_port

NODE = RabbitmqNode("rabbit@a", Address("127.0.0.1", 8883), "http://127.0.0.1:15672", None)
# As RabbitMQ 3.10.8 says it, where that counts.
OVERVIEW: dict[str, Any] = {
    "rabbitmq_version": "3.10.8",
    "node": "rabbit@a",
    "listeners": [
        {"node": "rabbit@a", "protocol": "clustering", "port": 25672, "socket_opts": []},
        {"node": "rabbit@a", "protocol": "http", "port": 15672, "socket_opts": {"ip": "127.0.0.1"}},
        {
            "node": "rabbit@a",
            "protocol": "mqtt/ssl",
            "port": 8883,
            "socket_opts": {
                "verify": "verify_peer",
                "fail_if_no_peer_cert": True,
                "crl_check": "peer",
                "reuse_sessions": False,
            },
        },
        {"node": "rabbit@b", "protocol": "amqp", "port": 5672, "socket_opts": []},
    ],
}
STATE: dict[str, Any] = {
    "name": "rabbit@a",
    "running": True,
    "mem_alarm": False,
    "disk_free_alarm": False,
    "partitions": [],
    "enabled_plugins": [*rabbitmq.PLUGINS, "rabbitmq_prometheus"],
}


def found(
    overview: dict[str, Any] | None = None, state: dict[str, Any] | None = None, **tenant_ports: int
) -> list[str]:
    findings = Findings()
    rabbitmq.examine(NODE, {**OVERVIEW, **(overview or {})}, [{**STATE, **(state or {})}], findings, tenant_ports)
    assert all(finding.state is State.PROBLEM and finding.advice for finding in findings)
    return [finding.detail for finding in findings]


def with_option(**options: object) -> dict[str, Any]:
    overview = copy.deepcopy(OVERVIEW)
    overview["listeners"][2]["socket_opts"].update(options)
    return overview


def with_protocol(protocol: str) -> dict[str, Any]:
    return {"listeners": [*OVERVIEW["listeners"], {**OVERVIEW["listeners"][0], "protocol": protocol}]}


def test_nothing_is_wrong_with_a_node_as_it_must_be() -> None:
    assert not found()


def test_each_tenant_needs_a_listener_at_each_node() -> None:
    assert not found(acme=8883)
    assert found(acme=8884) == ["rabbit@a has no listener for the tenants acme (8884)."]


@pytest.mark.parametrize(
    ("overview", "state", "said"),
    [
        ({"rabbitmq_version": "3.9.13"}, None, "is RabbitMQ 3.9.13"),
        ({"rabbitmq_version": "4.0.5"}, None, "is RabbitMQ 4.0.5"),
        ({"node": "rabbit@b"}, None, "is rabbit@b, not rabbit@a"),
        (None, {"running": False}, "does not run in its cluster"),
        (None, {"name": "rabbit@b"}, "does not run in its cluster"),
        (None, {"mem_alarm": True}, "short of memory"),
        (None, {"disk_free_alarm": True}, "short of disk space"),
        (None, {"partitions": ["rabbit@b"]}, "lost sight of other nodes"),
        (None, {"enabled_plugins": ["rabbitmq_mqtt"]}, "without rabbitmq_auth_backend_cache, rabbitmq_auth_backend_h"),
        ({"listeners": []}, None, "no listener for MQTT over TLS"),
        (with_protocol("mqtt"), None, "serves mqtt, too"),
        (with_protocol("amqp"), None, "serves amqp, too"),
        (with_option(crl_check=False), None, "port 8883 with another crl_check"),
        (with_option(reuse_sessions=True), None, "another reuse_sessions"),
        (with_option(verify="verify_none", fail_if_no_peer_cert=False), None, "another verify, fail_if_no_peer_cert"),
    ],
)
def test_what_is_wrong_with_a_node_is_said(overview: dict[str, Any], state: dict[str, Any], said: str) -> None:
    [detail] = found(overview, state)
    assert said in detail


def test_a_node_that_was_just_started_has_not_said_all_yet() -> None:
    findings = Findings()
    rabbitmq.examine(NODE, OVERVIEW, [{"name": NODE.name, "running": True}], findings, {})
    assert [finding.state for finding in findings] == [State.WARNING]


def installation(tmp_path: Path, management: str) -> Installation:
    password = tmp_path / "password"
    password.write_text("x")
    password.chmod(0o600)
    of_cluster = {
        "broker_control": ControlKind.RABBITMQ,
        "rabbitmq_nodes": (NODE._replace(management=management, folder=tmp_path),),
        "rabbitmq_password_file": password,
        "rabbitmq_url": f"https://127.0.0.1:{free_port()}",
    }
    return Installation(Settings.from_env({}).model_copy(update=of_cluster), utc_now)


def test_a_node_that_does_not_answer_is_named(tmp_path: Path) -> None:
    finding = rabbitmq.nodes(installation(tmp_path, f"http://127.0.0.1:{free_port()}"))
    assert finding.state is State.PROBLEM
    assert "The management API of rabbit@a" in finding.detail


@pytest.mark.parametrize("answer", [b"[]", b"null", b'{"rabbitmq_version": 3}', b'{"node": {}}'])
def test_an_answer_of_something_else_is_no_error(tmp_path: Path, answer: bytes) -> None:
    api = Api()
    api.answer = 200, answer
    try:
        finding = rabbitmq.nodes(installation(tmp_path, api.url))
    finally:
        api.close()
    assert "answers otherwise than RabbitMQ" in finding.detail


@pytest.mark.parametrize(
    ("users", "login", "said"),
    [
        (404, 401, None),
        (404, 200, None),
        (200, 401, "RabbitMQ has the user guest, with which it was installed."),
        (200, 200, "admits it by its default password at rabbit@a."),
    ],
)
def test_the_user_of_every_installation_is_named(tmp_path: Path, users: int, login: int, said: str | None) -> None:
    found, status = Findings(), {"/api/users/guest": users, "/api/whoami": login}
    with FakeManagement(lambda _, path: (status[path], {"name": "guest"})) as api:
        settings = installation(tmp_path, api.url).settings
        rabbitmq._examine_guest(settings, all_nodes(settings), found)
    assert [finding.detail.endswith(said) for finding in found] == [True] if said else not found


def test_nobody_who_answers_is_a_problem(tmp_path: Path) -> None:
    finding = rabbitmq.answers(installation(tmp_path, "http://127.0.0.1:1"))
    assert finding.state is State.PROBLEM
    assert f"With the files in {tmp_path} nobody answers" in finding.detail


@pytest.mark.parametrize(
    ("control", "word"), [(ControlKind.RABBITMQ, "RabbitMQ nodes"), (ControlKind.GUARD, "broker version")]
)
def test_each_engine_has_its_own_checks(tmp_path: Path, control: ControlKind, word: str) -> None:
    checks = tuple((name, lambda _installation: well("")) for name, _ in CHECKS)
    settings = Settings.from_env({}).model_copy(update={"broker_control": control, "data_dir": tmp_path})
    names = {finding.name for finding in examine(settings, utc_now, checks=checks)}
    assert names & {"RabbitMQ nodes", "broker version"} == {word}
