"""Brokers elsewhere, each with an agent: enforced means there, too, whatever becomes of the agent or of its link."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from broker.guard.journal import read_access, read_position
from operations.wiring import utc_now
from store import brokers
from tests.support.deployment import Deployment, Onboarded, deployed, is_answered, wait_until
from tests.support.edges import Edge, edge_of, journal
from tests.support.links import Link, LossyNamespace
from tests.support.ports import free_port

pytestmark = pytest.mark.system

GRANTED = ("Success", "No matching subscribers")


@contextmanager
def portal_with_agents(**environment: str) -> Iterator[Deployment]:
    """A portal that agents reach."""
    port = free_port()
    given = {
        "PORTAL_AGENTS_BIND": f"127.0.0.1:{port}",
        "PORTAL_AGENTS_URL": f"https://localhost:{port}",
        "PORTAL_ENFORCE_TIMEOUT": "20",
        **environment,
    }
    with deployed(**given) as deployment:
        deployment.wait_ready()
        yield deployment


@pytest.fixture(scope="module")
def portal() -> Iterator[Deployment]:
    with portal_with_agents() as deployment:
        yield deployment


@pytest.fixture(scope="module")
def shared(portal: Deployment) -> Iterator[Edge]:
    """An edge for tests that leave it as it was."""
    with edge_of(portal, "shared") as edge:
        yield edge


@pytest.fixture
def hasty() -> Iterator[Deployment]:
    """A portal of its own, which waits for brokers for two seconds only."""
    with portal_with_agents(PORTAL_ENFORCE_TIMEOUT="2") as deployment:
        yield deployment


def revoke(portal: Deployment, device: Onboarded) -> dict[str, Any]:
    answer = portal.call("POST", f"/revoke/{device.id}", {})
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


def is_let_in(device: Onboarded) -> bool:
    """Whether a device may publish at a broker."""
    client = device.client()
    try:
        return client.publish(f"devices/{device.id}/x") in GRANTED
    finally:
        client.close()


def is_denied(device: Onboarded) -> bool:
    """Whether the broker lets a device do nothing."""
    return bool(device.refusal())


# --- The main thing --------------------------------------------------------------------------------------------------


def test_a_device_registered_here_connects_there_and_is_cut_there_once_revoked(shared: Edge) -> None:
    portal = shared.portal
    device = portal.onboard()
    client = shared.here(device).client()
    assert client.publish(f"devices/{device.id}/x") in GRANTED
    assert revoke(portal, device)["broker"] == "enforced"
    # That is said after the agent has proven it: nothing is waited for.
    assert is_denied(shared.here(device))
    assert is_denied(device)
    client.wait_cut()
    client.close()


def connection_of(portal: Deployment, device: Onboarded) -> dict[str, Any]:
    """What the portal says of a device's connection."""
    return portal.call("GET", f"/devices/{device.id}").json()["connection"] or {"connected": "never"}


def test_a_device_is_connected_at_the_broker_where_it_is_and_moves_to_another(shared: Edge) -> None:
    portal = shared.portal
    device, other = portal.onboard("mover"), portal.onboard("stayer")
    there, stays = shared.here(device).client(), shared.here(other).client()
    for one, client in ((device, there), (other, stays)):
        assert client.publish(f"devices/{one.id}/x") in GRANTED
    wait_until(lambda: all(connection_of(portal, one)["connected"] is True for one in (device, other)))
    since = connection_of(portal, device)["since"]  # in whole seconds
    wait_until(lambda: utc_now() >= datetime.fromisoformat(since) + timedelta(seconds=1))
    here = device.client()
    assert here.publish(f"devices/{device.id}/x") in GRANTED
    wait_until(lambda: connection_of(portal, device)["since"] > since)
    there.close()
    here.close()
    wait_until(lambda: connection_of(portal, device)["connected"] is False)
    assert connection_of(portal, other)["connected"] is True
    stays.close()
    wait_until(lambda: connection_of(portal, other)["connected"] is False)


def test_the_certificate_of_an_agent_lets_nobody_in_at_a_broker(shared: Edge, tmp_path: Path) -> None:
    portal = shared.portal
    device = portal.onboard("victim")
    pair = (shared.data / "agent" / "agent.pem").read_text()
    shutil.copy(device.folder / "ca.pem", tmp_path)
    start = pair.index("-----BEGIN CERTIFICATE")
    (tmp_path / "device.key").write_text(pair[:start])
    (tmp_path / "chain.pem").write_text(pair[start:])
    wait_until(shared.is_enforcing)
    for port in (shared.port, device.port):
        assert Onboarded(device.id, tmp_path, port).refusal()


