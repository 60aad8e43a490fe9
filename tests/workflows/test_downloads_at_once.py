"""Downloads that wait for each other are written together, and each is what it would have been alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import pyzipper

from config import Settings
from core.errors import LinkUsed
from operations.wiring import Portal, open_portal
from store import audit
from tests.support import waiting
from tests.support.harness import ON_SQLITE, Clock
from tests.support.statements import noting
from tests.workflows.test_registrations_at_once import PUMP, operator
from workflows.delivery import DeliveredBundle
from workflows.registration import Registered

pytestmark = ON_SQLITE  # whose writers take turns


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Portal]:
    waiting.announce(monkeypatch)
    built = open_portal(make_settings(PORTAL_BROKER_CONTROL="files", PORTAL_ACL_STYLE="pattern"), clock)
    yield built
    built.close()


def registered(portal: Portal, count: int) -> list[Registered]:
    return [portal.registrations.register(operator(number), PUMP) for number in range(count)]


def fetch(portal: Portal, number: int, one: Registered) -> Callable[[], DeliveredBundle]:
    assert one.download_url is not None
    return partial(portal.deliveries.deliver, operator(number), one.download_url.rpartition("/")[2])


def test_all_that_wait_are_recorded_by_one_statement_and_have_their_own_bundles(portal: Portal) -> None:
    devices = registered(portal, 3)
    counted: list[int] = []

    def count(statement: str, rows: Sequence[object]) -> None:
        if statement.startswith("INSERT INTO audit_entries"):
            counted.append(len(rows))

    with noting(portal.database.engine, count):
        futures = waiting.at_once(portal.database, [fetch(portal, number, one) for number, one in enumerate(devices)])
    assert counted == [6]
    for one, future in zip(devices, futures, strict=True):
        bundle = future.result()
        assert bundle.device_id == one.device_id
        with pyzipper.AESZipFile(io.BytesIO(bundle.content)) as archive:
            archive.setpassword(str(one.bundle_password).encode())
            assert b"PRIVATE KEY" in archive.read("device.key")
    entries = portal.operators.audit("default", limit=6, before=None, filters={})[0]
    assert [(entry.action, entry.object, entry.actor) for entry in reversed(entries)] == [
        (action, f"device:{one.device_id}", f"operator {number}")
        for number, one in enumerate(devices)
        for action in ("bundle:fetch", "bundle:deliver")
    ]
    with portal.database.snapshot() as tx:
        assert audit.verify(tx, "default").problem is None


def test_of_two_with_one_link_the_first_has_the_bundle_and_the_others_have_theirs(portal: Portal) -> None:
    first, other = registered(portal, 2)
    calls = [fetch(portal, 0, first), fetch(portal, 1, first), fetch(portal, 2, other)]
    errors = [future.exception() for future in waiting.at_once(portal.database, calls)]
    assert [type(error) for error in errors] == [type(None), LinkUsed, type(None)]
    entries = portal.operators.audit("default", limit=10, before=None, filters={"action": "bundle:deliver"})[0]
    assert {entry.object for entry in entries} == {f"device:{one.device_id}" for one in (first, other)}
