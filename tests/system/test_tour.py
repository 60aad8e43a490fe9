"""The three flows of docs/changing.md go as it says: each function is called, in that order, with a real broker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from tests.support.est import csr_der, device
from tests.support.harness import ON_SQLITE, Api, api_as
from tests.support.mosquitto import Mosquitto
from tests.support.structure import CallOrder

pytestmark = [pytest.mark.system, ON_SQLITE]

ROOT = Path(__file__).parents[2]
PLAIN = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
_, *SECTIONS = re.split(r"^### ", (ROOT / "docs" / "changing.md").read_text(), flags=re.MULTILINE)
REGISTRATION, REVOCATION, ENROLMENT = (
    re.findall(r"^\d+\. `([\w/]+\.py:[\w.]+)`", section, re.MULTILINE) for section in SECTIONS
)


@pytest.fixture
def api(make_settings: Callable[..., Settings]) -> Iterator[Api]:
    settings = make_settings(PORTAL_ENFORCE_TIMEOUT="20", PORTAL_BROKER_CONTROL="guard")
    app = create_app(settings, background=False)
    portal = portal_of(app)
    with Mosquitto(settings.data_dir / "broker", settings.mqtt_port, guard=True):
        yield api_as(app, Role.ADMIN)
        portal.close()


def order_of(call: Callable[[], Any], status: int) -> list[str]:
    with CallOrder(ROOT) as calls:
        answer = call()
    assert answer.status_code == status, answer.text
    return list(calls.functions)


def assert_in_order(named: list[str], called: list[str]) -> None:
    assert len(named) >= 10
    assert [name for name in named if name not in called] == []
    assert named == sorted(named, key=called.index)


def test_a_registration_goes_as_documented(api: Api) -> None:
    assert_in_order(REGISTRATION, order_of(lambda: api.post("/register", PLAIN), 201))


def test_a_revocation_goes_as_documented(api: Api) -> None:
    first, device_id = (api.register()["device_id"] for _ in range(2))
    api.post(f"/revoke/{first}")  # the journal has begun, and the guard knows the CAs
    assert_in_order(REVOCATION, order_of(lambda: api.post(f"/revoke/{device_id}", {}), 200))


def test_an_enrolment_goes_as_documented(api: Api) -> None:
    enrolling, csr = device(api), csr_der()
    assert_in_order(ENROLMENT, order_of(lambda: enrolling.enrol(csr), 200))
