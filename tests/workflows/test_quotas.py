"""A tenant takes no more than its quota of what all share, in each way in, and another one has what it had."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core import rates
from core.errors import TooManyUploads, UploadsBusy
from core.roles import Role
from core.tenants import Quotas
from operations.wiring import Portal
from store import tenants
from store.quotas import recount_clients
from store.tables import AuditHead, WebhookDelivery
from tests.support.est import Device as EstClient
from tests.support.harness import ON_SQLITE, Api, Clock, csr_pem, problem_of
from tests.support.receiver import receiving
from tests.support.tenants import add_tenant
from workflows.operators import new_token
from workflows.webhooks.sending import Sent

PLAIN = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Flask]:
    settings = make_settings(
        PORTAL_BROKER_CONTROL="files", PORTAL_WEBHOOK_ALLOW="127.0.0.0/8,::1", PORTAL_BULK_UPLOADS="3"
    )
    built = create_app(settings, background=False, clock=clock)
    for name in ("acme", "other"):
        add_tenant(portal_of(built), name)
    yield built
    portal_of(built).close()


def api_of(app: Flask, tenant: str, role: Role = Role.ADMIN) -> Api:
    portal = portal_of(app)
    secret, record = new_token(tenant, "somebody", role, None, now=portal.clock())
    with portal.database.transaction() as tx:
        tenants.add_token(tx, record, secret=secret)
    return Api(app.test_client(), secret)


@pytest.fixture
def api(app: Flask) -> Api:
    return api_of(app, "acme")


@pytest.fixture
def other(app: Flask) -> Api:
    return api_of(app, "other")


def limit(app: Flask, **quotas: int) -> Portal:
    """Set the quotas of ``acme``."""
    portal = portal_of(app)
    with portal.database.transaction() as tx:
        record = dataclasses.replace(tenants.get_tenant(tx, "acme"), quotas=Quotas(**quotas))
        tenants.update_tenant(tx, record)
    portal.tenant_terms.refresh()
    return portal


def clients(portal: Portal, tenant: str = "acme") -> int:
    with portal.database.snapshot() as tx:
        return int(tx.execute(sa.select(AuditHead.clients).where(AuditHead.tenant_id == tenant)).scalar_one())


def upload(api: Api, count: int, **fields: Any) -> list[dict[str, Any]]:
    body = "".join(json.dumps(PLAIN | fields) + "\n" for _ in range(count))
    answer = api.call("POST", "/register/bulk", data=body, headers=NDJSON)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def est_token(api: Api, **fields: Any) -> EstClient:
    made = api.post("/enrolment-tokens", {"name": "batch", "count": 9, **fields})
    assert made.status_code == 201, made.text
    return EstClient(api, made.json["token"])


# --- How many devices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quota", ["devices", "registrations_per_minute", "bulk_uploads", "webhook_deliveries_per_minute"]
)
def test_a_quota_of_nothing_is_refused(quota: str) -> None:
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{quota} must be 1 or more"):
            Quotas(**{quota: value})


def test_every_way_in_ends_at_the_quota_of_devices_and_none_of_another_tenant_does(
    app: Flask, api: Api, other: Api
) -> None:
    portal = limit(app, devices=3)
    assert api.post("/register", PLAIN).status_code == 201
    lines = upload(api, 4)
    assert [line.get("code") for line in lines] == [None, None, "quota_reached", "quota_reached"]
    assert clients(portal) == 3
    problem_of(api.post("/register", PLAIN), 409, "quota_reached")
    problem_of(api.post("/register", PLAIN | {"csr": csr_pem()}), 409, "quota_reached")
    problem_of(api.post("/devices", PLAIN), 409, "quota_reached")
    for approval in ("at_once", "operator"):
        assert "quota" in est_token(api, approval=approval).enrol().text
    assert len(api.get("/devices?limit=200").json["devices"]) == 3
    assert other.post("/register", PLAIN).status_code == 201


def test_who_revokes_or_rejects_a_device_may_have_another(app: Flask, api: Api) -> None:
    portal = limit(app, devices=2)
    first = api.post("/register", PLAIN).json["device_id"]
    expected = api.post("/devices", PLAIN).json["device_id"]
    problem_of(api.post("/register", PLAIN), 409, "quota_reached")
    for _ in range(2):  # a repeat counts once
        assert api.post(f"/revoke/{first}").status_code == 200
    assert api.post("/register", PLAIN).status_code == 201
    problem_of(api.post("/register", PLAIN), 409, "quota_reached")
    assert api.post(f"/devices/{expected}/reject").status_code == 200
    assert api.post("/register", PLAIN).status_code == 201
    assert clients(portal) == 2


def test_a_device_that_was_expected_is_counted_once(app: Flask, api: Api) -> None:
    portal = limit(app, devices=1)
    expected = api.post("/devices", PLAIN).json["device_id"]
    assert est_token(api, count=1, device_id=expected).enrol().status_code == 200
    assert clients(portal) == 1


def test_two_at_once_do_not_both_have_the_last_place(app: Flask) -> None:
    portal, gate, answers = limit(app, devices=1), threading.Barrier(2), list[int]()
    apis = [api_of(app, "acme") for _ in range(2)]

    def register(api: Api) -> None:
        gate.wait(10)
        answers.append(api.post("/register", PLAIN).status_code)

    threads = [threading.Thread(target=register, args=(api,)) for api in apis]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [201, 409]
    assert clients(portal) == 1


def test_the_count_is_that_of_the_devices(app: Flask, api: Api) -> None:
    portal = limit(app)
    ids = [line["device_id"] for line in upload(api, 5)]
    api.post(f"/revoke/{ids[0]}")
    api.post(f"/devices/{ids[1]}/suspend")
    before = clients(portal)
    with portal.database.transaction() as tx:
        recount_clients(tx)
    assert before == clients(portal) == 4


# --- How many a minute ------------------------------------------------------------------------------------------------


def test_every_way_in_counts_for_the_registrations_of_a_minute(
    app: Flask, api: Api, other: Api, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(app, registrations_per_minute=3)
    assert api.post("/register", PLAIN).status_code == 201
    enrolling = est_token(api)
    assert enrolling.enrol().status_code == 200
    lines = upload(api, 3)
    assert [line.get("code") for line in lines] == [None, "too_many_registrations", "too_many_registrations"]
    answer = api.post("/register", PLAIN)
    problem_of(answer, 429, "too_many_registrations")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    refused = est_token(api).enrol()
    assert (refused.status_code, int(refused.headers["Retry-After"]) <= 60) == (429, True)
    assert other.post("/register", PLAIN).status_code == 201
    clock.advance(seconds=61)
    if not portal_of(app).database.is_sqlite:  # nodes count by the one clock that they share
        monkeypatch.setattr(rates, "MINUTE", 0.0)
    assert api.post("/register", PLAIN).status_code == 201


def test_a_repeat_with_an_idempotency_key_or_an_external_id_counts_once(app: Flask, api: Api) -> None:
    limit(app, registrations_per_minute=2)
    key = {"Idempotency-Key": "a-key-of-this-test"}
    for _ in range(3):
        assert api.post("/register", PLAIN, headers=key).status_code == 201
    for _ in range(3):
        [line] = upload(api, 1, external_id="a-1", csr=CSR)
        assert "code" not in line
    problem_of(api.post("/register", PLAIN), 429, "too_many_registrations")


CSR = csr_pem()

# --- Uploads ----------------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_a_tenant_has_as_many_uploads_under_way_as_its_quota_says(app: Flask, api: Api) -> None:
    portal = limit(app, bulk_uploads=1)
    with portal.bulk.place("acme"):
        answer = api.call("POST", "/register/bulk", data=json.dumps(PLAIN), headers=NDJSON)
        problem_of(answer, 429, "too_many_uploads_of_tenant")
        assert answer.headers["Retry-After"]
        with portal.bulk.place("other"):
            pass
    with portal.bulk.place("acme"):
        pass


@ON_SQLITE
def test_one_of_several_tenants_cannot_hold_all_places(app: Flask) -> None:
    portal = limit(app)
    with portal.bulk.place("acme"), portal.bulk.place("acme"):
        with pytest.raises(TooManyUploads), portal.bulk.place("acme"):
            pass
        with portal.bulk.place("other"), pytest.raises(UploadsBusy), portal.bulk.place("default"):
            pass


# --- Events -----------------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_more_events_than_a_minute_has_are_sent_in_the_next_ones_and_none_is_lost(
    app: Flask, api: Api, clock: Clock
) -> None:
    portal = limit(app, webhook_deliveries_per_minute=2)
    with receiving() as receiver:
        assert api.post("/webhooks", {"name": "all", "url": receiver.url}).status_code == 201
        upload(api, 5)
        sent = []
        for _ in range(3):
            portal.dispatcher.send_due()
            portal.dispatcher.send_due()
            sent.append(len(receiver.requests))
            clock.advance(seconds=61)
    assert sent == [2, 4, 5]
    with portal.database.snapshot() as tx:
        assert set(tx.execute(sa.select(WebhookDelivery.status)).scalars()) == {"delivered"}
        assert set(tx.execute(sa.select(WebhookDelivery.attempts)).scalars()) == {1}


@ON_SQLITE
def test_slow_receivers_of_one_tenant_leave_lanes_for_those_of_another(
    app: Flask, api: Api, other: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.webhooks.subscriptions.MAX_LANES_OF_TENANT", 2)
    portal, gate = limit(app), threading.Event()

    def send(message: Any, *, now: object) -> Any:
        if "slow" in message.url:
            gate.wait(10)
        return Sent(200, None, 0.0)

    monkeypatch.setattr(type(portal.dispatcher._sender), "send", lambda _self, message, *, now: send(message, now=now))
    urls = [
        (api, "https://slow.example.com/1"),
        (api, "https://slow.example.com/2"),
        (other, "https://fast.example.com"),
    ]
    for owner, url in urls:
        assert owner.post("/webhooks", {"name": "all", "url": url}).status_code == 201
    upload(api, 12)
    upload(other, 1)
    lanes = portal.dispatcher._start_lanes()
    gate.set()
    portal.dispatcher.join()
    assert sorted(lane.tenant_id for lane in lanes) == ["acme", "acme", "other"]
