"""Registrations that wait for each other are written together, and each is what it would have been alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import pytest
import sqlalchemy as sa

import db
from config import Settings
from core.errors import ExternalIdTaken, KeyInUse, QuotaReached
from core.tenants import Quotas
from operations.wiring import Portal, open_portal
from pki.csr import read_csr
from store import audit, tenants
from store.audit import Actor
from store.tables import Device
from tests.support import waiting
from tests.support.harness import ON_SQLITE, Clock, csr_pem
from tests.support.statements import noting
from tests.support.tenants import add_tenant
from workflows.credentials import DeviceRequest
from workflows.registration import Registered

pytestmark = ON_SQLITE  # whose writers take turns

PUMP = DeviceRequest(name="pump-1", type="pump", location="hall 1", firmware="1.0")


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Portal]:
    waiting.announce(monkeypatch)
    built = open_portal(make_settings(PORTAL_BROKER_CONTROL="files"), clock)
    yield built
    built.close()


def operator(number: int, tenant: str = "default") -> Actor:
    return Actor(tenant, f"operator {number}", "operator", f"request-{number}", f"192.0.2.{number}")


def registering(portal: Portal, *requests: DeviceRequest) -> list[Future[Registered]]:
    calls = [partial(portal.registrations.register, operator(n), request) for n, request in enumerate(requests)]
    return waiting.at_once(portal.database, calls)


@pytest.fixture
def inserts(portal: Portal) -> Iterator[list[int]]:
    """How many devices each statement has inserted that inserts some."""
    counted: list[int] = []

    def count(statement: str, rows: Sequence[object]) -> None:
        if statement.startswith("INSERT INTO devices"):
            counted.append(len(rows))

    with noting(portal.database.engine, count):
        yield counted


def names(portal: Portal) -> list[str]:
    with portal.database.snapshot() as tx:
        return sorted(tx.execute(sa.select(Device.name)).scalars())


def test_all_that_wait_are_inserted_by_one_statement(portal: Portal, inserts: list[int]) -> None:
    futures = registering(portal, *(dataclasses.replace(PUMP, name=f"pump-{number}") for number in range(4)))
    answers = [future.result() for future in futures]
    assert [answer.name for answer in answers] == ["pump-0", "pump-1", "pump-2", "pump-3"]
    assert inserts == [4]
    with portal.database.snapshot() as tx:
        for answer in answers:
            assert db.get_device(tx, "default", answer.device_id).name == answer.name


def test_each_has_its_own_actor_in_an_audit_record_that_is_whole(portal: Portal) -> None:
    answers = [future.result() for future in registering(portal, PUMP, PUMP, PUMP)]
    entries = portal.operators.audit("default", limit=3, before=None, filters={})[0]
    assert [(one.object, one.actor, one.request_id, one.address) for one in reversed(entries)] == [
        (f"device:{answer.device_id}", f"operator {number}", f"request-{number}", f"192.0.2.{number}")
        for number, answer in enumerate(answers)
    ]
    with portal.database.snapshot() as tx:
        assert audit.verify(tx, "default").problem is None


def test_one_that_is_refused_costs_the_others_nothing(portal: Portal) -> None:
    key = read_csr(csr_pem())
    requests = [
        dataclasses.replace(PUMP, name="first", external_id="rack 7"),
        dataclasses.replace(PUMP, name="same id", external_id="rack 7"),
        dataclasses.replace(PUMP, name="with a key", csr=key),
        dataclasses.replace(PUMP, name="same key", csr=key),
        dataclasses.replace(PUMP, name="last"),
    ]
    errors = [future.exception() for future in registering(portal, *requests)]
    assert [type(error) for error in errors] == [type(None), ExternalIdTaken, type(None), KeyInUse, type(None)]
    assert names(portal) == ["first", "last", "with a key"]


def test_a_quota_has_room_for_the_first_ones(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        record = dataclasses.replace(tenants.get_tenant(tx, "default"), quotas=Quotas(devices=2))
        tenants.update_tenant(tx, record)
    portal.tenant_terms.refresh()
    errors = [future.exception() for future in registering(portal, PUMP, PUMP, PUMP)]
    assert [type(error) for error in errors] == [type(None), type(None), QuotaReached]


def test_one_idempotency_key_makes_one_device_though_both_requests_wait(portal: Portal) -> None:
    actor, key = operator(1), "the same key twice"
    call = partial(portal.registrations.register, actor, PUMP, key)
    other = partial(portal.registrations.register, operator(2), dataclasses.replace(PUMP, name="other"))
    one, again, another = (future.result() for future in waiting.at_once(portal.database, [call, call, other]))
    assert one == again
    assert another.name == "other"
    assert names(portal) == ["other", "pump-1"]


def test_the_broker_must_learn_only_of_those_with_topics_of_their_own(portal: Portal) -> None:
    own = dataclasses.replace(PUMP, topics=[("devices/{id}/#", "readwrite"), ("devices/all", "read")])
    plain, narrow = (future.result() for future in registering(portal, PUMP, own))
    assert plain.generation == 0
    assert narrow.generation > 0


def test_devices_of_several_tenants_are_each_in_their_own(portal: Portal) -> None:
    add_tenant(portal, "acme")
    calls = [
        partial(portal.registrations.register, operator(number, tenant), PUMP)
        for number, tenant in enumerate(("default", "acme", "default"))
    ]
    answers = [future.result() for future in waiting.at_once(portal.database, calls)]
    with portal.database.snapshot() as tx:
        for answer, tenant in zip(answers, ("default", "acme", "default"), strict=True):
            assert db.get_device(tx, tenant, answer.device_id).name == "pump-1"
            assert audit.verify(tx, tenant).problem is None
