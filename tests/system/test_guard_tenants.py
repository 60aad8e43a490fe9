"""Tenants on one broker with the guard: none reaches what is another's, and each is suspended alone."""

from __future__ import annotations

import shutil
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from cryptography import x509

from tests.support.guard import (
    DELIVERED,
    GuardedBroker,
    Journal,
    hash_of,
    key_hashes_of,
    may_publish,
    may_subscribe,
)
from tests.support.mosquitto import short_folder
from tests.support.mqtt import NOT_AUTHORISED, MqttClient, Will, connect_tls
from tests.support.pki import PEM, Authority, Credentials

pytestmark = pytest.mark.system
PREFIXES = {"": "devices", "b": "plant/b", "c": "c"}


@dataclass
class TenantsBroker(GuardedBroker):
    """A broker of three tenants: the first, ``b`` with a CA below the same root, ``c`` below a root of its own."""

    cas: dict[str, Authority] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own_root = Authority("Root of c")
        below = {"b": self.pki.root, "c": self.own_root}
        self.cas = {name: Authority(f"Test {name} issuing", issuer=root) for name, root in below.items()}
        super().__post_init__()
        self.cas[""] = self.pki.issuing
        more = (self.cas["b"], self.cas["c"], self.own_root)
        self.ca.write_bytes(self.pki.ca_bundle + b"".join(one.certificate.public_bytes(PEM) for one in more))

    def new_journal(self, epoch: int) -> Journal:
        journal = super().new_journal(epoch)
        for name in ("b", "c"):
            journal.line(f"tenant {name} {PREFIXES[name]}")
            for each in (hash_of(self.cas[name].certificate.subject), *key_hashes_of(self.cas[name])):
                journal.line(f"issuer {each} in:{name}")
        return journal

    def admit_in(self, tenant: str, *filters: str) -> tuple[str, Credentials]:
        """A new device of a tenant, with a certificate of that tenant's CA."""
        identity = str(uuid.uuid4())
        self.tell(" ".join(["allow", identity, *([f"in:{tenant}"] if tenant else []), *filters]))
        return identity, self.cas[tenant].issue(identity)


@pytest.fixture(scope="module")
def broker() -> Iterator[TenantsBroker]:
    with_root = short_folder()
    running = TenantsBroker(with_root)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(with_root)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def topic_of(tenant: str, identity: str) -> str:
    return f"{PREFIXES[tenant]}/{identity}/x"


def works(broker: TenantsBroker, tenant: str, identity: str, credentials: Credentials) -> bool:
    """Say whether a device publishes, and receives what it has published."""
    with broker.device(credentials) as device:
        if not may_subscribe(device, f"{PREFIXES[tenant]}/{identity}/#"):
            return False
        return may_publish(device, topic_of(tenant, identity)) and device.receive().topic == topic_of(tenant, identity)


# --- Certificates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tenant", ["", "b", "c"])
def test_a_device_reaches_its_topics_below_the_prefix_of_its_tenant_and_no_other(
    broker: TenantsBroker, tenant: str
) -> None:
    identity, credentials = broker.admit_in(tenant)
    assert works(broker, tenant, identity, credentials)
    with broker.device(credentials) as device:
        for other in PREFIXES.keys() - {tenant}:
            assert not may_publish(device, topic_of(other, identity))
            assert not may_subscribe(device, f"{PREFIXES[other]}/{identity}/#")
            assert not may_subscribe(device, f"{PREFIXES[other]}/#")


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(("by", "of"), [("b", ""), ("b", "c"), ("c", "b"), ("c", ""), ("", "b")])
def test_a_certificate_of_another_tenants_ca_is_refused_everything(
    broker: TenantsBroker, by: str, of: str, version: int
) -> None:
    identity, credentials = broker.admit_in(of)
    _, watching = broker.admit_in(of, f"r:{PREFIXES[of]}/#")
    _, sending = broker.admit_in(of, f"w:{PREFIXES[of]}/#")
    forged = broker.cas[by].issue(identity)
    with broker.device(watching) as watcher, broker.device(sending) as sender:
        assert may_subscribe(watcher, f"{PREFIXES[of]}/{identity}/#")
        with broker.tls(forged, version=version) as thief:
            thief.connect("any", will=Will(topic_of(of, identity), b"will"))
            refused = thief.subscribe(f"{PREFIXES[of]}/{identity}/#")
            assert refused == (0x80 if version == 4 else NOT_AUTHORISED)
            assert thief.subscribe(f"{PREFIXES[by]}/{identity}/#") == refused  # nothing of its own CA's tenant either
            assert sender.publish(topic_of(of, identity), b"for the device") in DELIVERED
            thief.ping()
            assert thief.messages == []
            if version == 4:  # which would be told that its message was taken
                with pytest.raises(ConnectionError):
                    thief.publish(topic_of(of, identity), b"forged")
            else:
                assert thief.publish(topic_of(of, identity), b"forged") == NOT_AUTHORISED
            thief.drop()
        broker.wait_until_closed(identity)
        assert works(broker, of, identity, credentials)
        watcher.ping()
        assert {message.payload for message in watcher.messages} == {b"for the device", b"hello"}
    assert "its certificate is of a CA of another tenant" in broker.log