def test_a_suspended_device_is_refused_there_until_it_is_resumed(shared: Edge) -> None:
    portal = shared.portal
    device = portal.onboard("pump-2")
    assert is_let_in(shared.here(device))
    assert portal.call("POST", f"/devices/{device.id}/suspend", {}).json()["broker"] == "enforced"
    assert is_denied(shared.here(device))
    portal.call("POST", f"/devices/{device.id}/resume", {})

    def is_back() -> bool:
        try:
            return is_let_in(shared.here(device))
        except OSError:  # TLS refuses it until the broker has the next CRL
            return False

    wait_until(is_back)


def test_topics_that_a_device_has_lost_are_out_of_its_reach_there(shared: Edge) -> None:
    portal = shared.portal
    device = portal.onboard("pump-3")
    client = shared.here(device).client()
    assert client.publish(f"devices/{device.id}/command") in GRANTED
    topics = [{"filter": "devices/{id}/telemetry", "access": "write"}]
    answer = portal.call("PATCH", f"/devices/{device.id}", {"topics": topics})
    assert answer.status_code == 200, answer.text
    client.close()
    client = shared.here(device).client()
    assert client.publish(f"devices/{device.id}/command") == "Not authorized"
    assert client.publish(f"devices/{device.id}/telemetry") in GRANTED
    client.close()


def test_retained_messages_of_a_revoked_device_are_gone_there(shared: Edge) -> None:
    portal = shared.portal
    device, other = portal.onboard("pump-4"), portal.add_application("reader", "devices/#:read")
    client = shared.here(device).client()
    client.publish(f"devices/{device.id}/state", b"on", retain=True)
    client.close()
    assert revoke(portal, device)["broker"] == "enforced"
    wait_until(lambda: f"allow {other.id}" in str(read_access(journal(shared))))
    reader = shared.here(other).client()
    assert reader.subscribe(f"devices/{device.id}/#") == "Granted QoS 1"
    assert reader.subscribe("devices/none/#") == "Granted QoS 1"  # answered after what is retained was sent
    assert reader.messages.empty()
    reader.close()


def test_the_status_says_how_far_it_is_and_how_old_that_is(shared: Edge) -> None:
    said = shared.run("status").stdout
    assert "Broker           shared" in said
    assert f"Generation       {shared.newest()}" in said
    assert "UTC, " in said


