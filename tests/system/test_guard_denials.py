"""Devices and certificates that the journal denies: refused at once, disconnected, and heard of no more."""

from __future__ import annotations

import contextlib
import re
import ssl

import pytest

from tests.support.guard import (
    DELIVERED,
    GRANTED_QOS_1,
    GuardedBroker,
    guarded_broker,
    hash_of,
    is_admitted,
    may_publish,
    may_subscribe,
    serial_line,
)
from tests.support.mosquitto import CONFIGURATION
from tests.support.mqtt import NOT_AUTHORISED, MqttClient, Will, connect_tls, pack

pytest_plugins = ("tests.support.guard_fixtures",)
pytestmark = pytest.mark.system


# --- Denials --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["deny", "forget"])
def test_a_denied_device_is_refused_and_cut_before_the_proof_is_given(broker: GuardedBroker, word: str) -> None:
    identity, credentials = broker.admit()
    with broker.device(credentials) as device:
        assert may_publish(device, f"devices/{identity}/x")
        broker.tell(f"{word} {identity}")
        device.wait_until_cut()
    with broker.device(credentials) as device:
        assert not may_publish(device, f"devices/{identity}/x")
        device.wait_until_cut()
    with broker.device(credentials) as device, contextlib.suppress(ConnectionError):  # if it was cut before
        assert not may_subscribe(device, f"devices/{identity}/#")
    broker.tell(f"allow {identity}")
    assert is_admitted(broker, identity, credentials)


def test_a_denied_publisher_of_mqtt_3_is_ended_before_it_is_told_that_its_message_was_taken(
    broker: GuardedBroker,
) -> None:
    identity, credentials = broker.admit()
    _, reader_credentials = broker.admit("r:devices/#")
    broker.tell(f"deny {identity}")
    with broker.device(reader_credentials) as reader:
        assert may_subscribe(reader, f"devices/{identity}/#")
        for _ in range(3):
            with broker.tls(credentials, version=4) as device:
                device.connect("any", will=Will(f"devices/{identity}/will", b"x"))
                with pytest.raises(ConnectionError, match=r"closed|reset"):
                    device.publish(f"devices/{identity}/x")
        reader.ping()
        assert reader.messages == []
    broker.tell(f"allow {identity}")
    with broker.tls(credentials, version=4) as device:
        device.connect("any")
        assert device.publish(f"devices/{identity}/x") == 0
        assert device.publish("devices/of/another") == 0  # one that may do something keeps its connection
        device.ping()


def test_a_denial_is_read_without_being_asked_for(broker: GuardedBroker) -> None:
    identity, credentials = broker.admit()
    with broker.device(credentials) as device:
        broker.journal.append(f"deny {identity}")
        device.wait_until_cut()


def test_a_device_that_was_connected_and_silent_is_cut(broker: GuardedBroker) -> None:
    identity, credentials = broker.admit()
    with broker.device(credentials) as device:
        broker.tell(f"deny {identity}")
        device.wait_until_cut()


def test_a_device_that_loses_a_filter_is_cut_and_one_that_gains_some_is_not(broker: GuardedBroker) -> None:
    loser, loser_credentials = broker.admit("rw:a/#", "r:b/+")
    winner, winner_credentials = broker.admit("r:a/b", "r:b/c")
    with broker.device(loser_credentials) as losing, broker.device(winner_credentials) as winning:
        broker.tell(f"allow {winner} r:a/# rw:b/+", f"allow {loser} r:a/# r:b/+")
        losing.wait_until_cut()
        assert may_publish(winning, "b/x")


def test_a_denied_device_gets_nothing_from_a_subscription_it_has(broker: GuardedBroker) -> None:
    identity, credentials = broker.admit("r:news/#")
    _, sender_credentials = broker.admit("w:news/#")
    with broker.tls(credentials) as device, broker.device(sender_credentials) as sender:
        device.connect("any", clean=False, expiry=600)
        assert may_subscribe(device, "news/#")
        device.drop()
        broker.wait_until_closed(identity)
        broker.tell(f"deny {identity}")
        sender.publish("news/secret")
        broker.tell(f"allow {identity} r:news/#")
        sender.publish("news/open")
        with broker.tls(credentials) as again:
            again.connect("any", clean=False, expiry=600)
            assert again.session_present
            assert again.receive().topic == "news/open"