def test_a_forged_certificate_that_takes_a_session_over_is_handed_nothing_of_what_waits_in_it(
    broker: TenantsBroker,
) -> None:
    identity, credentials = broker.admit_in("c")
    _, sending = broker.admit_in("c", "w:c/#")
    with broker.device(credentials, clean=False, expiry=600) as device:
        assert may_subscribe(device, f"c/{identity}/#")
    with broker.device(sending) as sender:
        assert sender.publish(topic_of("c", identity), b"waiting") in DELIVERED
    with broker.device(broker.cas["b"].issue(identity), clean=False, expiry=600) as thief:
        assert thief.session_present
        thief.ping()
        assert thief.messages == []
    with broker.device(credentials, clean=False, expiry=600) as device, broker.device(sending) as sender:
        assert device.session_present
        assert sender.publish(topic_of("c", identity), b"later") in DELIVERED
        assert device.receive().payload == b"later"


def test_name_constraints_do_not_stop_a_common_name_and_the_guard_does(broker: TenantsBroker) -> None:
    identity, credentials = broker.admit_in("c")
    limits = x509.NameConstraints(permitted_subtrees=[x509.DNSName("b.example")], excluded_subtrees=None)
    constrained = Authority("Test b constrained", issuer=broker.pki.root, constraints=limits)
    with broker.ca.open("ab") as file:
        file.write(constrained.certificate.public_bytes(PEM))
    broker.terminate()
    broker.start()
    for each in (hash_of(constrained.certificate.subject), *key_hashes_of(constrained)):
        broker.tell(f"issuer {each} in:b")
    own = str(uuid.uuid4())
    broker.tell(f"allow {own} in:b")
    assert works(broker, "b", own, constrained.issue(own))
    with broker.device(constrained.issue(identity)) as thief:  # TLS has accepted the certificate
        assert not may_subscribe(thief, f"c/{identity}/#")
        assert not may_publish(thief, topic_of("c", identity))
    assert works(broker, "c", identity, credentials)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_resumed_tls_session_shows_whose_ca_has_issued_its_certificate(
    broker: TenantsBroker, version: ssl.TLSVersion
) -> None:
    identity, _ = broker.admit_in("b")
    context = broker.context(broker.cas["c"].issue(identity))
    context.minimum_version = context.maximum_version = version
    with MqttClient(connect_tls(broker.port, context)) as first:
        assert first.connect("any") == 0
        assert not may_publish(first, topic_of("b", identity))
        assert isinstance(first.socket, ssl.SSLSocket)
        session = first.socket.session
    with MqttClient(connect_tls(broker.port, context, session)) as again:
        assert isinstance(again.socket, ssl.SSLSocket)
        assert again.socket.session_reused
        assert again.connect("any") == 0
        assert not may_publish(again, topic_of("b", identity))


def test_a_ca_of_a_tenant_is_known_by_its_key_too_and_never_by_its_name_alone(broker: TenantsBroker) -> None:
    of_their_name = Authority("Theirs", issuer=broker.own_root)
    with broker.ca.open("ab") as file:
        file.write(of_their_name.certificate.public_bytes(PEM))
    broker.terminate()
    broker.start()
    broker.tell(f"issuer {hash_of(of_their_name.certificate.subject)} in:c")
    identity, _ = broker.admit_in("c")
    with broker.device(of_their_name.issue(identity)) as device:
        assert not may_publish(device, topic_of("c", identity))
    for each in key_hashes_of(of_their_name):
        broker.tell(f"issuer {each} in:c")
    assert works(broker, "c", identity, of_their_name.issue(identity))


