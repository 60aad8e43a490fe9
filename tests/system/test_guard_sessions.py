"""Sleeping sessions are decided for by the guard; the portal asks it, and is told who is connected."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.guard import (
    PASSWORD,
    GuardedBroker,
    Journal,
    guarded_broker,
    is_admitted,
    may_publish,
    may_subscribe,
    serial_line,
)
from tests.support.mqtt import NOT_AUTHORISED, MqttClient, Will, connect_socket
from tests.support.pki import Credentials

pytest_plugins = ("tests.support.guard_fixtures",)
pytestmark = pytest.mark.system


# --- Sleeping sessions ------------------------------------------------------------------------------------------------


@contextmanager
def asleep(broker: GuardedBroker, filter_: str = "", *, version: int = 5) -> Iterator[tuple[str, Credentials]]:
    """A device that has subscribed to its topics and gone to sleep, with what it needs to wake."""
    identity, credentials = broker.admit()
    with broker.tls(credentials, version=version) as device:
        assert device.connect("any", clean=False, expiry=3600) == 0
        assert may_subscribe(device, filter_ or f"devices/{identity}/#")
    yield identity, credentials


def wake(broker: GuardedBroker, credentials: Credentials, *, version: int = 5) -> list[bytes]:
    """What has waited for a sleeping device."""
    with broker.tls(credentials, version=version) as device:
        assert device.connect("any", clean=False, expiry=3600) == 0
        assert device.session_present
        device.ping()
        return [message.payload for message in device.messages]


@contextmanager
def sender_of(broker: GuardedBroker) -> Iterator[MqttClient]:
    _, credentials = broker.admit("w:devices/#")
    with broker.device(credentials) as sender:
        yield sender


@pytest.mark.parametrize("version", [4, 5])
def test_messages_to_a_sleeping_device_are_kept_across_denials_of_others(broker: GuardedBroker, version: int) -> None:
    with asleep(broker, version=version) as (identity, credentials), sender_of(broker) as sender:
        for number in range(20):
            other, other_credentials = broker.admit()
            with broker.device(other_credentials) as device:
                broker.tell(f"deny {other}")
                device.wait_until_cut()
            assert sender.publish(f"devices/{identity}/command", b"%d" % number) == 0
        assert wake(broker, credentials, version=version) == [b"%d" % number for number in range(20)]


def test_a_sleeping_device_that_is_denied_is_sent_nothing(broker: GuardedBroker) -> None:
    with asleep(broker) as (identity, credentials), sender_of(broker) as sender:
        broker.tell(f"deny {identity}")
        sender.publish(f"devices/{identity}/command", b"secret")
        broker.tell(f"allow {identity}")
        sender.publish(f"devices/{identity}/command", b"open")
        assert wake(broker, credentials) == [b"open"]


def test_a_sleeping_device_is_decided_for_by_its_name_though_that_is_no_uuid(broker: GuardedBroker) -> None:
    name = f"application-{uuid.uuid4().hex}"
    broker.tell(f"allow {name} r:devices/#")
    credentials = broker.issue(name)
    with sender_of(broker) as sender:
        with broker.tls(credentials) as application:
            application.connect("any", clean=False, expiry=3600)
            assert may_subscribe(application, "devices/+/up")
        sender.publish("devices/x/up", b"kept")
        assert wake(broker, credentials) == [b"kept"]


def test_a_sleeping_session_that_a_new_epoch_does_not_know_is_not_left_to_the_acl_file() -> None:
    with guarded_broker(start=False) as broker:
        acl = broker.root / "acl"
        acl.write_text("pattern readwrite #\n")
        acl.chmod(0o644)
        broker.extra = f"acl_file {acl}\n"
        broker.start()
        broker.tell("allow telegraf r:devices/#")
        credentials = broker.issue("telegraf")
        with broker.tls(credentials) as application:
            application.connect("any", clean=False, expiry=3600)
            assert may_subscribe(application, "devices/#")
        for epoch, line in ((2, "generation 1"), (3, "allow telegraf r:devices/#")):
            broker.journal = broker.new_journal(epoch)
            broker.journal.line(line)
            broker.journal.write()
            assert broker.ask(f"epoch/{epoch}")
            with sender_of(broker) as sender:
                sender.publish("devices/x", b"in epoch %d" % epoch)
        assert wake(broker, credentials) == [b"in epoch 3"]


@pytest.mark.parametrize("version", [4, 5])
def test_sleeping_devices_and_their_messages_survive_a_restart_of_the_broker(version: int) -> None:
    with guarded_broker() as broker:
        with asleep(broker, version=version) as (identity, credentials), sender_of(broker) as sender:
            sender.publish(f"devices/{identity}/command", b"before")
        broker.terminate()
        broker.start()
        with sender_of(broker) as sender:
            sender.publish(f"devices/{identity}/command", b"after")
        assert wake(broker, credentials, version=version) == [b"before", b"after"]
        broker.terminate()


def test_the_broker_ends_with_status_0_after_denials_of_sleeping_and_of_live_devices() -> None:
    with guarded_broker() as broker:
        for _ in range(10):
            with asleep(broker) as (sleeper, _), broker.device(broker.admit()[1]) as live:
                broker.tell(f"deny {sleeper}")
                with broker.portal(client_id=sleeper):  # as the portal ends stored sessions
                    pass
                identity, credentials = broker.admit()
                with broker.tls(credentials) as device:
                    device.connect("any", clean=False, expiry=3600)
                    assert may_publish(device, f"devices/{identity}/x")
                    broker.tell(f"deny {identity}")
                    device.wait_until_cut()
                live.ping()
        broker.terminate()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_memory_is_right_and_none_is_lost_under_valgrind() -> None:
    with guarded_broker(start=False) as broker:
        broker.under = ("valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite")
        broker.start()
        live, live_credentials = broker.admit()
        staying = broker.tls(live_credentials)
        assert staying.connect("any") == 0
        for epoch in range(2, 5):
            assert may_publish(staying, f"devices/{live}/x")
            with asleep(broker) as (sleeper, credentials), broker.portal() as portal, sender_of(broker) as sender:
                assert may_publish(portal, "portal/guard/report")
                for _ in range(5):
                    identity, own = broker.admit("rw:a/#", "r:devices/+/x")
                    with broker.device(own, will=Will("a/will", b"x")) as device:
                        assert may_publish(device, "a/b")
                        assert may_subscribe(device, "$share/g/devices/+/x")
                        sender.publish(f"devices/{sleeper}/x")
                        broker.tell(serial_line(broker, "serial", identity, own), f"deny {identity}")
                        device.wait_until_cut()
                    assert not is_admitted(broker, identity, own)
                broker.journal.path.write_bytes(broker.journal.content[:-5] + b"wrong\n")
                broker.wait_for_log("Every device is denied", times=2 * epoch - 3)
                broker.journal.path.write_bytes(b"")
                assert not broker.proven()
                journal = broker.new_journal(epoch)
                journal.line(f"allow {sleeper}")
                journal.line(f"allow {live}")
                broker.journal = journal.write()
                assert broker.ask(f"epoch/{epoch}")
                assert len(wake(broker, credentials)) == 5
        assert may_publish(staying, f"devices/{live}/x")
        staying.close()
        broker.terminate()


# --- What the portal asks, and is told --------------------------------------------------------------------------------


def test_proofs_are_of_the_epoch_in_force_and_of_lines_that_were_read(broker: GuardedBroker) -> None:
    broker.tell("generation 1")
    sequence = broker.journal.sequence
    assert broker.ask(f"prove/1/{sequence}")
    assert broker.ask("prove/1/0")
    for question in (
        f"prove/1/{sequence + 1}", f"prove/0/{sequence}", f"prove/01/{sequence}", f"prove/1/{sequence}/", "prove/1",
        "prove/1/-1", "prove/1/x", "prove", f"prove/1/{1 << 64}", "refused", "unknown", "version/5", "version",
        "version/1", "epoch/x", f"identify/{uuid.uuid4()}", "identify", "identify/a/b", "x" * 500,
    ):  # fmt: skip
        assert not broker.ask(question)
    assert broker.ask("version/2")


def test_an_identity_is_identified_while_it_is_allowed(broker: GuardedBroker) -> None:
    identity, _ = broker.admit()
    assert broker.ask(f"identify/{identity}")
    broker.tell(f"deny {identity}")
    assert not broker.ask(f"identify/{identity}")


def test_the_newest_password_counts_at_once_and_under_damage(own_broker: GuardedBroker) -> None:
    own_broker.journal.append(f"portal {hashlib.sha256(b'second').hexdigest()}")
    content = own_broker.journal.content
    with own_broker.portal(password="second"):
        own_broker.journal.path.write_bytes(b"")
        own_broker.wait_for_log("Every device is denied")
    with MqttClient(connect_socket(own_broker.socket)) as portal:
        assert portal.connect("any", username="portal", password=PASSWORD) == NOT_AUTHORISED
    with own_broker.portal(password="second") as portal:
        assert not may_publish(portal, f"portal/guard/prove/1/{own_broker.journal.sequence}")
        own_broker.journal.path.write_bytes(content)
        assert may_publish(portal, f"portal/guard/prove/1/{own_broker.journal.sequence}")


def test_the_portal_confirms_a_new_epoch_with_the_password_that_stands_in_it(own_broker: GuardedBroker) -> None:
    journal = Journal(own_broker.journal.path, epoch=2)
    journal.line(f"portal {hashlib.sha256(b'restored').hexdigest()}")
    journal.write()
    with own_broker.portal(password="restored") as portal:
        assert may_publish(portal, "portal/guard/epoch/2")
    with MqttClient(connect_socket(own_broker.socket)) as portal:
        assert portal.connect("any", username="portal", password=PASSWORD) == NOT_AUTHORISED


def presence(portal: MqttClient) -> tuple[set[str], set[str]]:
    """Who has connected and who has disconnected, by the next message of the guard's."""
    message = portal.receive()
    assert message.topic == "portal/guard/presence"
    batch = json.loads(message.payload)
    return {name for name, _ in batch.get("connected", [])}, {name for name, _ in batch.get("disconnected", [])}