def test_the_will_of_a_denied_device_is_not_published(broker: GuardedBroker) -> None:
    identity, credentials = broker.admit()
    _, reader_credentials = broker.admit("r:devices/#")
    with broker.device(reader_credentials) as reader, broker.tls(credentials) as device:
        assert may_subscribe(reader, f"devices/{identity}/#")
        device.connect("any", will=Will(f"devices/{identity}/will", b"x"))
        broker.tell(f"deny {identity}")
        device.wait_until_cut()
        reader.ping()
        assert reader.messages == []


def test_retained_messages_of_a_denied_device_are_withheld(broker: GuardedBroker) -> None:
    identity, credentials = broker.admit()
    _, reader_credentials = broker.admit("r:devices/#")
    with broker.device(credentials) as device:
        device.publish(f"devices/{identity}/state", retain=True)
    with broker.device(reader_credentials) as reader:
        reader.subscribe(f"devices/{identity}/#")
        assert reader.receive().topic == f"devices/{identity}/state"
    broker.tell(f"deny {identity}")
    with broker.device(reader_credentials) as reader:
        reader.subscribe(f"devices/{identity}/#")
        reader.ping()
        assert reader.messages == []


def test_the_portal_clears_the_retained_messages_of_denied_devices_and_no_others(broker: GuardedBroker) -> None:
    (identity, credentials), (other, other_credentials) = broker.admit(), broker.admit()
    with broker.device(credentials) as device, broker.device(other_credentials) as others:
        for topic in ("state", "a/b"):
            device.publish(f"devices/{identity}/{topic}", retain=True)
        others.publish(f"devices/{other}/state", retain=True)
    with broker.portal() as portal:
        assert not may_subscribe(portal, f"devices/{identity}/#")
    broker.tell(f"deny {identity}")
    with broker.portal(client_id=identity) as portal:
        for filter_ in ("devices/#", "devices/+/#", f"devices/{other}/#", f"$share/g/devices/{identity}/#", "#"):
            assert not may_subscribe(portal, filter_), filter_
        assert may_subscribe(portal, f"devices/{identity}/#")
        portal.ping()
        assert portal.messages == []  # it is not told what they said
    broker.tell(f"allow {identity}")
    _, reader_credentials = broker.admit("r:devices/#")
    with broker.device(reader_credentials) as reader:
        reader.subscribe(f"devices/{identity}/#")
        reader.subscribe(f"devices/{other}/#")
        assert reader.receive().topic == f"devices/{other}/state"
        reader.ping()
        assert reader.messages == []


def test_one_device_cannot_fill_the_brokers_memory_nor_keep_it_from_starting() -> None:
    largest = re.search(r"^max_packet_size .*$", CONFIGURATION.read_text(), re.MULTILINE)
    assert largest is not None
    with guarded_broker(f"memory_limit {32 << 20}\n{largest[0]}") as broker:
        (identity, credentials), (other, other_credentials) = broker.admit(), broker.admit()
        with broker.device(credentials) as device, pytest.raises((ConnectionError, ssl.SSLError)):
            device.publish(f"devices/{identity}/x", bytes(1_000_000), retain=True)
        with broker.device(credentials) as device, broker.device(other_credentials) as others:
            topics = (f"devices/{identity}/{number}" for number in range(300))
            kept = sum(device.publish(topic, bytes(250_000), retain=True) in DELIVERED for topic in topics)
            assert 32 <= kept <= 67
            while device.publish(f"devices/{identity}/{kept}", bytes(20_000), retain=True) in DELIVERED:
                kept += 1
            assert may_publish(device, f"devices/{identity}/x")  # others, and what is not kept, are taken
            assert may_publish(others, f"devices/{other}/x")
            assert may_subscribe(others, f"devices/{other}/#")
        with broker.tls(credentials) as device:
            device.connect("any", will=Will(f"devices/{identity}/will", bytes(60_000), retain=True))
            device.drop()
            broker.wait_until_closed(identity)
        with broker.device(credentials) as device:
            assert may_subscribe(device, f"devices/{identity}/will")
            assert may_subscribe(device, f"devices/{identity}/0")
            assert device.receive().topic == f"devices/{identity}/0"  # what is kept is still handed on
            device.ping()
            assert device.messages == []
        broker.terminate()
        broker.start()
        assert is_admitted(broker, identity, credentials)
        broker.tell(f"deny {identity}")
        with broker.portal(client_id=identity) as portal:
            assert may_subscribe(portal, f"devices/{identity}/#")
        with broker.device(other_credentials) as others:
            assert others.publish(f"devices/{other}/x", retain=True) in DELIVERED


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_a_device_that_has_the_broker_search_too_much_is_refused_and_nobody_else(broker: GuardedBroker) -> None:
    (identity, credentials), (other, other_credentials) = broker.admit(), broker.admit()
    granted = 0
    for _ in range(2):  # a new connection does not begin anew
        with broker.device(credentials) as device:
            codes = device.subscribe_all(["devices/#"] * 40)
            assert set(codes) <= {GRANTED_QOS_1, NOT_AUTHORISED}
            granted += codes.count(GRANTED_QOS_1)
            assert may_publish(device, f"devices/{identity}/x")
    assert 4 <= granted <= 8  # in 30 seconds, which may end here
    assert f"device {identity} has sent too many" in broker.log
    with broker.device(other_credentials) as others, broker.portal() as portal:
        assert set(others.subscribe_all([f"devices/{other}/{number}/#" for number in range(64)])) == {GRANTED_QOS_1}
        assert set(portal.subscribe_all(["portal/guard/#"] * 300)) == {GRANTED_QOS_1}


