"""A device leaves the same rows whichever way it comes in: registered, uploaded, or enrolled by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from config import Settings
from core.states import Approval, RepeatedSerial
from operations.wiring import Portal, open_portal
from pki.csr import read_csr
from pki.est import read_enrolment_request
from store.audit import Actor
from store.database import Base
from store.enrolment import EnrolmentProfile
from tests.support.est import csr_der
from tests.support.harness import PER_DEVICE, csr_pem
from tests.workflows.test_events import subscribe
from workflows.bulk.batch import Candidate, RowDone
from workflows.credentials import DeviceRequest
from workflows.enrolment.credentials import Enrolled, Waiting, by_token

OPERATOR = Actor("default", "somebody", "operator", "request-1", "192.0.2.1")
OPEN = Callable[[], Portal]


@pytest.fixture
def new_portal(make_settings: Callable[..., Settings]) -> Iterator[OPEN]:
    """Opens portals that are alike, each with a subscriber to every event."""
    opened: list[Portal] = []

    def make() -> Portal:
        portal = open_portal(make_settings())
        opened.append(portal)
        subscribe(portal)
        return portal

    yield make
    for portal in opened:
        portal.close()


def request_of(number: int, *, csr: bool) -> DeviceRequest:
    return DeviceRequest(
        name=f"pump-{number}",
        type="pump",
        location="hall 1",
        firmware="1.0",
        csr=read_csr(csr_pem()) if csr else None,
        validity_days=9,
        bundle_password=None if csr else "a long enough one",
    )


# --- The ways in --------------------------------------------------------------------------------------------------


def register(portal: Portal, *, count: int, csr: bool = True) -> list[str]:
    requests = [request_of(number, csr=csr) for number in range(1, count + 1)]
    return [portal.registrations.register(OPERATOR, request).device_id for request in requests]


class Rows:
    """The rows of an upload that has come as a whole."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates = candidates
        self.next_row = 1

    def take(self, limit: int, *, wait: bool) -> Sequence[Candidate]:
        taken, self._candidates = self._candidates[:limit], self._candidates[limit:]
        self.next_row += len(taken)
        return taken


def upload(portal: Portal, *, count: int, csr: bool = True) -> list[str]:
    rows = Rows([Candidate(number, request_of(number, csr=csr)) for number in range(1, count + 1)])
    answers = [answer for answers in portal.bulk.register(OPERATOR, rows) for answer in answers]
    return [answer.device_id for answer in answers if isinstance(answer, RowDone)]


def enrol(portal: Portal, *, count: int, approval: Approval = Approval.AT_ONCE) -> list[str]:
    profile = EnrolmentProfile(
        "pump", "hall 1", "1.0", "pump-{number}", ("ec-p256",), 9, approval, RepeatedSerial.OPERATOR
    )
    secret, _ = portal.enrolment_tokens.create(
        OPERATOR, "batch", profile, device_id=None, count=count, life=timedelta(1)
    )
    token = portal.enrolment_tokens.find(secret)
    assert token is not None
    device_ids = []
    for number in range(count):
        request = read_enrolment_request(csr_der(None, f"serial-{number}"))
        outcome = portal.enrolment.enrol(OPERATOR, by_token(token, request), request)
        if isinstance(outcome, Waiting):
            portal.approvals.approve(OPERATOR, outcome.device_id)
            outcome = portal.enrolment.enrol(OPERATOR, by_token(token, request), request)
        assert isinstance(outcome, Enrolled)
        device_ids.append(outcome.device_id)
    return device_ids


def enrol_once_approved(portal: Portal, *, count: int) -> list[str]:
    return enrol(portal, count=count, approval=Approval.OPERATOR)


# --- What they leave ------------------------------------------------------------------------------------------------

# Only an enrolment has these rows, and the acts before the admission; only an upload has the number of the row.
OF_ENROLMENT = {"enrolment_tokens", "enrolments"}
OTHER_ACTS = {"enrolment_token:create", "device:ask", "device:approve"}
NAMES_OF_ONE_ACT = {"device:register": "admit", "device:enrol": "admit", "registered": "admit", "enrolled": "admit"}
OF_ONE_WAY = {"row", "key", "key_fingerprint"}
DRAWN = {"id", "certificate_id", "event_id", "serial_number", "fingerprint", "key_fingerprint", "der", "bundle"}
DRAWN |= {"sealed_secret"}
CHAINED = {"number", "previous_hash", "hash"}


def state(portal: Portal, device_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, without what is drawn at random and without times; devices by their order."""
    names = {device_id: f"device {number}" for number, device_id in enumerate(device_ids)}
    found: dict[str, list[dict[str, Any]]] = {}
    with portal.database.snapshot() as tx:
        for table in Base.metadata.sorted_tables:
            if table.name in OF_ENROLMENT | {"audit_heads", "brokers", "enforcement_steps", "nodes"}:
                continue
            rows = [dict(row) for row in tx.execute(sa.select(table).order_by(*table.primary_key)).mappings()]
            plain = [_plain(row, names) for row in rows if row.get("action") not in OTHER_ACTS]
            found[table.name] = sorted(plain, key=repr)
    return found


def _plain(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for column, value in row.items():
        if column in ("body", "detail"):
            inner = json.loads(value) if isinstance(value, str) else value
            plain[column] = _plain({name: item for name, item in inner.items() if name not in OF_ONE_WAY}, names)
        elif column == "data":
            plain[column] = _plain(value, names)
        elif isinstance(value, datetime) or column in CHAINED or column in ("at", "expires_at"):
            plain[column] = value is not None
        elif isinstance(value, str) and value.removeprefix("device:") in names:
            plain[column] = names[value.removeprefix("device:")]
        elif column in DRAWN:
            plain[column] = type(value).__name__
        else:
            plain[column] = NAMES_OF_ONE_ACT.get(value, value) if isinstance(value, str) else value
    return plain


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("way", [upload, enrol])
def test_each_way_in_leaves_the_rows_of_a_registration(
    new_portal: OPEN, way: Callable[..., list[str]], count: int
) -> None:
    one, other = new_portal(), new_portal()
    registered = state(one, register(one, count=count))
    assert state(other, way(other, count=count)) == registered
    assert [len(registered[name]) for name in ("devices", "webhook_deliveries")] == [count, count]


@PER_DEVICE
@pytest.mark.parametrize("way", [upload, enrol, enrol_once_approved])
def test_if_the_broker_must_learn_of_a_device_each_way_says_so(new_portal: OPEN, way: Callable[..., list[str]]) -> None:
    one, other = new_portal(), new_portal()
    registered = state(one, register(one, count=1))
    assert state(other, way(other, count=1)) == registered
    assert registered["devices"][0]["generation"] == registered["broker_state"][0]["generation"]


@pytest.mark.parametrize("count", [1, 3])
def test_an_upload_leaves_the_bundles_of_registrations(new_portal: OPEN, count: int) -> None:
    one, other = new_portal(), new_portal()
    registered = state(one, register(one, count=count, csr=False))
    assert state(other, upload(other, count=count, csr=False)) == registered
    assert len(registered["deliveries"]) == count