def test_the_portal_is_told_who_is_connected_and_what_changes(own_broker: GuardedBroker) -> None:
    one, one_credentials = own_broker.admit()
    two, two_credentials = own_broker.admit()
    with own_broker.device(one_credentials) as device, own_broker.portal() as portal:
        assert may_publish(device, f"devices/{one}/x")
        assert may_publish(portal, "portal/guard/report")
        lines = [json.loads(line) for line in portal.receive().payload.splitlines()]
        assert lines[0] == {"epoch": 1, "seq": own_broker.journal.sequence, "begin": True}
        assert lines[-1] == {"end": True}
        ((name, since),) = lines[1]["connected"]
        assert name == one
        assert time.time() - 60 < since < time.time() + 60
        with own_broker.device(two_credentials) as other:
            assert may_publish(other, f"devices/{two}/x")
            assert presence(portal) == ({two}, set())
        assert presence(portal) == (set(), {two})
        own_broker.tell(f"deny {one}")
        assert presence(portal) == (set(), {one})


def test_a_device_that_comes_back_at_once_is_told_as_connected(own_broker: GuardedBroker) -> None:
    identity, credentials = own_broker.admit()
    with own_broker.portal() as portal:
        assert may_publish(portal, "portal/guard/report")
        portal.receive()
        with own_broker.device(credentials) as device:
            assert may_publish(device, f"devices/{identity}/x")
            assert presence(portal) == ({identity}, set())
            with own_broker.device(credentials) as again:  # takes the session over
                assert may_publish(again, f"devices/{identity}/x")
                state: set[str] = set()
                while state != {identity}:
                    connected, disconnected = presence(portal)
                    state = (state | connected) - disconnected


