"""An agent that is killed while it takes in a page; ``tests/system/test_agents_killed.py`` has each step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from broker.guard.journal import read_access
from core.files import temporary_beside
from operations.agent.folder import remove_leftovers_of_agent, settings_of
from operations.wiring import Portal
from store import brokers
from store.scope import ALL_TENANTS
from tests.operations.agent.conftest import Place, register
from tests.support.guard_stub import GuardStub
from tests.support.programs import ROOT
from tests.workflows.test_admission import OPERATOR

FOLLOWS = """
import os
from broker_provisioning import BrokerProvisioning
from operations.agent.agent import Agent
from operations.agent.folder import settings_of
BrokerProvisioning.probe = lambda *_arguments, **_options: None
Agent(*settings_of(os.environ)).follow(0)
"""


def follow(place: Place, failpoint: str) -> None:
    """Have a process take in a page, in which it is killed."""
    environment = {**os.environ, **place.environment, "PORTAL_FAILPOINT": failpoint}
    done = subprocess.run(
        [sys.executable, "-c", FOLLOWS], cwd=ROOT, env=environment, timeout=60, check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def applied(portal: Portal) -> int:
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        return brokers.get_broker(tx, "edge").applied_generation


def test_what_was_not_reported_is_told_again_with_the_sessions_to_end(
    portal: Portal, place: Place, guard: GuardStub
) -> None:
    device = register(portal)
    place.agent().follow(0)
    before = applied(portal)
    portal.revocations.revoke(OPERATOR, device, "unspecified")
    for step in ("journal.written", "agent.before_report"):
        follow(place, step)
        assert applied(portal) == before
    ended = guard.clients.count(device)
    agent = place.agent()
    while agent.follow(0):
        pass
    assert read_access(place.journal)[device] == f"deny {device}"
    assert guard.clients.count(device) >= ended > 0
    agent.look()
    assert applied(portal) == agent.state.mark.generation > before


def test_what_a_killed_one_has_not_finished_is_removed_also_where_each_has_the_same_number(place: Place) -> None:
    settings, folder = settings_of(place.environment)
    settings.broker_dir.mkdir(parents=True)
    left = [temporary_beside(path / "x") for path in (settings.data_dir, folder.path, settings.broker_dir)]
    for path in left:
        path.write_text("half")
    remove_leftovers_of_agent(settings, folder)
    assert not any(path.exists() for path in left)
    assert folder.has_joined
