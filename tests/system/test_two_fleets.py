"""Two tenants of 1,000 devices at one broker: no message, list, event, CRL, audit entry or figure of the other."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from core.roles import Role
from tests.support.deployment import Deployment, deployed, wait_until
from tests.support.guard import DELIVERED, may_publish, may_subscribe
from tests.support.harness import csr_pem
from tests.support.mqtt import MqttClient, connect_tls, tls_context
from tests.support.pki import Credentials
from tests.support.receiver import Receiver, receiving

pytestmark = [pytest.mark.system, pytest.mark.long]
NAMES, DEVICES, REVOKED = ("acme", "corp"), 1000, 5
THREADS = 16
FIELDS = {"type": "pump", "location": "hall 1", "firmware": "1.0"}
ROLES = (Role.ADMIN, Role.OPERATOR, Role.AUDITOR)


@dataclass
class Fleet:
    """A tenant with its devices, each of which is connected."""

    deployment: Deployment
    tenant: str
    admin: str
    credentials: dict[str, Credentials] = field(default_factory=dict)
    clients: dict[str, MqttClient] = field(default_factory=dict)

    def call(self, method: str, path: str, token: str = "", **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {token or self.admin}"} | options.pop("headers", {})
        return self.deployment.call(method, path, headers=headers, **options)

    @cached_property
    def tokens(self) -> dict[Role, str]:
        made = {role: self.call("POST", "/tokens", body={"name": role, "role": role}) for role in ROLES[1:]}
        return {Role.ADMIN: self.admin} | {role: answer.json()["token"] for role, answer in made.items()}

    def upload(self) -> None:
        keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(DEVICES)]
        rows = [{"name": f"{self.tenant}-{n}", "csr": csr_pem(key)} | FIELDS for n, key in enumerate(keys)]
        data = "\n".join(json.dumps(row) for row in rows)
        answer = self.call("POST", "/register/bulk", data=data, headers={"Content-Type": "application/x-ndjson"})
        for line, key in zip(answer.text.splitlines(), keys, strict=True):
            made = json.loads(line)
            certificate = x509.load_pem_x509_certificate(made["certificate"].encode())
            self.credentials[made["device_id"]] = Credentials(certificate, key)

    def application(self) -> Credentials:
        """An application that reads all topics of the tenant."""
        key = ec.generate_private_key(ec.SECP256R1())
        topics = [{"filter": f"{self.tenant}/#", "access": "read"}]
        made = self.call("POST", "/applications", body={"name": "reader", "topics": topics, "csr": csr_pem(key)})
        assert made.status_code == 201, made.text
        return Credentials(x509.load_pem_x509_certificate(made.json()["certificate"].encode()), key)

    def connected(self, credentials: Credentials) -> MqttClient:
        files = credentials.write(self.deployment.folder, uuid.uuid4().hex)
        context = tls_context(self.deployment.data / "ca.pem", *files)
        client = MqttClient(connect_tls(self.deployment.mqtt_port, context))
        assert client.connect("any") == 0
        return client

    def connect_all(self) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            self.clients = dict(zip(self.credentials, pool.map(self.connected, self.credentials.values()), strict=True))

    def at_work(self, other: Fleet, message: bytes) -> None:
        """Each device tries its own topic, and one of the other fleet."""

        def work(pair: tuple[str, str]) -> None:
            identity, theirs = pair
            client = self.clients[identity]
            assert may_subscribe(client, f"{self.tenant}/{identity}/#")
            assert not may_subscribe(client, f"{other.tenant}/#")
            assert not may_subscribe(client, f"{other.tenant}/{theirs}/#")
            assert client.publish(f"{self.tenant}/{identity}/up", message) in DELIVERED
            assert not may_publish(client, f"{other.tenant}/{theirs}/up")

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, zip(self.credentials, other.credentials, strict=True)))

    def listed(self, token: str) -> list[str]:
        """The ids of all pages of the list."""
        found, path = list[str](), "/devices?limit=200"
        while True:
            page = self.call("GET", path, token).json()
            found += [device["device_id"] for device in page["devices"]]
            if page["next_cursor"] is None:
                return found
            path = f"/devices?limit=200&cursor={page['next_cursor']}"


@dataclass
class Reader:
    """What an application of a tenant hears, by a thread, until there are as many messages as are waited for."""

    client: MqttClient
    heard: list[tuple[str, bytes]] = field(default_factory=list)

    def read(self, count: int) -> None:
        while len(self.heard) < count:
            message = self.client.receive()
            self.heard.append((message.topic, message.payload))


def named_in(hook: Receiver, *fleets: Fleet) -> set[str]:
    """The devices of the fleets that a receiver has been told of."""
    told = b" ".join(one.body for one in hook.requests).decode()
    return {one for fleet in fleets for one in fleet.credentials if one in told}


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture(scope="module")
def fleets() -> Iterator[tuple[Fleet, Fleet]]:
    with deployed(PORTAL_WEBHOOK_ALLOW="127.0.0.0/8,::1/128") as deployment, contextlib.ExitStack() as stack:
        deployment.wait_ready()
        made = []
        for tenant in NAMES:
            added = deployment.call("POST", "/tenants", {"name": tenant})
            assert added.json()["broker"] == "enforced", added.text
            fleet = Fleet(deployment, tenant, added.json()["token"])
            fleet.upload()
            made.append(fleet)
        for fleet in made:
            fleet.connect_all()
            for client in fleet.clients.values():
                stack.callback(client.close)
        yield made[0], made[1]


def test_no_device_and_no_application_hears_or_says_anything_in_the_other_fleet(fleets: tuple[Fleet, Fleet]) -> None:
    for fleet, other in (fleets, fleets[::-1]):
        with fleet.connected(fleet.application()) as own, other.connected(other.application()) as foreign:
            assert may_subscribe(own, f"{fleet.tenant}/#")
            assert not may_subscribe(own, f"{other.tenant}/#")
            assert may_subscribe(foreign, f"{other.tenant}/#")
            reader = Reader(own)
            thread = threading.Thread(target=reader.read, args=(DEVICES,))
            thread.start()
            fleet.at_work(other, fleet.tenant.encode())
            thread.join()
            foreign.ping()
            assert {topic for topic, _ in reader.heard} == {f"{fleet.tenant}/{one}/up" for one in fleet.credentials}
            assert foreign.messages == []
    for fleet in fleets:
        for identity, client in fleet.clients.items():
            client.ping()
            assert [message.topic for message in client.messages] == [f"{fleet.tenant}/{identity}/up"]


def test_no_role_sees_a_device_or_audit_entry_of_the_other_fleet(fleets: tuple[Fleet, Fleet]) -> None:
    for fleet, other in (fleets, fleets[::-1]):
        for token in fleet.tokens.values():
            assert sorted(fleet.listed(token)) == sorted(fleet.credentials)
            assert fleet.call("GET", f"/devices/{next(iter(other.credentials))}", token).status_code == 404
            figures = fleet.call("GET", "/metrics", token).text
            assert f'portal_devices{{status="active"}} {DEVICES}' in figures
            record = fleet.call("GET", "/audit?limit=200", token).text + figures
            assert not [each for each in other.credentials if each in record]
            assert other.tenant not in record
    system = fleets[0].deployment
    assert system.call("GET", "/devices").json()["devices"] == []
    assert system.call("GET", f"/devices/{next(iter(fleets[0].credentials))}").status_code == 404


def test_a_crl_and_a_webhook_have_what_is_revoked_in_their_own_fleet_alone(
    fleets: tuple[Fleet, Fleet], stack: contextlib.ExitStack
) -> None:
    revoked = {fleet.tenant: list(fleet.credentials)[-REVOKED:] for fleet in fleets}
    hooks = {fleet.tenant: stack.enter_context(receiving()) for fleet in fleets}
    for fleet in fleets:
        hook = {"name": "hook", "url": hooks[fleet.tenant].url}
        assert fleet.call("POST", "/webhooks", body=hook).status_code == 201
    for fleet in fleets:
        answer = fleet.call("POST", "/devices/actions", body={"action": "revoke", "ids": revoked[fleet.tenant]})
        assert answer.text.count('"enforced"') == REVOKED, answer.text
    for fleet in fleets:
        wait_until(lambda fleet=fleet: {*revoked[fleet.tenant]} <= named_in(hooks[fleet.tenant], *fleets))
        assert named_in(hooks[fleet.tenant], *fleets) == {*revoked[fleet.tenant]}
        certificates = [each.certificate for each in fleet.credentials.values()]
        [point] = certificates[0].extensions.get_extension_for_class(x509.CRLDistributionPoints).value
        [name] = point.full_name or []
        crl = requests.get(fleet.deployment.pki_url + urlsplit(name.value).path, timeout=10).content
        listed = {entry.serial_number for entry in x509.load_der_x509_crl(crl)}
        assert listed == {each.serial_number for each in certificates[-REVOKED:]}
        for identity in revoked[fleet.tenant]:
            fleet.clients.pop(identity).wait_until_cut()
            del fleet.credentials[identity]


def test_nothing_of_one_fleet_is_lost_while_the_other_is_suspended(fleets: tuple[Fleet, Fleet]) -> None:
    acme, corp = fleets
    done, sent = threading.Event(), dict.fromkeys(corp.clients, 0)

    def publish(identity: str) -> None:
        while not done.is_set():
            assert corp.clients[identity].publish(f"corp/{identity}/n", b"%d" % sent[identity]) in DELIVERED
            sent[identity] += 1
            time.sleep(0.1)  # as devices do: to fill the broker's queues is another test

    with corp.connected(corp.application()) as own, ThreadPoolExecutor(THREADS) as pool:
        assert may_subscribe(own, "corp/#")
        reader = Reader(own)
        publishing = [pool.submit(publish, identity) for identity in list(corp.clients)[: THREADS - 1]]
        heard = pool.submit(reader.read, THREADS)
        try:
            assert acme.deployment.call("POST", "/tenants/acme/suspend").json()["broker"] == "enforced"
            for client in acme.clients.values():
                client.wait_until_cut()
            heard.result()
            assert acme.deployment.call("POST", "/tenants/acme/resume").json()["broker"] == "enforced"
        finally:
            done.set()
        for each in publishing:
            each.result()
        reader.read(sum(sent.values()))
    assert sorted(reader.heard) == sorted(
        (f"corp/{identity}/n", b"%d" % n) for identity, count in sent.items() for n in range(count)
    )
    acme.connect_all()
    try:
        for identity, client in acme.clients.items():
            assert may_publish(client, f"acme/{identity}/up")
    finally:
        for client in acme.clients.values():
            client.close()