def test_a_ca_that_the_journal_gives_to_no_tenant_makes_nobody_a_device(broker: TenantsBroker) -> None:
    identity, credentials = broker.admit_in("c")
    between = Authority("Of c's own making", issuer=broker.own_root)  # TLS trusts what is below that root
    forged = between.issue(identity)
    certificate, key = forged.write(broker.root, uuid.uuid4().hex)
    chain = certificate.read_bytes() + between.certificate.public_bytes(PEM)
    certificate.write_bytes(chain)
    context = ssl.create_default_context(cafile=broker.ca)
    context.load_cert_chain(certificate, key)
    with MqttClient(connect_tls(broker.port, context)) as thief:
        assert thief.connect("any") == 0
        assert not may_publish(thief, topic_of("c", identity))
        assert not may_subscribe(thief, f"c/{identity}/#")
    assert works(broker, "c", identity, credentials)


# --- Applications, retained messages, and identities that move ------------------------------------------------------


def test_an_application_hears_of_its_own_tenant_alone(broker: TenantsBroker) -> None:
    senders = {tenant: broker.admit_in(tenant) for tenant in PREFIXES}
    _, reading = broker.admit_in("b", "r:plant/b/#")
    with broker.device(reading) as application:
        for prefix in PREFIXES.values():
            assert may_subscribe(application, f"{prefix}/#") == (prefix == "plant/b")
        assert may_subscribe(application, "#")  # which can match its own topics
        assert not may_subscribe(application, "$share/group/#")
        for tenant, (identity, credentials) in senders.items():
            with broker.device(credentials) as sender:
                assert sender.publish(topic_of(tenant, identity), tenant.encode()) in DELIVERED
        application.ping()
        assert {message.payload for message in application.messages} == {b"b"}


def test_what_a_revoked_device_of_a_tenant_has_left_is_cleared_by_the_portal(broker: TenantsBroker) -> None:
    identity, credentials = broker.admit_in("b")
    _, reading = broker.admit_in("b", "r:plant/b/#")
    with broker.device(credentials) as device:
        assert device.publish(topic_of("b", identity), b"left", retain=True) in DELIVERED
    broker.tell(f"deny {identity} in:b")
    with broker.portal(client_id=identity) as portal:
        assert not may_subscribe(portal, f"devices/{identity}/#")
        assert may_subscribe(portal, f"plant/b/{identity}/#")
        portal.ping()
        assert portal.messages == []
    broker.tell(f"allow {identity} in:b")
    with broker.device(reading) as reader:
        assert may_subscribe(reader, f"plant/b/{identity}/#")
        reader.ping()
        assert reader.messages == []


def test_a_revoked_serial_number_is_one_of_its_tenants_ca(broker: TenantsBroker) -> None:
    identity, old = broker.admit_in("b")
    other, others = broker.admit_in("c")
    number = f"{old.certificate.serial_number:x}"
    broker.tell(f"serial {hash_of(broker.cas['c'].certificate.subject)} {number} {identity}")
    assert works(broker, "b", identity, old)
    with broker.device(old) as device:
        assert may_publish(device, topic_of("b", identity))
        broker.tell(f"serial {hash_of(broker.cas['b'].certificate.subject)} {number} {identity}")
        device.wait_until_cut()
    with broker.device(old) as device:
        assert not may_publish(device, topic_of("b", identity))
    assert works(broker, "b", identity, broker.cas["b"].issue(identity))
    assert works(broker, "c", other, others)


def test_an_identity_that_is_forgotten_and_then_anothers_is_reached_by_the_others_ca_alone(
    broker: TenantsBroker,
) -> None:
    identity, old = broker.admit_in("b")
    with broker.device(old) as device:
        assert may_publish(device, topic_of("b", identity))
        broker.tell(f"forget {identity}", f"allow {identity} in:c")
        device.wait_until_cut()
    with broker.device(old) as device:
        assert not may_publish(device, topic_of("b", identity))
        assert not may_publish(device, topic_of("c", identity))
    assert works(broker, "c", identity, broker.cas["c"].issue(identity))


