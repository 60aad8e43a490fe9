"""Events reach those who subscribed, at least once, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from config import Settings
from core.errors import Conflict, InputInvalid, NotFound, Unavailable
from operations import jobs
from operations.wiring import Portal, open_portal
from store.tables import Webhook, WebhookDelivery
from store.webhooks import EventDeliveryRecord
from tests.support.harness import ON_SQLITE, Clock
from tests.support.receiver import Receiver, answer, receiving
from tests.workflows.test_registration import OPERATOR, PUMP, token_of
from workflows.events import EventType
from workflows.webhooks import subscriptions
from workflows.webhooks.subscriptions import LANE_LENGTH, LANES, MAX_ATTEMPTS, MAX_WEBHOOKS, Dispatcher, delay_after

BROKEN = answer(500)


def beside(portal: Portal, clock: Clock) -> Dispatcher:
    """The dispatcher of another process."""
    own = portal.dispatcher
    return Dispatcher(portal.database, portal.tenant_terms, own._sender, own._rates, clock)


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Portal]:
    built = open_portal(make_settings(PORTAL_WEBHOOK_ALLOW="127.0.0.0/8,::1"), clock)
    yield built
    built.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


def subscribe(portal: Portal, receiver: Receiver, *types: EventType) -> str:
    return portal.webhooks.create(OPERATOR, "a test", receiver.url, types)[1].id


def register(portal: Portal) -> str:
    return portal.registrations.register(OPERATOR, PUMP).device_id


def deliveries(portal: Portal, webhook_id: str) -> list[EventDeliveryRecord]:
    """Oldest first."""
    found = portal.webhooks.deliveries("default", webhook_id, limit=200, before=None, status=None)
    return list(reversed(found))


def bodies(receiver: Receiver) -> list[dict[str, Any]]:
    return [json.loads(request.body) for request in receiver.requests]


# --- On the way ---------------------------------------------------------------------------------------------------


def test_a_registration_and_a_revocation_are_sent_to_the_receiver(portal: Portal, receiver: Receiver) -> None:
    webhook_id = subscribe(portal, receiver, EventType.REGISTERED, EventType.REVOKED)
    device_id = register(portal)
    portal.revocations.revoke(OPERATOR, device_id, "key_compromise")
    portal.dispatcher.send_due()
    told = sorted(bodies(receiver), key=lambda event: event["at"])
    assert [(event["type"], event["device_id"]) for event in told] == [
        ("registered", device_id),
        ("revoked", device_id),
    ]
    assert {request.headers["webhook-id"] for request in receiver.requests} == {event["id"] for event in told}
    assert [(one.status, one.attempts, one.last_problem) for one in deliveries(portal, webhook_id)] == [
        ("delivered", 1, None)
    ] * 2
    portal.dispatcher.send_due()
    assert len(receiver.requests) == 2


def test_events_before_the_subscription_are_not_sent(portal: Portal, receiver: Receiver) -> None:
    register(portal)
    webhook_id = subscribe(portal, receiver)
    assert deliveries(portal, webhook_id) == []


def test_an_event_that_is_not_taken_is_sent_again_later_with_the_same_id(
    portal: Portal, receiver: Receiver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "MAX_REST_SECONDS", 0.0)
    receiver.behave = BROKEN
    webhook_id = subscribe(portal, receiver)
    register(portal)
    portal.dispatcher.send_due()
    (waiting,) = deliveries(portal, webhook_id)
    assert (waiting.status, waiting.last_problem) == ("waiting", "The receiver answered 500.")
    assert timedelta(seconds=3) < waiting.next_at - clock() < timedelta(seconds=7)
    portal.dispatcher.send_due()
    assert len(receiver.requests) == 1
    clock.advance(seconds=7)
    receiver.behave = answer(200)
    portal.dispatcher.send_due()
    first, second = receiver.requests
    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert int(second.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) >= 7
    assert first.headers["webhook-signature"] != second.headers["webhook-signature"]
    (done,) = deliveries(portal, webhook_id)
    assert (done.status, done.attempts, done.last_problem) == ("delivered", 2, None)


def test_a_crash_between_sending_and_recording_sends_the_same_event_again(
    portal: Portal, receiver: Receiver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = subscribe(portal, receiver)
    register(portal)

    def die(name: str) -> None:
        raise OSError(name)  # ends the lane, as a kill ends the process: nothing is recorded

    with monkeypatch.context() as patch:
        patch.setattr(subscriptions, "failpoint", die)
        portal.dispatcher.send_due()
    (waiting,) = deliveries(portal, webhook_id)
    assert (waiting.status, waiting.attempts) == ("waiting", 1)
    restarted = beside(portal, clock)
    restarted.send_due()
    assert len(receiver.requests) == 1, "its lease holds still"
    clock.advance(seconds=subscriptions.LEASE.total_seconds())
    restarted.send_due()
    first, second = receiver.requests
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert deliveries(portal, webhook_id)[0].status == "delivered"


def test_two_processes_send_nothing_twice(portal: Portal, receiver: Receiver, clock: Clock) -> None:
    subscribe(portal, receiver, EventType.REGISTERED)
    for _ in range(12):
        register(portal)
    others = [beside(portal, clock) for _ in range(3)]
    threads = [threading.Thread(target=other.send_due) for other in (portal.dispatcher, *others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [event["id"] for event in bodies(receiver)]
    assert len(ids) == len(set(ids)) == 12


def test_a_late_failure_does_not_end_the_lease_of_the_process_that_took_over(
    portal: Portal, receiver: Receiver, clock: Clock
) -> None:
    webhook_id = subscribe(portal, receiver)
    register(portal)
    other = beside(portal, clock)

    def overtaken(connection: Any) -> None:
        receiver.behave = answer(200)
        clock.advance(seconds=subscriptions.LEASE.total_seconds())
        other.send_due()
        connection.sendall(BROKEN)

    receiver.behave = overtaken
    portal.dispatcher.send_due()
    (done,) = deliveries(portal, webhook_id)
    assert (done.status, done.attempts) == ("delivered", 2)


def test_a_receiver_that_hangs_holds_nobody_else_up(
    portal: Portal, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "POLL_SECONDS", 0.05)
    with receiving() as hanging:

        def hang(_: Any) -> None:
            hanging.stopped.wait(10)

        def take(connection: Any) -> None:
            connection.sendall(answer(200))
            arrived.set()

        hanging.behave = hang
        subscribe(portal, hanging)
        subscribe(portal, receiver)
        stopping = threading.Event()
        sending = threading.Thread(target=portal.dispatcher.run, args=(stopping,))
        arrived = threading.Event()
        receiver.behave = take
        sending.start()
        for _ in range(LANES + 1):
            register(portal)
            assert arrived.wait(5)
            arrived.clear()
        assert hanging.connections <= LANES
        stopping.set()
        sending.join()
    portal.dispatcher.join()


def test_a_receiver_that_takes_nothing_is_left_alone_for_a_while(portal: Portal, receiver: Receiver) -> None:
    receiver.behave = BROKEN
    subscribe(portal, receiver, EventType.REGISTERED)
    at_once = LANES * LANE_LENGTH
    for _ in range(at_once + 1):
        register(portal)
    portal.dispatcher.send_due()
    portal.dispatcher.send_due()
    assert len(receiver.requests) == at_once


# --- Back-off, the dead, those sent again -------------------------------------------------------------------------


def test_the_time_between_attempts_doubles_to_two_hours_and_ends_after_a_day() -> None:
    delays = [delay_after(attempts, jitter=0.5) for attempts in range(1, MAX_ATTEMPTS)]
    assert delays[:4] == [timedelta(seconds=seconds) for seconds in (5, 10, 20, 40)]
    assert delays[-1] == timedelta(hours=2)
    assert timedelta(hours=24) < sum((delay for delay in delays if delay), timedelta()) < timedelta(hours=30)
    assert delay_after(MAX_ATTEMPTS, jitter=0.5) is None
    assert delay_after(1, jitter=0.0) == timedelta(seconds=3.75)
    assert delay_after(1, jitter=1.0) == timedelta(seconds=6.25)


def test_what_was_given_up_is_seen_and_sent_again_when_somebody_asks(
    portal: Portal, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(subscriptions, "MAX_REST_SECONDS", 0.0)
    receiver.behave = BROKEN
    webhook_id = subscribe(portal, receiver, EventType.REGISTERED)
    register(portal)
    register(portal)
    portal.dispatcher.send_due()
    assert [one.status for one in deliveries(portal, webhook_id)] == ["dead", "dead"]
    ((_, backlog),) = portal.webhooks.all("default")
    assert (backlog.waiting, backlog.dead) == (0, 2)
    portal.dispatcher.send_due()
    assert len(receiver.requests) == 2
    receiver.behave = answer(200)
    first, second = (one.id for one in deliveries(portal, webhook_id))
    assert portal.webhooks.redeliver(OPERATOR, webhook_id, [first]) == 1
    assert portal.webhooks.redeliver(OPERATOR, webhook_id, None) == 1
    assert portal.webhooks.redeliver(OPERATOR, webhook_id, [first, second]) == 0, "they wait already"
    portal.dispatcher.send_due()
    assert [one.status for one in deliveries(portal, webhook_id)] == ["delivered", "delivered"]
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 2
    assert portal.webhooks.redeliver(OPERATOR, webhook_id, [first]) == 1, "a delivered one too, if it is named"


def test_events_that_ended_long_ago_are_forgotten_and_those_that_wait_are_not(
    portal: Portal, receiver: Receiver, clock: Clock
) -> None:
    webhook_id = subscribe(portal, receiver, EventType.REGISTERED)
    register(portal)
    portal.dispatcher.send_due()
    clock.advance(days=portal.settings.event_days - 1)
    device_id = register(portal)
    jobs.expire(portal)
    assert len(deliveries(portal, webhook_id)) == 2
    clock.advance(days=40)
    jobs.expire(portal)
    assert [one.device_id for one in deliveries(portal, webhook_id)] == [device_id]


# --- Subscriptions ------------------------------------------------------------------------------------------------


def test_a_deleted_webhook_is_sent_nothing_more(portal: Portal, receiver: Receiver) -> None:
    webhook_id = subscribe(portal, receiver)
    register(portal)
    portal.webhooks.delete(OPERATOR, webhook_id)
    register(portal)
    portal.dispatcher.send_due()
    assert receiver.requests == []
    with portal.database.snapshot() as tx:
        for table in (Webhook, WebhookDelivery):
            assert tx.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 0
    for gone in (portal.webhooks.delete, portal.webhooks.test):
        with pytest.raises(NotFound):
            gone(OPERATOR, webhook_id)


@ON_SQLITE
def test_after_a_restart_the_subscriptions_hold_though_their_marker_is_gone(
    portal: Portal, receiver: Receiver, clock: Clock
) -> None:
    webhook_id = subscribe(portal, receiver, EventType.REGISTERED)
    (portal.settings.data_dir / ".subscribed").unlink()  # as where a backup was restored to another machine
    again = open_portal(portal.settings, clock)
    register(again)
    assert len(deliveries(again, webhook_id)) == 1
    again.close()


@ON_SQLITE
def test_there_are_so_many_webhooks_and_no_more(portal: Portal, receiver: Receiver) -> None:
    for _ in range(MAX_WEBHOOKS):
        subscribe(portal, receiver)
    with pytest.raises(Conflict):
        subscribe(portal, receiver)


@ON_SQLITE
def test_a_webhook_that_leads_inside_is_refused_and_leaves_nothing(portal: Portal) -> None:
    with pytest.raises(InputInvalid):
        portal.webhooks.create(OPERATOR, "inside", "https://169.254.169.254/", ())
    assert portal.webhooks.all("default") == []


@ON_SQLITE
def test_the_secret_is_nowhere_in_the_clear(portal: Portal, receiver: Receiver, caplog: Any) -> None:
    secret, record = portal.webhooks.create(OPERATOR, "a test", receiver.url, ())
    register(portal)
    portal.dispatcher.send_due()
    assert receiver.requests
    portal.database.close()
    for path in portal.settings.data_dir.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes()
    assert secret not in caplog.text
    assert secret not in repr(record)


@ON_SQLITE
def test_where_the_sealing_key_was_lost_the_event_waits_and_says_so(portal: Portal, receiver: Receiver) -> None:
    webhook_id = subscribe(portal, receiver)
    with portal.database.transaction() as tx:
        tx.execute(sa.update(Webhook).values(sealed_secret=b"0" * 60))
    register(portal)
    portal.dispatcher.send_due()
    assert "webhook-key" in (deliveries(portal, webhook_id)[0].last_problem or "")
    assert receiver.connections == 0


@ON_SQLITE
def test_a_test_event_is_sent_at_once_and_its_outcome_is_answered(portal: Portal, receiver: Receiver) -> None:
    webhook_id = subscribe(portal, receiver, EventType.REVOKED)
    assert portal.webhooks.test(OPERATOR, webhook_id).delivered
    assert bodies(receiver)[0]["type"] == "test"
    busy: list[Unavailable] = []

    def meanwhile(connection: Any) -> None:
        with pytest.raises(Unavailable) as caught:
            portal.webhooks.test(OPERATOR, webhook_id)
        busy.append(caught.value)
        connection.sendall(BROKEN)

    receiver.behave = meanwhile
    sent = portal.webhooks.test(OPERATOR, webhook_id)
    assert (sent.delivered, sent.status, sent.problem) == (False, 500, "The receiver answered 500.")
    assert len(busy) == 1
    assert deliveries(portal, webhook_id) == []


# --- Certificates that end ----------------------------------------------------------------------------------------


def test_a_certificate_past_two_thirds_of_its_life_is_announced_once(
    portal: Portal, receiver: Receiver, clock: Clock, caplog: Any
) -> None:
    webhook_id = subscribe(portal, receiver, EventType.EXPIRING)
    short = portal.registrations.register(OPERATOR, dataclasses.replace(PUMP, validity_days=30))
    long = portal.registrations.register(OPERATOR, dataclasses.replace(PUMP, validity_days=90))
    out = portal.registrations.register(OPERATOR, dataclasses.replace(PUMP, validity_days=30)).device_id
    portal.revocations.revoke(OPERATOR, out, "unspecified")
    clock.advance(days=19)
    jobs.announce_expiring(portal)
    assert deliveries(portal, webhook_id) == []
    clock.advance(days=2)
    for _ in range(2):
        jobs.announce_expiring(portal)
    assert [one.device_id for one in deliveries(portal, webhook_id)] == [short.device_id]
    assert caplog.text.count("should be renewed") == 1
    clock.advance(days=40)
    jobs.announce_expiring(portal)
    assert [one.device_id for one in deliveries(portal, webhook_id)] == [short.device_id, long.device_id]
    portal.dispatcher.send_due()
    assert {event["data"]["serial_number"] for event in bodies(receiver)} == {short.serial_number, long.serial_number}


def test_a_delivered_bundle_is_an_event(portal: Portal, receiver: Receiver) -> None:
    subscribe(portal, receiver, EventType.DELIVERED)
    portal.deliveries.deliver(OPERATOR, token_of(portal.registrations.register(OPERATOR, PUMP)))
    portal.dispatcher.send_due()
    assert bodies(receiver)[0]["type"] == "delivered"
