"""Tenants of a whole portal on a real broker: forged certificates, suspension, revocation, and what the doctor says."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

import db
from ca import sign_certificate
from config import Settings
from core.errors import TopicRefused
from core.states import ClientKind
from core.tenants import TenantStatus
from operations.wiring import Portal, open_portal, utc_now
from pki.csr import read_csr
from store import tenants
from store.audit import Actor
from tests.support.deployment import Deployment, deployed, examine
from tests.support.guard import may_publish, may_subscribe
from tests.support.guard_stub import journal_lines
from tests.support.harness import csr_pem
from tests.support.mqtt import MqttClient, connect_tls, tls_context
from tests.support.pki import Credentials
from tests.support.tenants import add_tenant
from workflows.credentials import DeviceRequest

pytestmark = pytest.mark.system
OTHERS = ("acme", "corp")  # below the installation's root, and below one of its own


@dataclass
class Place:
    """A deployment with further tenants, and a process of the portal beside those that serve."""

    deployment: Deployment
    portal: Portal

    @property
    def folder(self) -> Path:
        return self.deployment.folder

    def admit(self, tenant: str, *topics: tuple[str, str]) -> tuple[str, Credentials]:
        """Register a device of a tenant, or an application with topics."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = DeviceRequest(name="one", csr=read_csr(csr_pem(key)), validity_days=9, topics=topics or None)
        if topics:
            request = dataclasses.replace(request, kind=ClientKind.APPLICATION)
        registered = self.portal.registrations.register(actor_of(tenant), request)
        assert registered.certificate is not None
        certificate = x509.load_pem_x509_certificate(registered.certificate.encode())
        return registered.device_id, Credentials(certificate, key)

    def forge(self, by: str, identity: str) -> Credentials:
        """A certificate of an identity that the CA of the tenant ``by`` has signed."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self.portal.authority.current.issuing_of(by).issuer
        issued = sign_certificate(
            issuer, key.public_key(), device_id=identity, now=utc_now(), days=9, pki_url=self.portal.settings.pki_url
        )
        return Credentials(x509.load_der_x509_certificate(issued.der), key)

    @contextlib.contextmanager
    def device(self, credentials: Credentials, *, clean: bool = True) -> Iterator[MqttClient]:
        files = credentials.write(self.folder, uuid.uuid4().hex)
        context = tls_context(self.portal.settings.broker_dir / "ca.pem", *files)
        with MqttClient(connect_tls(self.deployment.mqtt_port, context)) as client:
            assert client.connect("any", clean=clean, expiry=600) == 0
            yield client

    def works(self, tenant: str, identity: str, credentials: Credentials) -> bool:
        with self.device(credentials) as device:
            topic = f"{prefix_of(tenant)}/{identity}"
            return may_subscribe(device, f"{topic}/#") and may_publish(device, f"{topic}/x")

    def change(self, tenant: str, status: TenantStatus) -> None:
        """Suspend or resume a tenant, and see it enforced."""
        with self.portal.database.transaction() as tx:
            generation = db.next_generation(tx, at=utc_now())
            record = tenants.get_tenant(tx, tenant)
            tenants.update_tenant(tx, dataclasses.replace(record, status=status, generation=generation))
        outcome = self.portal.reconciler.apply(generation)
        assert outcome.covers(generation), outcome.problem


def actor_of(tenant: str) -> Actor:
    return Actor(tenant, "somebody", "operator", "request-1", "192.0.2.1")


def prefix_of(tenant: str) -> str:
    return "devices" if tenant == "default" else tenant


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with deployed() as deployment:
        deployment.wait_ready()
        with contextlib.closing(open_portal(Settings.from_env(deployment.environment))) as portal:
            assert portal.broker.knows_tenants(time.monotonic() + 10)
            for tenant in OTHERS:
                add_tenant(portal, tenant, own_root=tenant == "corp")
            yield Place(deployment, portal)


def test_a_device_of_each_tenant_works_with_the_certificate_of_its_tenants_ca(place: Place) -> None:
    for tenant in ("default", *OTHERS):
        identity, credentials = place.admit(tenant)
        assert place.works(tenant, identity, credentials)
        with place.device(credentials) as device:
            for other in {"default", *OTHERS} - {tenant}:
                assert not may_publish(device, f"{prefix_of(other)}/{identity}/x")
                assert not may_subscribe(device, f"{prefix_of(other)}/#")


@pytest.mark.parametrize(
    ("by", "of"), [("acme", "corp"), ("corp", "acme"), ("acme", "default"), ("default", "acme"), ("corp", "default")]
)
def test_a_certificate_that_another_tenants_ca_forged_is_refused_everything(place: Place, by: str, of: str) -> None:
    identity, credentials = place.admit(of)
    with place.device(place.forge(by, identity)) as thief:  # TLS accepts it: the broker trusts all tenants' CAs
        for tenant in (by, of):
            assert not may_subscribe(thief, f"{prefix_of(tenant)}/{identity}/#")
            assert not may_publish(thief, f"{prefix_of(tenant)}/{identity}/x")
    assert place.works(of, identity, credentials)


def test_a_tenant_is_suspended_and_resumed_by_one_line_each_while_others_go_on(place: Place) -> None:
    devices = [place.admit("acme") for _ in range(3)]
    other, other_credentials = place.admit("corp")
    journal = place.portal.settings.broker_file("guard.journal")
    before = len(journal_lines(journal))
    with place.device(devices[0][1], clean=False) as device, place.device(other_credentials) as others:
        identity = devices[0][0]
        assert may_subscribe(device, f"acme/{identity}/#")
        place.change("acme", TenantStatus.SUSPENDED)
        device.wait_until_cut()
        assert may_publish(others, f"corp/{other}/x")
        assert not any(place.works("acme", *each) for each in devices[1:])
        place.change("acme", TenantStatus.ACTIVE)
        assert may_publish(others, f"corp/{other}/x")
    with place.device(devices[0][1], clean=False) as device:
        assert device.session_present
        assert may_publish(device, f"acme/{identity}/x")
        assert device.receive().topic == f"acme/{identity}/x"
    assert all(place.works("acme", *each) for each in devices)
    said = [line for line in journal_lines(journal)[before:] if not line.startswith("generation")]
    assert said == ["suspend acme", "tenant acme acme"]


def test_a_device_of_a_tenant_is_revoked_and_what_it_has_left_is_cleared(place: Place) -> None:
    (identity, credentials), (kept, neighbour) = place.admit("acme"), place.admit("acme")
    _, reading = place.admit("acme", ("acme/#", "read"))
    for each, certificate in ((identity, credentials), (kept, neighbour)):
        with place.device(certificate) as device:
            device.publish(f"acme/{each}/x", b"left", retain=True)
    assert place.portal.revocations.revoke(actor_of("acme"), identity, "key_compromise").enforced
    with place.device(reading) as reader:
        assert may_subscribe(reader, "acme/#")
        assert not may_subscribe(reader, "corp/#")
        reader.ping()
        assert [message.topic for message in reader.messages if message.payload == b"left"] == [f"acme/{kept}/x"]


def test_an_application_is_granted_nothing_outside_its_tenants_prefix(place: Place) -> None:
    for outside in ("corp/#", "devices/#", "+/x"):
        with pytest.raises(TopicRefused):
            place.admit("acme", (outside, "read"))


def test_the_doctor_finds_the_journal_to_be_what_the_database_says_of_tenants(place: Place) -> None:
    place.admit("acme")
    place.change("corp", TenantStatus.SUSPENDED)
    _, bad = examine(place.deployment)
    place.change("corp", TenantStatus.ACTIVE)
    assert not [said for said in bad.values() if "journal" in said or "ACL" in said or "guard" in said], bad


def test_a_tenant_is_added_suspended_resumed_and_removed_over_rest_and_the_broker_obeys_each_time(place: Place) -> None:
    deployment = place.deployment
    made = deployment.call("POST", "/tenants", {"name": "rest", "topic_prefix": "sites/rest", "own_root": True})
    assert made.status_code == 201, made.text
    assert (made.json()["broker"], made.json()["ca_problem"]) == ("enforced", None), made.text
    key = ec.generate_private_key(ec.SECP256R1())
    body = {"name": "one", "type": "t", "location": "l", "firmware": "1", "csr": csr_pem(key)}
    headers = {"Authorization": f"Bearer {made.json()['token']}"}
    registered = deployment.call("POST", "/register", body, headers=headers)
    assert registered.status_code == 201, registered.text
    identity = registered.json()["device_id"]
    credentials = Credentials(x509.load_pem_x509_certificate(registered.json()["certificate"].encode()), key)
    other, others = place.admit("corp")

    def works() -> bool:
        with place.device(credentials) as device:
            return may_publish(device, f"sites/rest/{identity}/x")

    assert works()
    for action, expected in (("suspend", False), ("resume", True)):
        answer = deployment.call("POST", f"/tenants/rest/{action}")
        assert answer.json()["broker"] == "enforced", answer.text
        assert works() is expected
    assert deployment.call("GET", f"/devices/{identity}").status_code == 404
    with place.device(credentials) as device, place.device(others) as neighbour:
        removed = deployment.call("DELETE", "/tenants/rest", params={"confirm": "rest"})
        assert (removed.json()["broker"], removed.json()["devices_left"]) == ("enforced", 0), removed.text
        device.wait_until_cut()
        assert may_publish(neighbour, f"corp/{other}/x")
    assert deployment.call("GET", "/devices", headers=headers).status_code == 401
    with contextlib.suppress(OSError):  # once its CA is retired, TLS refuses it, too
        assert not works()
    exported = deployment.call("GET", "/tenants/rest/export").text
    assert identity in exported
    assert other not in exported
