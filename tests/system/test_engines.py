"""What every engine of the broker must do for its devices, whichever it is; and what one of them cannot, said where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.support.deployment import wait_until
from tests.support.engines import ENGINES, SUBSCRIBED, Engine, Member, engine
from tests.support.mqtt import MqttClient, Will

pytestmark = pytest.mark.system
# A node of RabbitMQ takes 10 s to stop and start, and says every 5 s who is connected.
LONG_AT_RABBITMQ = pytest.mark.parametrize(
    "site",
    [pytest.param(name, marks=[pytest.mark.long] if name == "rabbitmq" else []) for name in ENGINES],
    indirect=True,
)


@pytest.fixture(scope="module", params=ENGINES)
def site(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A portal and a broker that the tests share; each makes clients of its own."""
    with engine(request.param) as running:
        yield running


def echo(client: MqttClient, member: Member) -> list[bytes]:
    """Send the client a message of its own, to a topic that it has subscribed to; return what came until then."""
    client.publish(member.topic("echo"), b"echo")
    received: list[bytes] = []
    while (payload := client.receive().payload) != b"echo":
        received.append(payload)
    return received


# --- Topics --------------------------------------------------------------------------------------------------------


def test_a_device_uses_its_own_topics_and_reaches_no_others(site: Engine) -> None:
    device, other = site.device(), site.device()
    with other.connected() as victim:
        assert victim.subscribe(other.topic("#")) == SUBSCRIBED
        with device.connected() as client:
            assert client.subscribe(device.topic("#")) == SUBSCRIBED
            assert echo(client, device) == []
            for topic in (other.topic("x"), "elsewhere"):
                with suppress(ConnectionError), device.connected() as intruder:  # RabbitMQ ends it
                    intruder.publish(topic, b"foreign")
        for pattern in (other.topic("#"), "devices/#", "#", "+/+/+"):
            with suppress(ConnectionError), device.connected() as intruder:
                intruder.subscribe(pattern)  # files grant it, and deliver nothing
                intruder.subscribe(device.topic("#"))
                victim.publish(other.topic("x"), b"secret")
                assert victim.receive().payload == b"secret"
                assert echo(intruder, device) == []
        assert echo(victim, other) == []


def test_an_application_reads_what_all_devices_send_and_sends_nothing(site: Engine) -> None:
    if not site.is_by_journal:
        with pytest.raises(AssertionError, match="guard_needed"):
            site.application(("devices/#", "read"))
        return
    device, application = site.device(), site.application(("devices/#", "read"))
    with application.connected() as reader, device.connected() as client:
        assert reader.subscribe("devices/#") == SUBSCRIBED
        assert client.subscribe(device.topic("#")) == SUBSCRIBED
        client.publish(device.topic("x"), b"reading")
        assert reader.receive().payload == b"reading"
        assert echo(client, device) == [b"reading"]
        with suppress(ConnectionError):
            reader.publish(device.topic("x"), b"foreign")
        assert echo(client, device) == []


def test_topics_that_a_device_has_lost_are_out_of_its_reach_once_that_is_enforced(site: Engine) -> None:
    both = [("devices/{id}/#", "readwrite"), ("devices/line/#", "readwrite")]
    device, other = site.device(*both), site.device(*both)
    if not site.is_by_journal:  # Mosquitto reads an ACL when it starts
        site.restart()
    with device.connected(clean=False) as client, other.connected() as stays:
        for subscribed, member in ((client, device), (stays, other)):
            assert subscribed.subscribe(member.topic("#")) == SUBSCRIBED
            assert subscribed.subscribe("devices/line/#") == SUBSCRIBED
        client.publish("devices/line/x", b"shared")
        assert {client.receive().payload, stays.receive().payload} == {b"shared"}
        said = site.change(device, both[0])
        assert said == ("enforced" if site.is_by_journal else "pending")
        if site.is_by_journal:
            client.wait_until_cut()
    if not site.is_by_journal:
        site.restart()
        wait_until(lambda: site.deployment.call("GET", f"/devices/{device.id}").json()["broker"] == "enforced")
    with other.connected() as stays, device.connected(clean=False) as client:
        assert stays.subscribe("devices/line/#") == SUBSCRIBED
        assert stays.subscribe(other.topic("#")) == SUBSCRIBED
        assert client.subscribe(device.topic("#")) == SUBSCRIBED
        stays.publish("devices/line/x", b"secret")
        assert stays.receive().payload == b"secret"
        assert echo(client, device) == []
        with suppress(ConnectionError):
            client.publish("devices/line/x", b"foreign")
        assert echo(stays, other) == []


# --- Denied --------------------------------------------------------------------------------------------------------