def test_a_device_leaves_as_many_retained_messages_as_it_may() -> None:
    with guarded_broker("plugin_opt_max_retained 3") as broker:
        (identity, credentials), (other, other_credentials) = broker.admit(), broker.admit()
        with broker.device(credentials) as device, broker.device(other_credentials) as others:
            for topic in ("a", "b", "c", "a"):
                assert device.publish(f"devices/{identity}/{topic}", retain=True) in DELIVERED
            assert device.publish(f"devices/{identity}/d", retain=True) == NOT_AUTHORISED
            assert f"device {identity} has left as many as it may" in broker.log
            assert may_publish(device, f"devices/{identity}/d")  # what is not kept is taken
            assert others.publish(f"devices/{other}/a", retain=True) in DELIVERED
            assert device.publish(f"devices/{identity}/b", b"", retain=True) in DELIVERED
            assert device.publish(f"devices/{identity}/d", retain=True) in DELIVERED
            assert device.publish(f"devices/{identity}/b", retain=True) == NOT_AUTHORISED


def test_very_many_retained_messages_are_cleared_in_parts_and_the_log_says_it_once() -> None:
    with guarded_broker("plugin_opt_max_retained 20000") as broker:
        identity, credentials = broker.admit()
        with broker.device(credentials) as device:
            packets = [pack(0x31, f"devices/{identity}/{number}", b"\0x") for number in range(10_049)]
            device.socket.sendall(b"".join(packets))
            assert device.publish(f"devices/{identity}/last", retain=True) in DELIVERED
        for left in (50, 0):
            broker.tell(f"deny {identity}")
            with broker.portal(client_id=identity) as portal:
                assert may_subscribe(portal, f"devices/{identity}/#")
                portal.ping()
            broker.tell(f"allow {identity}")
            with broker.device(credentials) as device:
                assert may_subscribe(device, f"devices/{identity}/#")
                device.ping()
                assert len(device.messages) == left
        assert broker.log.count("others are left") == 1


# --- Serial numbers ---------------------------------------------------------------------------------------------------


def test_a_superseded_certificate_is_refused_and_cut_and_the_new_one_stays(broker: GuardedBroker) -> None:
    identity, old = broker.admit()
    new = broker.issue(identity)
    with broker.device(old) as device:
        assert may_publish(device, f"devices/{identity}/x")
        broker.tell(serial_line(broker, "serial", identity, old))
        device.wait_until_cut()
    with broker.device(new) as device:
        assert may_publish(device, f"devices/{identity}/x")
        with broker.device(old) as intruder:  # takes the session over, and may do nothing
            assert not may_publish(intruder, f"devices/{identity}/x")
            intruder.wait_until_cut()
    broker.tell(serial_line(broker, "unserial", identity, old))
    assert is_admitted(broker, identity, old)