def test_a_new_epoch_in_which_an_identity_is_anothers_disconnects_it(broker: TenantsBroker) -> None:
    identity, old = broker.admit_in("b", "rw:shared/x")
    with broker.device(old) as device:
        assert may_publish(device, "shared/x")
        broker.journal = broker.new_journal(broker.journal.epoch + 1)
        broker.journal.line(f"allow {identity} in:c rw:shared/x")
        broker.journal.write()
        assert broker.ask(f"epoch/{broker.journal.epoch}")
        device.wait_until_cut()
    with broker.device(old) as device:
        assert not may_publish(device, "shared/x")


@pytest.mark.parametrize("line", ["allow {} in:c", "allow {}", "tenant b elsewhere", "tenant d plant", "allow {} in:d"])
def test_a_line_that_contradicts_denies_everybody_until_the_journal_is_good_again(
    broker: TenantsBroker, line: str
) -> None:
    identity, credentials = broker.admit_in("b")
    _, others = broker.admit_in("")
    good = broker.journal.content
    sequence, checksum = broker.journal.sequence, broker.journal.checksum
    broker.journal.append(line.format(identity))
    assert not broker.proven()
    for each in (credentials, others):
        with broker.device(each) as device:
            assert not may_publish(device, topic_of("b", identity))
    broker.journal.content, broker.journal.sequence, broker.journal.checksum = good, sequence, checksum
    broker.journal.write()
    assert broker.proven()
    assert works(broker, "b", identity, credentials)


def test_the_guard_speaks_its_version_and_those_that_it_includes(broker: TenantsBroker) -> None:
    assert [broker.ask(f"version/{version}") for version in range(1, 6)] == [False, True, True, True, False]


# --- Suspension -----------------------------------------------------------------------------------------------------


def test_the_devices_of_a_suspended_tenant_are_cut_and_may_do_nothing_until_it_is_resumed(
    broker: TenantsBroker, stack: ExitStack
) -> None:
    known = [broker.admit_in("b") for _ in range(20)]
    clients = [stack.enter_context(broker.tls(credentials)) for _, credentials in known]
    for (identity, _), client in zip(known, clients, strict=True):
        client.connect("any", clean=False, expiry=600, will=Will(topic_of("b", identity), b"will"))
        assert may_subscribe(client, f"plant/b/{identity}/#")
    identity, credentials = known[0]
    _, watching = broker.admit_in("", "r:plant/b/#")  # by nobody's mistake: what the first tenant's might see of it
    with broker.device(watching) as watcher:
        assert may_subscribe(watcher, "plant/b/#")
        broker.tell("suspend b")
        for client in clients:
            client.wait_until_cut()
        with broker.device(credentials, clean=False, expiry=600) as device:
            assert not may_publish(device, topic_of("b", identity))
            device.wait_until_cut()
        with broker.device(known[1][1], clean=False, expiry=600) as device:
            assert device.session_present
            assert not may_subscribe(device, f"plant/b/{identity}/#")
            device.wait_until_cut()
        assert not broker.ask(f"identify/{identity}")
        watcher.ping()
        assert watcher.messages == []  # no will of theirs
    broker.tell("tenant b plant/b")
    for each, certificate in known:
        with broker.device(certificate, clean=False, expiry=600) as device:
            assert device.session_present
            assert may_publish(device, topic_of("b", each))
            assert device.receive().topic == topic_of("b", each)  # by the subscription that it had


def test_a_sleeping_session_of_a_suspended_tenant_keeps_its_subscriptions_and_gets_nothing_meanwhile(
    broker: TenantsBroker,
) -> None:
    identity, credentials = broker.admit_in("b")
    _, sending = broker.admit_in("", "w:plant/b/#")
    with broker.tls(credentials) as device, broker.device(sending) as sender:
        device.connect("any", clean=False, expiry=600)
        assert may_subscribe(device, f"plant/b/{identity}/#")
        device.close()
        for line, payload in (("generation 1", b"before"), ("suspend b", b"meanwhile"), ("tenant b plant/b", b"after")):
            broker.tell(line)
            assert sender.publish(topic_of("b", identity), payload) in DELIVERED
    with broker.device(credentials, clean=False, expiry=600) as device:
        assert device.session_present
        device.ping()
        assert [message.payload for message in device.messages] == [b"before", b"after"]


