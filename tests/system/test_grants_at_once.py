"""A device that was registered connects at once, though nothing was proven since: its line in the journal is enough."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker.guard.journal import read_position
from core.files import FileLock
from tests.support.deployment import PLAIN, Deployment, deployed, wait_until
from tests.support.guard import may_publish, may_subscribe
from tests.support.harness import csr_pem
from tests.support.mqtt import MqttClient, connect_tls, tls_context
from tests.support.pki import key_pem

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    """A portal of one process."""
    with deployed(PORTAL_WORKERS="1", PORTAL_ENFORCE_TIMEOUT="1") as deployment:
        deployment.wait_ready()
        yield deployment


@pytest.fixture
def portal(shared: Deployment) -> Deployment:
    """The same once its process has seen by a proof of its own what the guard can."""

    def knows_guard() -> bool:
        with nothing_proven(shared):
            return shared.call("POST", "/register", PLAIN | {"csr": csr_pem()}).status_code == 201

    wait_until(knows_guard)
    return shared


@contextmanager
def nothing_proven(portal: Deployment) -> Iterator[None]:
    """No reconciliation runs meanwhile: another process holds their lock."""
    with FileLock(portal.data / ".pass.lock").hold():
        yield


def register(portal: Deployment) -> tuple[str, Path, Path]:
    """Register a device with a CSR; return its id, its certificate with chain, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    answer = portal.register(csr=csr_pem(key))
    certificate, private = (portal.folder / f"{uuid.uuid4()}.{kind}" for kind in ("pem", "key"))
    certificate.write_text(answer["chain"])
    private.write_bytes(key_pem(key))
    return answer["device_id"], certificate, private


@contextmanager
def connected(portal: Deployment, device: tuple[str, Path, Path]) -> Iterator[MqttClient]:
    context = tls_context(portal.data / "ca.pem", *device[1:])
    with MqttClient(connect_tls(portal.mqtt_port, context)) as client:
        assert client.connect(device[0]) == 0
        yield client


def is_kept_out(portal: Deployment, device: tuple[str, Path, Path]) -> bool:
    """Whether a device may do nothing, by the guard, or by the CRL, which TLS refuses it by once it is published."""
    try:
        with connected(portal, device) as client:
            return not may_publish(client, f"devices/{device[0]}/x")
    except (ssl.SSLError, ConnectionError):
        return True


def state(portal: Deployment, device_id: str) -> Any:
    return portal.call("GET", f"/devices/{device_id}").json()["broker"]


def test_devices_are_registered_and_connect_while_nothing_is_proven(portal: Deployment) -> None:
    with nothing_proven(portal):
        for uses in (may_subscribe, may_publish) * 4:
            device = register(portal)
            with connected(portal, device) as client:
                assert uses(client, f"devices/{device[0]}/x")
                client.ping()
                assert not may_publish(client, "devices/of/another")


def test_a_revocation_is_in_force_with_the_next_line_and_enforced_with_the_proof(portal: Deployment) -> None:
    device = register(portal)
    with connected(portal, device) as client:
        assert may_publish(client, f"devices/{device[0]}/x")
        with nothing_proven(portal):
            answer = portal.call("POST", f"/revoke/{device[0]}", {"reason": "key_compromise"}).json()
            assert answer["broker"] == "pending", answer
            assert may_publish(client, f"devices/{device[0]}/x")
            register(portal)  # which writes all that the journal lacks
            client.wait_until_cut()
            assert state(portal, device[0]) == "pending"
        wait_until(lambda: state(portal, device[0]) == "enforced")
    assert is_kept_out(portal, device)


def test_a_device_is_registered_while_the_broker_does_not_run_and_connects_once_it_does(portal: Deployment) -> None:
    portal.stop_broker()
    device = register(portal)
    portal.start_broker()
    with connected(portal, device) as client:
        assert may_publish(client, f"devices/{device[0]}/x")
    portal.wait_ready()


def test_a_damaged_journal_lets_nobody_in_who_was_just_written(portal: Deployment) -> None:
    journal = portal.data / "broker" / "guard.journal"
    epoch = read_position(journal).epoch
    with nothing_proven(portal):
        device = register(portal)
        with journal.open("ab") as file:
            file.write(b"1 allow nobody 00000000\n")
        with connected(portal, device) as client:
            assert not may_publish(client, f"devices/{device[0]}/x")
    register(portal)  # by a journal that is written anew
    assert read_position(journal).epoch > epoch
    with connected(portal, device) as client:
        assert may_publish(client, f"devices/{device[0]}/x")