def test_an_agent_holds_no_key_of_a_ca_and_its_secrets_are_its_own(shared: Edge) -> None:
    for path in [shared.data / "agent", *(shared.data / "agent").rglob("*"), *(shared.data / "secrets").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert not [*shared.data.rglob("*.db")]
    assert not (shared.data / "ca").exists()


# --- Agents that do not do what they should ---------------------------------------------------------------------------


def test_while_an_agent_is_gone_revocations_are_pending_with_its_name(hasty: Deployment) -> None:
    with edge_of(hasty) as edge:
        devices = [hasty.onboard(f"pump-{number}") for number in range(3)]
        for device in devices:
            assert is_let_in(edge.here(device))
        edge.stop_agent(signal.SIGKILL)
        said = revoke(hasty, devices[0])
        assert (said["broker"], said["broker_problem"]) == ("pending", "edge was not seen to enforce it yet.")
        assert is_denied(devices[0])
        assert is_let_in(edge.here(devices[0]))  # which is why it is pending
        edge.start_agent()
        edge.wait_enforced()
        assert is_denied(edge.here(devices[0]))
        assert revoke(hasty, devices[1])["broker"] == "enforced"


def test_a_stopped_agent_catches_up_when_it_goes_on(hasty: Deployment) -> None:
    with edge_of(hasty) as edge:
        device = hasty.onboard()
        assert edge.agent is not None
        edge.agent.send_signal(signal.SIGSTOP)
        assert revoke(hasty, device)["broker"] == "pending"
        began = time.monotonic()
        edge.agent.send_signal(signal.SIGCONT)
        edge.wait_enforced()
        assert time.monotonic() - began < 10
        assert is_denied(edge.here(device))


def test_a_broker_that_does_not_run_has_proven_nothing(hasty: Deployment) -> None:
    with edge_of(hasty) as edge:
        device = hasty.onboard()
        edge.broker.stop()
        said = revoke(hasty, device)
        assert said["broker"] == "pending"
        wait_until(lambda: "does not answer" in (edge.record().problem or ""))
        edge.broker.start()
        edge.wait_enforced()
        assert is_denied(edge.here(device))
        assert edge.record().problem is None


def test_when_the_process_that_serves_agents_dies_another_one_does(hasty: Deployment) -> None:
    with edge_of(hasty) as edge:
        devices = [hasty.onboard(f"pump-{number}") for number in range(2)]
        for device in devices:
            for worker in hasty.workers():
                os.kill(worker, signal.SIGKILL)
            hasty.session.close()  # its connections are gone
            wait_until(lambda: is_answered(f"{hasty.url}/healthz"))
            revoke(hasty, device)  # which another process answers than serves the agent, or the same
            edge.wait_enforced()
            assert is_denied(edge.here(device))


def test_damaged_files_of_the_broker_are_written_again(hasty: Deployment) -> None:
    with edge_of(hasty) as edge:
        device = hasty.onboard()
        assert is_let_in(edge.here(device))
        journal(edge).write_bytes(b"damaged")
        wait_until(lambda: journal(edge).read_bytes() != b"damaged")
        wait_until(lambda: read_position(journal(edge)).generation == edge.newest())
        wait_until(lambda: is_let_in(edge.here(device)))
        assert revoke(hasty, device)["broker"] == "enforced"


def test_the_agent_of_a_restored_folder_begins_again(hasty: Deployment) -> None:
    with edge_of(hasty) as edge:
        state = edge.data / "agent" / "state.json"
        before = state.read_bytes()
        device = hasty.onboard()
        assert revoke(hasty, device)["broker"] == "enforced"
        edge.stop_agent()
        said = json.loads(before) | {"digest": "0" * 64}
        state.write_text(json.dumps(said))
        other = hasty.onboard("pump-2")
        edge.start_agent()
        edge.wait_enforced()
        assert is_denied(edge.here(device))
        assert is_let_in(edge.here(other))


def test_a_broker_that_was_declared_away_does_not_hold_up_the_others(hasty: Deployment) -> None:
    with edge_of(hasty) as edge:
        device = hasty.onboard()
        edge.stop_agent(signal.SIGKILL)
        assert revoke(hasty, device)["broker"] == "pending"
        with edge.transaction() as tx:
            brokers.declare_away(tx, brokers.get_broker(tx, "edge"), at=utc_now())
        other = hasty.onboard("pump-2")
        assert revoke(hasty, other)["broker"] == "enforced"


@pytest.mark.long
def test_an_agent_that_joins_again_leaves_no_time_in_which_its_broker_does_not_count(hasty: Deployment) -> None:
    with edge_of(hasty) as edge:
        device, other = hasty.onboard(), hasty.onboard("pump-2")
        edge.stop_agent()  # such as one whose certificate has expired
        assert revoke(hasty, device)["broker"] == "pending"
        edge.name = "edge-again"
        added = edge.add()
        options = ("--url", added["url"], "--fingerprint", added["fingerprint"])
        refused = edge.run("join", added["code"], *options, check=False)
        assert "add --again" in refused.stderr
        edge.run("join", added["code"], *options, "--again")
        edge.start_agent()
        edge.wait_enforced()
        assert is_denied(edge.here(device))
        assert is_let_in(edge.here(other))
        assert "edge was not seen" in revoke(hasty, other)["broker_problem"]
        answer = hasty.call("DELETE", "/brokers/edge?confirm=edge")
        assert answer.status_code == 200, answer.text
        edge.wait_enforced()
        assert revoke(hasty, hasty.onboard("pump-3"))["broker"] == "enforced"


# --- The link --------------------------------------------------------------------------------------------------------


def test_cut_off_it_goes_on_denying_what_it_knows_and_comes_back_by_itself(hasty: Deployment) -> None:
    with linked(hasty) as (edge, link):
        known, later = hasty.onboard("pump-1"), hasty.onboard("pump-2")
        assert revoke(hasty, known)["broker"] == "enforced"
        link.cut()
        assert revoke(hasty, later)["broker"] == "pending"
        assert is_denied(edge.here(known))
        assert is_let_in(edge.here(later))
        link.join()
        began = time.monotonic()
        edge.wait_enforced()
        assert time.monotonic() - began < 15
        assert is_denied(edge.here(later))


def test_after_a_time_without_the_portal_it_denies_everybody_until_it_is_heard_again(hasty: Deployment) -> None:
    with linked(hasty, PORTAL_AGENT_DENY_ALL_AFTER="7") as (edge, link):
        device = hasty.onboard()
        client = edge.here(device).client()
        link.cut()
        wait_until(lambda: "all denied" in edge.run("status", check=False).stdout)
        assert client.is_refused(f"devices/{device.id}/x")  # it was connected before
        client.close()
        assert is_denied(edge.here(device))
        done = edge.run("status", check=False)
        assert done.returncode == 1
        assert "all denied" in done.stdout
        edge.stop_agent(signal.SIGKILL)  # it stays so when the agent is started again
        edge.start_agent()
        assert is_denied(edge.here(device))
        link.join()
        edge.wait_enforced()
        wait_until(lambda: not is_denied_now(edge.here(device)))


def is_denied_now(device: Onboarded) -> bool:
    try:
        return not is_let_in(device)
    except (OSError, AssertionError):
        return True


@pytest.mark.long
def test_while_a_copy_of_the_agent_runs_nothing_is_called_enforced(hasty: Deployment) -> None:
    with edge_of(hasty) as edge:
        device, later = hasty.onboard("pump-1"), hasty.onboard("pump-2")
        assert revoke(hasty, device)["broker"] == "enforced"
        copy = Edge(hasty, edge.name)
        shutil.copytree(edge.data, copy.data, ignore=shutil.ignore_patterns("*.sock"))
        try:
            copy.start_agent()
            wait_until(lambda: "Two agents run with its key" in (edge.record().problem or ""))
            assert edge.agent is not None
            edge.agent.send_signal(signal.SIGSTOP)
            assert revoke(hasty, later)["broker"] == "pending"
        finally:
            copy.close()


@contextmanager
def linked(portal: Deployment, **environment: str) -> Iterator[tuple[Edge, Link]]:
    """An edge that reaches the portal's listener for agents through a link which the test cuts."""
    port = int(portal.environment["PORTAL_AGENTS_BIND"].rpartition(":")[2])
    with Link(port) as link, edge_of(portal, start=False, **environment) as edge:
        edge.join()
        identity = edge.data / "agent" / "agent.json"
        said = json.loads(identity.read_text())
        identity.write_text(json.dumps(said | {"url": f"https://localhost:{link.port}"}))
        edge.start_agent()
        wait_until((edge.data / "broker" / "projection.json").exists)
        edge.broker.start()
        edge.wait_enforced()
        yield edge, link


# --- A link that loses packets ---------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a network namespace")
def test_on_a_link_that_loses_packets_nothing_is_called_enforced_that_is_not() -> None:
    with LossyNamespace() as namespace:
        agents = f"{namespace.outside}:{free_port()}"
        with portal_with_agents(
            PORTAL_AGENTS_BIND=agents, PORTAL_AGENTS_URL=f"https://{agents}", PORTAL_ENFORCE_TIMEOUT="3"
        ) as portal:
            edge = Edge(portal, "lossy")
            edge.environment["PORTAL_BROKER_PROBE_ADDRESS"] = f"{namespace.outside}:{edge.port}"
            edge.under = ("ip", "netns", "exec", namespace.name)
            try:
                edge.start()
                answers = revoked_on_a_bad_link(portal, edge, namespace)
            finally:
                edge.close()
    assert answers.count("enforced") > 3  # bad as it is, the link works
    assert answers.count("pending") > 0


def revoked_on_a_bad_link(portal: Deployment, edge: Edge, namespace: LossyNamespace) -> list[str]:
    """Revoke devices while packets are lost, and for a time all of them; return what was answered."""
    devices = [portal.onboard(f"pump-{number}") for number in range(14)]
    edge.wait_enforced()
    answers = []
    for number, device in enumerate(devices):
        namespace.lost = 1.0 if 6 <= number < 8 else 0.2
        assert is_let_in(edge.here(device))
        answers.append(revoke(portal, device)["broker"])
        if answers[-1] == "enforced":
            assert is_denied(edge.here(device))
        if number == 7:
            assert answers[6:8] == ["pending", "pending"]
    namespace.lost = 0.0
    edge.wait_enforced()
    assert all(is_denied(edge.here(device)) for device in devices)
    return answers


@pytest.mark.long
def test_a_broker_with_another_host_is_restarted_to_show_it(portal: Deployment, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    with edge_of(portal, "moved", PORTAL_BROKER_RESTART=f"touch {asked}") as edge:
        answer = portal.call("PATCH", "/brokers/moved", {"address": f"127.0.0.1:{edge.port}"})
        assert answer.status_code == 200, answer.text
        revoke(portal, portal.onboard("told-with"))  # the agent hears of its new address with the next CRL
        wait_until(lambda: "if the name was changed, restart the broker" in (edge.record().problem or ""))
        wait_until(asked.exists)
        edge.broker.restart()
        wait_until(lambda: edge.record().problem is None)
        edge.wait_enforced()