def test_a_refused_device_is_not_told_as_connected(own_broker: GuardedBroker) -> None:
    with own_broker.portal() as portal:
        with own_broker.device(own_broker.issue(str(uuid.uuid4()))) as device:
            assert not may_publish(device, "devices/x")
            assert may_publish(portal, "portal/guard/report")
            assert b'"connected":[]' in portal.receive().payload
            device.wait_until_cut()
        portal.ping()
        assert portal.messages == []


def test_a_large_report_comes_in_parts(own_broker: GuardedBroker) -> None:
    names = [f"{'x' * 50}-{number}" for number in range(20)]
    own_broker.tell(*(f"allow {name}" for name in names))
    with contextlib.ExitStack() as stack:
        for name in names:
            device = stack.enter_context(own_broker.device(own_broker.issue(name)))
            assert may_publish(device, f"devices/{name}/x")
        portal = stack.enter_context(own_broker.portal())
        assert may_publish(portal, "portal/guard/report")
        lines = [json.loads(line) for line in portal.receive().payload.splitlines()]
        assert sorted(name for line in lines for name, _ in line.get("connected", [])) == sorted(names)


def test_refusals_are_logged_some_times_and_no_secret_is(own_broker: GuardedBroker) -> None:
    for _ in range(40):
        with MqttClient(connect_socket(own_broker.socket)) as client:
            assert client.connect("any", username="portal", password="a guessed password") == NOT_AUTHORISED
    own_broker.tell("generation 1")
    assert 1 <= own_broker.log.count("has not shown its password") <= 20
    assert "guessed" not in own_broker.log
    assert PASSWORD not in own_broker.log