def test_what_a_suspended_tenant_has_kept_at_the_broker_is_withheld_and_not_lost(broker: TenantsBroker) -> None:
    identity, credentials = broker.admit_in("b")
    _, reading = broker.admit_in("", "r:plant/b/#")
    with broker.device(credentials) as device:
        assert device.publish(topic_of("b", identity), b"kept", retain=True) in DELIVERED
    for line, expected in (("suspend b", []), ("tenant b plant/b", [b"kept"])):
        broker.tell(line)
        with broker.device(reading) as reader:
            assert may_subscribe(reader, f"plant/b/{identity}/#")
            reader.ping()
            assert [message.payload for message in reader.messages] == expected


def test_nothing_of_another_tenants_is_lost_while_one_is_suspended_and_resumed(
    broker: TenantsBroker, stack: ExitStack
) -> None:
    theirs = [broker.admit_in("b") for _ in range(30)]
    identity, credentials = broker.admit_in("c")
    _, reading = broker.admit_in("c", "r:c/#")
    done, received, delays = threading.Event(), list[bytes](), list[float]()

    def publish(sender: MqttClient, reader: MqttClient) -> None:
        while not done.is_set():
            began = time.monotonic()
            assert sender.publish(topic_of("c", identity), b"%d" % len(received)) in DELIVERED
            received.append(reader.receive().payload)
            delays.append(time.monotonic() - began)

    with broker.device(reading) as reader, broker.device(credentials) as sender, ThreadPoolExecutor() as pool:
        assert may_subscribe(reader, "c/#")
        publishing = pool.submit(publish, sender, reader)
        try:
            for _ in range(3):
                clients = [stack.enter_context(broker.tls(each)) for _, each in theirs]
                for client, (one, _) in zip(clients, theirs, strict=True):
                    client.connect("any")
                    assert may_publish(client, topic_of("b", one))
                broker.tell("suspend b")
                for client in clients:
                    client.wait_until_cut()
                broker.tell("tenant b plant/b")
        finally:
            done.set()
        publishing.result()
    assert received == [b"%d" % number for number in range(len(received))]
    assert max(delays) < 1


def test_one_device_is_denied_at_once_while_many_of_a_suspended_tenant_are_being_cut(
    broker: TenantsBroker, stack: ExitStack
) -> None:
    theirs = [broker.admit_in("b") for _ in range(30)]
    identity, credentials = broker.admit_in("c")
    clients = [stack.enter_context(broker.tls(each)) for _, each in theirs]
    with broker.device(credentials) as device:
        for client, (one, _) in zip(clients, theirs, strict=True):
            client.connect("any")
            assert may_publish(client, topic_of("b", one))
        broker.tell("suspend b", f"deny {identity}")
        device.wait_until_cut()
    for client in clients:
        client.wait_until_cut()
    broker.tell("tenant b plant/b")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_memory_is_right_and_none_is_lost_under_valgrind(stack: ExitStack) -> None:
    folder = short_folder()
    stack.callback(shutil.rmtree, folder)
    broker = TenantsBroker(folder)
    broker.under = ("valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite")
    stack.callback(broker.stop)
    broker.start()
    for epoch in (2, 3):
        identity, credentials = broker.admit_in("b")
        other, others = broker.admit_in("c", "rw:c/#")
        with broker.device(credentials, clean=False, expiry=600) as device, broker.device(others) as neighbour:
            assert may_subscribe(device, f"plant/b/{identity}/#")
            with broker.device(broker.cas["c"].issue(str(uuid.uuid4()))) as unknown:
                assert not may_publish(unknown, topic_of("b", identity))
            with broker.device(broker.cas["b"].issue(other)) as thief:
                assert not may_publish(thief, topic_of("c", other))
            broker.tell("suspend b")
            device.wait_until_cut()
            neighbour.close()
        broker.journal.append("tenant d plant")
        assert not broker.proven()
        broker.journal = broker.new_journal(epoch)
        for line in (f"allow {identity} in:b", f"allow {other} in:b", "suspend c"):
            broker.journal.line(line)
        broker.journal.write()
        assert broker.ask(f"epoch/{epoch}")
        assert works(broker, "b", identity, credentials)
    broker.terminate()