def test_a_device_that_is_revoked_is_cut_off_and_never_comes_back(site: Engine) -> None:
    device, other = site.device(), site.device()
    with device.connected() as client, other.connected() as stays:
        assert client.subscribe(device.topic("#")) == SUBSCRIBED
        assert echo(client, device) == []
        site.revoke(device)
        assert not device.is_admitted()  # from the answer on, nothing is waited for
        client.wait_until_cut()
        stays.ping()
    assert other.is_admitted()


def test_what_waits_for_a_sleeping_device_is_gone_once_it_is_revoked(site: Engine) -> None:
    device = site.device()
    with device.connected(clean=False) as client:
        assert client.subscribe(device.topic("#")) == SUBSCRIBED
    assert site.keeps_session(device)
    site.revoke(device)
    assert not site.keeps_session(device)
    assert not device.is_admitted()


def test_a_suspended_device_is_cut_off_and_comes_back_with_nothing_that_it_had(site: Engine) -> None:
    device = site.device()
    with device.connected(clean=False) as client:
        assert client.subscribe(device.topic("#")) == SUBSCRIBED
        assert site.post(f"/devices/{device.id}/suspend")["broker"] == "enforced"
        assert not device.is_admitted()
        client.wait_until_cut()
    assert site.post(f"/devices/{device.id}/resume")["broker"] == "enforced"
    with device.connected(clean=False) as client:
        assert not client.session_present
    assert device.is_admitted()


def test_the_will_of_a_device_that_is_cut_off_reaches_nobody(site: Engine) -> None:
    if not site.is_by_journal:
        return  # nobody but the device may read its topics there
    device, reader = site.device(), site.application(("devices/#", "read"))
    with reader.connected() as watching:
        assert watching.subscribe("devices/#") == SUBSCRIBED
        with device.connected(will=Will(device.topic("gone"), b"will")) as client:
            site.revoke(device)
            client.wait_until_cut()
        other = site.device()
        with other.connected() as client:
            client.publish(other.topic("x"), b"afterwards")
        assert watching.receive().payload == b"afterwards"


def test_both_certificates_of_a_device_count_until_the_overlap_is_over(site: Engine) -> None:
    device = site.device()
    renewed, answer = site.renew(device, overlap_hours=24)
    assert device.is_admitted()
    assert renewed.is_admitted()
    with device.connected() as client:
        newest, answer = site.renew(renewed, overlap_hours=0)
        assert answer["broker"] == "enforced"
        assert not device.is_admitted()
        assert not renewed.is_admitted()
        client.wait_until_cut()
    assert newest.is_admitted()


# --- Who is there --------------------------------------------------------------------------------------------------


def connection(site: Engine, device: Member) -> dict[str, Any] | None:
    found: dict[str, Any] | None = site.deployment.call("GET", f"/devices/{device.id}").json()["connection"]
    return found


@LONG_AT_RABBITMQ
def test_the_portal_says_who_is_connected_and_when_a_device_was_last_seen(site: Engine) -> None:
    device = site.device()
    with device.connected() as client:
        assert client.subscribe(device.topic("#")) == SUBSCRIBED
        if not site.is_by_journal:  # which cannot know
            assert connection(site, device) == {"connected": None, "since": None, "last_seen": None}
            return
        wait_until(lambda: (connection(site, device) or {}).get("connected") is True)
    wait_until(lambda: (connection(site, device) or {}).get("connected") is False)
    assert (connection(site, device) or {})["last_seen"] is not None


# --- Without one of the two ----------------------------------------------------------------------------------------


def test_while_the_portal_is_away_nobody_comes_back_who_was_revoked_and_the_others_may_talk_on(site: Engine) -> None:
    device, other, revoked = site.device(), site.device(), site.device()
    site.revoke(revoked)
    with device.connected() as client:
        assert client.subscribe(device.topic("#")) == SUBSCRIBED
        assert echo(client, device) == []
        site.deployment.stop_portal()
        assert not revoked.is_admitted()
        client.ping()
        if site.asks_portal:
            assert not other.is_admitted()
            with pytest.raises(ConnectionError):
                client.publish(device.topic("a topic that it has not used yet"))
        else:
            assert other.is_admitted()
            assert echo(client, device) == []
        site.deployment.start_portal()
    site.deployment.wait_ready()
    assert device.is_admitted()
    assert not revoked.is_admitted()


@LONG_AT_RABBITMQ
def test_after_a_restart_of_the_broker_those_who_were_revoked_stay_out_and_sleepers_have_what_came(
    site: Engine,
) -> None:
    device, revoked = site.device(), site.device()
    site.revoke(revoked)
    with device.connected(clean=False) as client:
        assert client.subscribe(device.topic("#")) == SUBSCRIBED
    site.restart()
    assert not revoked.is_admitted()
    with device.connected(clean=False) as client:
        assert client.session_present
        assert echo(client, device) == []
    site.revoke(device)
    assert not device.is_admitted()
