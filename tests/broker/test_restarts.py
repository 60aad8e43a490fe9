"""Restarts of the broker are few, and never made without a command for them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from broker.control import RestartReason
from broker.restarts import BrokerRestarts
from config import Settings
from core.errors import BrokerUnavailable


class Waits:
    """Says in turn what waits; a ``BrokerUnavailable`` is a broker that does not answer."""

    def __init__(self, *answers: RestartReason | BrokerUnavailable | None) -> None:
        self.answers = [*answers]

    def __call__(self, deadline: float) -> RestartReason | None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BrokerUnavailable):
            raise answer
        return answer


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., BrokerRestarts]:
    """Makes what restarts a broker that was started some seconds ago; the command starts it anew."""
    (tmp_path / "broker").mkdir()
    socket = tmp_path / "broker" / "portal.sock"

    def make(
        *, devices: int = 0, started: float = 0.0, command: str | None = None, answers: Sequence[object] = (None,)
    ) -> BrokerRestarts:
        socket.touch()
        os.utime(socket, (time.time(), time.time() - started))
        given = f"touch {socket}" if command is None else command
        settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), "PORTAL_BROKER_RESTART": given})
        return BrokerRestarts(settings, Waits(*answers), lambda: devices)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize(
    ("devices", "started", "seconds"),
    [(0, 0, 2), (0, 1.5, 0.5), (0, 3, 0), (1000, 0, 37), (1000, 30, 7), (1_000_000, 0, 3600), (10, -60, 0)],
)
def test_the_more_devices_there_are_the_longer_a_restart_waits_for_more_to_do(
    site: Callable[..., BrokerRestarts], devices: int, started: float, seconds: float
) -> None:
    assert site(devices=devices, started=started).seconds_until_due() == pytest.approx(seconds, abs=0.4)


def test_a_broker_is_restarted_once_and_seen_to_have_all(site: Callable[..., BrokerRestarts]) -> None:
    starting = BrokerUnavailable("It starts.")
    restarts = site(started=10, answers=(starting, starting, None))
    assert restarts.seconds_until_due() == 0
    restarts.restart(RestartReason.TOPICS)
    assert restarts.seconds_until_due() > 1


def test_restarts_in_vain_become_rare(site: Callable[..., BrokerRestarts]) -> None:
    restarts = site(started=10, answers=(RestartReason.NO_ACL,))
    for wait in (4, 8, 16):
        with pytest.raises(BrokerUnavailable, match="was restarted, but it runs without its ACL"):
            restarts.restart(RestartReason.NO_ACL)
        assert restarts.seconds_until_due() == pytest.approx(wait, abs=0.5)


def test_a_broker_that_the_command_does_not_restart_is_said(
    site: Callable[..., BrokerRestarts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.restarts.ANSWER_SECONDS", 0.1)
    with pytest.raises(BrokerUnavailable, match="it does not answer"):
        site(command="true").restart(RestartReason.TOPICS)


def test_without_a_command_the_log_asks_for_a_restart_once_for_each_reason(
    site: Callable[..., BrokerRestarts], caplog: pytest.LogCaptureFixture
) -> None:
    restarts = site(command="")
    assert restarts.seconds_until_due() == math.inf
    for reason in (RestartReason.TOPICS, RestartReason.TOPICS, RestartReason.SESSIONS):
        restarts.ask_for(reason)
    assert [record.__dict__["because"] for record in caplog.records] == [
        "it does not have the topics of some devices yet",
        "TLS sessions that began before a revocation can be resumed",
    ]
