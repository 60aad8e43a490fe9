"""The commands about brokers, against a small portal."""

from __future__ import annotations

import pytest

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)

BROKER = {"name": "edge-1", "state": "enforced", "generation": 4, "enforced_generation": 4}


@pytest.mark.parametrize(
    ("told_by", "address", "says"), [("agent", "edge-1:8883", True), ("agent", "", False), ("node", "edge-1", False)]
)
def test_a_new_address_of_an_agents_broker_says_that_it_must_be_restarted(
    session: Session, stub: PortalStub, told_by: str, address: str, says: bool
) -> None:
    stub.replies["PATCH", "/brokers/edge-1"] = Reply(body=BROKER | {"told_by": told_by})
    result = session.run("broker", "update", "edge-1", "--address", address)
    assert result.exit_code == 0, result.stderr
    assert ("restart it, unless PORTAL_BROKER_RESTART" in " ".join(result.stderr.split())) is says


def test_without_brokers_the_next_step_is_to_add_one(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/brokers"] = Reply(body={"brokers": []})
    assert "Next: portal broker add NAME" in session.run("broker", "list").stderr
    stub.replies["GET", "/brokers"] = Reply(body={"brokers": [BROKER]})
    assert "Next:" not in session.run("broker", "list").stderr
