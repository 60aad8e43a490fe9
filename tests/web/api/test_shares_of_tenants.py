"""What is done for a tenant, for operators, devices and those with a link, is a part of that tenant's share."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from core.fair_share import FairShare
from core.roles import Role
from tests.support.browser import logged_in_as
from tests.support.est import Device, certificates_of, csr_der, in_base64, new_key
from tests.support.harness import ON_SQLITE, api_as, csr_pem

pytestmark = ON_SQLITE
CONFIGURATION = "/.well-known/onboarding/config"


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tenants whose shares were asked for."""
    asked: list[str] = []

    @contextlib.contextmanager
    def work_of(_share: FairShare, tenant_id: str) -> Iterator[None]:
        asked.append(tenant_id)
        yield

    monkeypatch.setattr(FairShare, "work_of", work_of)
    return asked


def test_each_way_in_takes_from_the_share_of_its_tenant(app: Flask, shares: list[str]) -> None:
    acme, anyone, key = api_as(app, Role.ADMIN, "acme"), api_as(app, None), new_key()

    def token() -> str:
        answer = acme.post("/enrolment-tokens", {"name": "a pump"}).json
        shares.clear()
        return str(answer["token"])

    def basic(secret: str) -> dict[str, str]:
        return {"Authorization": f"Basic {base64.b64encode(f'device:{secret}'.encode()).decode()}"}

    link = "/download/" + acme.register()["download_url"].rpartition("/")[2]
    [certificate] = certificates_of(Device(anyone, token()).enrol(csr_der(key)))
    known = Device(anyone, None, certificate.public_bytes(Encoding.DER))
    renewal = in_base64(csr_der(key, certificate.subject.rfc4514_string().removeprefix("CN=")))
    requests: tuple[tuple[Callable[[], Any], int], ...] = (
        (lambda: acme.get("/devices"), 200),
        (lambda: anyone.get(link), 200),
        (lambda: anyone.post("/enroll", {"csr": csr_pem()}, headers=basic(token())), 201),
        (lambda: Device(anyone, token()).enrol(), 200),
        (lambda: Device(anyone, token()).enrol(operation="serverkeygen"), 200),
        (lambda: known.call("POST", "simplereenroll", renewal), 409),  # which is too early
        (lambda: known.call("POST", "serverkeygen", renewal), 409),
        (lambda: dataclasses.replace(known, path=CONFIGURATION).call("GET", ""), 200),
        (lambda: anyone.post("/attestation/nonce", {}, headers=basic(token())), 201),
        (lambda: acme.post("/attestation/nonce", {}), 201),
    )
    for ask, status in requests:
        shares.clear()
        answer = ask()
        assert answer.status_code == status, answer.text
        assert shares == ["acme"]


def test_with_one_tenant_nothing_is_shared_out(app: Flask, shares: list[str]) -> None:
    api = api_as(app, Role.ADMIN)
    link = "/download/" + api.register()["download_url"].rpartition("/")[2]
    assert api_as(app, None).get(link).status_code == 200
    assert shares == []


def test_each_part_of_a_long_answer_takes_from_the_share_of_its_tenant(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = api_as(app, Role.ADMIN, "acme")
    for number in range(5):
        acme.register(name=f"pump-{number}")
    taken: list[str] = []
    share_of = FairShare._share_of

    @contextlib.contextmanager
    def noted(share: FairShare, tenant_id: str) -> Iterator[None]:
        taken.append(tenant_id)
        with share_of(share, tenant_id):
            yield

    monkeypatch.setattr(FairShare, "_share_of", noted)
    monkeypatch.setattr("web.console.fleet.CSV_AT_ONCE", 2)
    monkeypatch.setattr("web.console.record.CSV_AT_ONCE", 2)
    monkeypatch.setattr("store.audit.READ_AT_ONCE", 2)
    browser = logged_in_as(app, Role.ADMIN, "acme")
    for ask in (
        lambda: browser.get("/ui/devices.csv", buffered=False),
        lambda: browser.get("/ui/record.csv", buffered=False),
        lambda: acme.client.get("/audit/export", headers={"Authorization": f"Bearer {acme.token}"}, buffered=False),
    ):
        taken.clear()
        answer = ask()
        assert answer.status_code == 200
        parts = [len(taken) for part in answer.iter_encoded() if part]
        assert len(parts) >= 3
        assert parts == sorted(set(parts))  # each in a turn of its own
        assert {*taken} == {"acme"}
