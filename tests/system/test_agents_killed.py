"""An agent, or the portal that serves it, is killed at each step of taking over changes: nothing is lost or called
enforced that is not."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
import requests

from broker.guard.journal import read_position
from operations.wiring import utc_now
from tests.support.crash import Victim
from tests.support.deployment import Onboarded, wait_until
from tests.support.edges import Edge, edge_of, journal
from tests.support.ports import free_port

pytestmark = [pytest.mark.system, pytest.mark.long]

# Of a page that is appended to the journal. The steps of a proof come after it, since each start has one, too.
OF_A_PAGE = (
    "agent.page_read",
    "agent.page_read>journal.written",
    "agent.page_read>apply.before_proof",
    "agent.page_read>apply.after_reload",
    "agent.page_read>apply.after_cut",
    "agent.page_read>apply.after_probe",
    "agent.page_read>agent.proven",
    "agent.page_read>agent.before_report",
    "agent.page_read>agent.after_report",
)
# Of a journal that is written anew, with the CAs and CRLs.
OF_A_NEW_JOURNAL = (
    "agent.page_read",
    "agent.trust_fetched",
    "agent.trust_kept",
    "journal.staged",
    "journal.renamed",
    "guard.crl_published",
    "guard.crl_published>install.staged",
    "guard.crl_published>install.renamed:1",
    "guard.crl_published>install.renamed:2",
    "guard.crl_published>apply.before_proof",
    "guard.crl_published>apply.after_reload",
    "guard.crl_published>apply.after_probe",
    "guard.crl_published>agent.proven",
    "guard.crl_published>agent.before_report",
    "guard.crl_published>agent.after_report",
)
OF_CERTIFICATES = ("agent.certified", "agent.key_written", "install.renamed:1")
OF_THE_PORTAL = ("agents.before_given", "agents.after_given", "agents.after_report")


@pytest.fixture(scope="module")
def portal() -> Iterator[Victim]:
    port = free_port()
    with Victim(
        PORTAL_AGENTS_BIND=f"127.0.0.1:{port}",
        PORTAL_AGENTS_URL=f"https://localhost:{port}",
        PORTAL_ENFORCE_TIMEOUT="2",
        PORTAL_WORKERS="1",
    ) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def edge(portal: Victim) -> Iterator[Edge]:
    with edge_of(portal) as edge:
        yield edge


def restarted(edge: Edge, failpoint: str = "") -> None:
    """Have the agent started again, to be killed at a step if one is given."""
    edge.stop_agent(signal.SIGKILL)
    edge.environment.pop("PORTAL_FAILPOINT", None)
    if failpoint:
        edge.environment["PORTAL_FAILPOINT"] = failpoint
    edge.start_agent()


def wait_killed(edge: Edge) -> None:
    assert edge.agent is not None
    assert edge.agent.wait(30) == -signal.SIGKILL


def lets_in(device: Onboarded) -> bool:
    """Whether a broker lets a device publish."""
    try:
        client = device.client()
    except (OSError, AssertionError):
        return False
    try:
        return client.publish(f"devices/{device.id}/x") in ("Success", "No matching subscribers")
    finally:
        client.close()


def check_whole(edge: Edge, revoked: Onboarded, other: Onboarded) -> None:
    """The agent, started again, has its broker obey, and what a killed one left behind is gone."""
    restarted(edge)
    edge.wait_enforced()
    assert not lets_in(edge.here(revoked))
    assert lets_in(edge.here(other))
    assert read_position(journal(edge), whole=True).generation == edge.newest()
    assert [*edge.data.rglob(".*.tmp")] == []
    assert edge.record().problem is None


def revoke(portal: Victim, edge: Edge, device: Onboarded) -> str:
    """Revoke a device; if that is called enforced, it is refused now, whoever was killed."""
    answer = portal.call("POST", f"/revoke/{device.id}", {})
    said: str = answer.json()["broker"]
    if said == "enforced" or edge.is_enforcing():
        assert not lets_in(edge.here(device))
    return said


@pytest.mark.parametrize("step", OF_A_PAGE)
def test_an_agent_that_is_killed_while_it_takes_in_a_page_loses_nothing(portal: Victim, edge: Edge, step: str) -> None:
    device, other = portal.onboard(), portal.onboard("another")
    edge.wait_enforced()
    started = utc_now()
    restarted(edge, step)
    wait_until(lambda: (edge.record().reported_at or started) > started)
    client = edge.here(device).client()
    said = revoke(portal, edge, device)
    wait_killed(edge)
    assert said == ("enforced" if step.endswith("after_report") else "pending")
    check_whole(edge, device, other)
    client.wait_cut()
    client.close()


@pytest.mark.parametrize("step", OF_A_NEW_JOURNAL)
def test_an_agent_that_is_killed_while_it_begins_again_loses_nothing(portal: Victim, edge: Edge, step: str) -> None:
    device, other = portal.onboard(), portal.onboard("another")
    edge.wait_enforced()
    client = edge.here(device).client()
    edge.stop_agent()
    assert revoke(portal, edge, device) == "pending"
    state = edge.data / "agent" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"digest": "0" * 64}))
    restarted(edge, step)
    wait_killed(edge)
    is_reported = step.endswith("after_report")
    assert edge.is_enforcing() is is_reported
    assert not (is_reported and lets_in(edge.here(device)))
    check_whole(edge, device, other)
    client.wait_cut()
    client.close()


@pytest.mark.parametrize("step", OF_CERTIFICATES)
def test_an_agent_that_is_killed_while_it_gets_certificates_has_pairs_that_fit(
    portal: Victim, edge: Edge, step: str
) -> None:
    device, other = portal.onboard(), portal.onboard("another")
    edge.wait_enforced()
    edge.stop_agent()
    pair = (edge.data / "agent" / "agent.pem").read_bytes()
    for path in [*(edge.data / "agent" / "canaries").iterdir(), edge.data / "broker" / "server.key"]:
        path.unlink()
    restarted(edge, step)
    wait_killed(edge)
    assert (edge.data / "agent" / "agent.pem").read_bytes() == pair
    portal.call("POST", f"/revoke/{device.id}", {})
    check_whole(edge, device, other)
    edge.broker.stop()
    edge.broker.start()
    wait_until(lambda: lets_in(edge.here(other)))


@pytest.mark.parametrize("step", OF_THE_PORTAL)
def test_a_portal_that_is_killed_while_it_serves_an_agent_is_told_all_again(
    portal: Victim, edge: Edge, step: str
) -> None:
    device, other = portal.onboard(), portal.onboard("another")
    edge.wait_enforced()
    portal.kill_portal()
    assert portal.start_portal(others={"PORTAL_FAILPOINT": f"revoke.after_commit>{step}=killgroup"}).poll() is None
    portal.wait_ready()
    client = edge.here(device).client()
    with pytest.raises(requests.ConnectionError):
        portal.session.post(f"{portal.url}/revoke/{device.id}", json={}, timeout=20)
    wait_until(lambda: portal.processes[0].poll() is not None)
    portal.kill_portal()
    assert not (edge.is_enforcing() and lets_in(edge.here(device)))
    assert portal.start_portal().poll() is None
    portal.wait_ready()
    edge.wait_enforced()
    assert not lets_in(edge.here(device))
    client.wait_cut()
    client.close()
    assert revoke(portal, edge, other) == "enforced"