def test_a_superseded_publisher_of_mqtt_3_is_ended_alone(broker: GuardedBroker) -> None:
    identity, old = broker.admit()
    new = broker.issue(identity)
    broker.tell(serial_line(broker, "serial", identity, old))
    for _ in range(5):
        with broker.tls(old, version=4) as thief:
            thief.connect("any", will=Will(f"devices/{identity}/will", b"x"))
            with pytest.raises(ConnectionError):
                thief.publish(f"devices/{identity}/x")
        with broker.device(new) as device:
            assert may_subscribe(device, f"devices/{identity}/#")
            broker.tell("generation 1")  # who waits to be disconnected now is
            assert may_publish(device, f"devices/{identity}/x")
            assert device.receive().topic == f"devices/{identity}/x"


def test_a_renewed_device_is_not_cut_when_its_previous_certificate_is_revoked(broker: GuardedBroker) -> None:
    identity, old = broker.admit()
    with broker.device(broker.issue(identity)) as device:
        assert may_publish(device, f"devices/{identity}/x")
        broker.tell(serial_line(broker, "serial", identity, old))
        assert may_publish(device, f"devices/{identity}/x")


def test_a_silent_connection_with_a_superseded_certificate_is_cut(broker: GuardedBroker) -> None:
    identity, old = broker.admit()
    with broker.device(old) as device:
        broker.tell(serial_line(broker, "serial", identity, old))
        device.wait_until_cut()


def test_a_device_whose_old_certificate_is_revoked_keeps_its_session_with_subscriptions(broker: GuardedBroker) -> None:
    identity, old = broker.admit()
    with broker.tls(old) as device:
        device.connect("any", clean=False, expiry=600)
        assert may_subscribe(device, f"devices/{identity}/#")
        broker.tell(serial_line(broker, "serial", identity, old))
        device.wait_until_cut()
    _, sender_credentials = broker.admit("w:devices/#")
    with broker.device(sender_credentials) as publisher:
        publisher.publish(f"devices/{identity}/command")
    with broker.tls(broker.issue(identity)) as device:
        device.connect("any", clean=False, expiry=600)
        assert device.session_present
        assert device.receive().topic == f"devices/{identity}/command"


def test_a_serial_number_counts_for_its_issuer_alone(broker: GuardedBroker) -> None:
    identity, credentials = broker.admit()
    other = hash_of(broker.pki.root.certificate.subject)
    broker.tell(f"serial {other} {credentials.certificate.serial_number:x} {identity}")
    assert is_admitted(broker, identity, credentials)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_resumed_tls_session_shows_its_certificate(broker: GuardedBroker, version: str) -> None:
    identity, credentials = broker.admit()
    context = broker.context(credentials)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with MqttClient(connect_tls(broker.port, context)) as device:
        device.connect("any")
        assert may_publish(device, f"devices/{identity}/x")
        assert isinstance(device.socket, ssl.SSLSocket)
        session = device.socket.session
    with MqttClient(connect_tls(broker.port, context, session)) as device:
        assert isinstance(device.socket, ssl.SSLSocket)
        assert device.socket.session_reused
        device.connect("any")
        assert may_publish(device, f"devices/{identity}/x")
        broker.tell(serial_line(broker, "serial", identity, credentials))
        device.wait_until_cut()
    with MqttClient(connect_tls(broker.port, context, session)) as device:
        assert isinstance(device.socket, ssl.SSLSocket)
        assert device.socket.session_reused
        device.connect("any")
        assert not may_publish(device, f"devices/{identity}/x")


@pytest.mark.parametrize("delay", [0, 1])
def test_the_will_of_a_superseded_certificate_is_not_published(broker: GuardedBroker, delay: int) -> None:
    identity, old = broker.admit()
    _, reader_credentials = broker.admit("r:devices/#")
    broker.tell(serial_line(broker, "serial", identity, old))
    with broker.device(reader_credentials) as reader, broker.tls(old) as thief:
        assert may_subscribe(reader, f"devices/{identity}/#")
        thief.connect("any", expiry=60 * delay, will=Will(f"devices/{identity}/will", b"x", delay))
        thief.drop()
        broker.wait_until_closed(identity)
        with broker.tls(broker.issue(identity)) as device:  # ends a will that waits
            device.connect("any", expiry=0)
            assert may_publish(device, f"devices/{identity}/x")
        assert [reader.receive().topic] == [f"devices/{identity}/x"]
        reader.ping()
        assert reader.messages == []
