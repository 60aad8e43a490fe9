"""The guard reads what was appended to the journal before it refuses somebody, though nobody has asked it to.

It reads every 50 to 150 ms by itself, so each test does the same several times: a guard that waited for that fails it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.support.guard import (
    GuardedBroker,
    guarded_broker,
    hash_of,
    key_hashes_of,
    may_publish,
    may_subscribe,
)
from tests.support.mqtt import NOT_AUTHORISED, MqttClient, connect_socket, connect_tls, tls_context
from tests.support.pki import PEM, Authority

pytest_plugins = ("tests.support.guard_fixtures",)
pytestmark = pytest.mark.system

TIMES = 12


def strangers(broker: GuardedBroker, version: int = 5) -> Iterator[tuple[str, MqttClient]]:
    """Devices of which the journal does not know, with a TLS connection each: CONNECT is still to be sent."""
    for _ in range(TIMES):
        identity = str(uuid.uuid4())
        with broker.tls(broker.issue(identity), version=version) as client:
            yield identity, client


def subscribes(client: MqttClient, identity: str) -> bool:
    return may_subscribe(client, f"devices/{identity}/#")


def publishes(client: MqttClient, identity: str) -> bool:
    return may_publish(client, f"devices/{identity}/x")


@pytest.mark.parametrize("uses", [subscribes, publishes])
@pytest.mark.parametrize("version", [4, 5])
def test_a_device_may_do_all_from_the_moment_when_its_line_was_written(
    broker: GuardedBroker, version: int, uses: Callable[[MqttClient, str], bool]
) -> None:
    for identity, client in strangers(broker, version):
        broker.journal.append(f"allow {identity}")
        assert client.connect("any") == 0
        assert uses(client, identity)
        client.ping()  # it is not cut for what was thought of it before


def test_a_device_that_was_denied_may_do_all_from_the_line_that_allows_it(broker: GuardedBroker) -> None:
    identity, credentials = broker.admit()
    for _ in range(TIMES):
        broker.tell(f"deny {identity}")
        with broker.tls(credentials) as client:
            broker.journal.append(f"allow {identity}")
            assert client.connect("any") == 0
            assert publishes(client, identity)


def test_a_device_is_denied_by_a_line_that_was_written_together_with_an_earlier_one(broker: GuardedBroker) -> None:
    for identity, client in strangers(broker):
        broker.journal.append(f"allow {identity}", f"deny {identity}")
        assert client.connect("any") == 0
        assert not publishes(client, identity)
        client.wait_until_cut()


def test_a_ca_is_known_from_the_moment_when_its_line_was_written(broker: GuardedBroker) -> None:
    for number in range(TIMES):
        other, identity = Authority(f"Another CA {number}", issuer=broker.pki.root), str(uuid.uuid4())
        certificate, key = other.issue(identity).write(broker.root, uuid.uuid4().hex)
        certificate.write_bytes(certificate.read_bytes() + other.certificate.public_bytes(PEM))
        with MqttClient(connect_tls(broker.port, tls_context(broker.ca, certificate, key))) as client:
            names = (hash_of(other.certificate.subject), *key_hashes_of(other))
            broker.journal.append(*(f"issuer {each}" for each in names), f"allow {identity}")
            assert client.connect("any") == 0
            assert publishes(client, identity)


def test_a_damaged_line_denies_a_device_that_the_one_before_it_allows() -> None:
    with guarded_broker() as broker:
        for identity, client in strangers(broker):
            good = broker.journal.line(f"allow {identity}")
            with broker.journal.path.open("ab") as file:
                file.write(good + b"9 deny nobody 00000000\n")
            assert client.connect("any") == 0
            assert not publishes(client, identity)
            broker.journal.write()
            assert broker.proven()


@pytest.fixture
def open_broker() -> Iterator[GuardedBroker]:
    """A broker that lets in everybody who calls himself something else than a device."""
    with guarded_broker("allow_anonymous true") as broker:
        yield broker


def test_a_name_is_a_devices_from_the_moment_when_its_line_was_written(open_broker: GuardedBroker) -> None:
    for _ in range(TIMES):
        identity = str(uuid.uuid4())
        for taken in (False, True):
            with MqttClient(connect_socket(open_broker.socket)) as client:
                assert (client.connect(identity) == NOT_AUTHORISED) is taken
            open_broker.journal.append(f"allow {identity}")


def test_a_line_that_takes_away_is_read_with_the_one_that_somebody_else_waits_for(broker: GuardedBroker) -> None:
    for identity, client in strangers(broker):
        old, credentials = broker.admit()
        with broker.device(credentials) as device:
            assert publishes(device, old)
            broker.journal.append(f"deny {old}", f"allow {identity}")
            assert client.connect("any") == 0
            assert publishes(client, identity)
            assert not publishes(device, old)  # one that was admitted is judged anew once a line was read
            device.wait_until_cut()
