"""The names that profiles give to devices, and profiles that are removed meanwhile: the database has the last word."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import IntegrityError

from app import portal_of
from core.roles import Role
from store import names
from store.profile_tables import DeviceName
from tests.support.harness import Api, Clock, api_as, csr_pem, problem_of
from tests.support.statements import noting
from tests.web.api.test_profiles import NAMED, PUMP, SERVER, add, certificate_of, names_in, refusal, upload
from workflows.profiles import find_profiles

# --- Names --------------------------------------------------------------------------------------------------------


def test_two_living_devices_never_have_the_same_name(api: Api) -> None:
    add(api, NAMED, SERVER | {"serial_number": None})
    first = api.register(name="pump-1", profile="named")["device_id"]
    for profile in ("named", "tls-server"):
        answer = api.post("/register", PUMP | {"name": "PUMP-1", "profile": profile})
        refusal(answer, "pump-1.devices.example.com", first, status=409, code="name_in_use")
    assert len(api.get("/devices").json["devices"]) == 1
    api.register(name="pump-1")  # without the name
    api.post(f"/devices/{first}/suspend")
    answer = api.post("/register", PUMP | {"profile": "named"})
    problem_of(answer, 409, "name_in_use")  # a suspended device comes back with its certificate
    api.post(f"/revoke/{first}")
    api.register(name="pump-1", profile="named")


def test_the_database_refuses_a_second_owner_of_a_name(api: Api, app: Flask) -> None:
    add(api, NAMED)
    api.register(profile="named")
    other = api.register(name="pump-2", profile="named")["device_id"]
    row = {"tenant_id": "default", "device_id": other, "certificate_id": 1}
    with pytest.raises(IntegrityError), portal_of(app).database.transaction() as tx:
        tx.execute(sa.insert(DeviceName), {**row, "name": "pump-1.devices.example.com"})


def test_a_name_is_free_once_its_certificates_have_expired(api: Api, clock: Clock) -> None:
    add(api, NAMED | {"max_days": 10})
    api.register(name="pump-1", profile="named")
    clock.advance(days=9)
    problem_of(api.post("/register", PUMP | {"profile": "named"}), 409, "name_in_use")
    clock.advance(days=2)
    assert api.post("/register", PUMP | {"profile": "named"}).status_code == 201


def test_a_renamed_device_keeps_its_old_name_until_the_certificate_with_it_ends(api: Api) -> None:
    add(api, NAMED)
    device_id = api.register(name="pump-1", profile="named", csr=csr_pem())["device_id"]
    api.patch(f"/devices/{device_id}", {"name": "pump-9"})
    api.post(f"/devices/{device_id}/renew", {"overlap_hours": 1, "csr": csr_pem()})
    assert names_in(certificate_of(api, device_id)) == ["pump-9.devices.example.com"]
    for name in ("pump-1", "pump-9"):
        problem_of(api.post("/register", PUMP | {"name": name, "profile": "named"}), 409, "name_in_use")
    api.post(f"/devices/{device_id}/renew", {"overlap_hours": 0, "csr": csr_pem()})  # revokes the others at once
    problem_of(api.post("/register", PUMP | {"name": "pump-9", "profile": "named"}), 409, "name_in_use")
    api.register(name="pump-1", profile="named")
    api.patch(f"/devices/{device_id}", {"name": "pump-1"})
    answer = api.post(f"/devices/{device_id}/renew", {"csr": csr_pem()})
    problem_of(answer, 409, "name_in_use")  # it gave that name up


# --- Removal ---------------------------------------------------------------------------------------------------


def test_a_profile_is_not_removed_while_something_needs_it(api: Api) -> None:
    add(api, NAMED)
    device_id = api.register(name="pump-1", profile="named")["device_id"]
    token = {"name": "a batch", "profile": "named", "name_template": "{serial}"}
    token_id = api.post("/enrolment-tokens", token).json["enrolment_token_id"]
    problem = problem_of(api.delete("/profiles/named"), 409, "profile_in_use")
    assert "1 device and 1 enrolment token" in problem["detail"]
    api.delete(f"/enrolment-tokens/{token_id}")
    assert "1 device;" in problem_of(api.delete("/profiles/named"), 409, "profile_in_use")["detail"]
    api.post(f"/revoke/{device_id}")
    assert api.delete("/profiles/named").status_code == 200
    assert api.get(f"/devices/{device_id}").json["profile"] == "named"  # as it was, for the record
    refusal(api.post("/register", PUMP | {"profile": "named"}), "no certificate profile named")


def remove_once_found(api: Api, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Add a profile, which is removed as soon as a module has found it."""
    add(api, NAMED)

    def remove_after(*arguments: Any) -> Any:
        found = find_profiles(*arguments)
        monkeypatch.undo()
        assert api.delete("/profiles/named").status_code == 200
        return found

    monkeypatch.setattr(f"{module}.find_profiles", remove_after)


def test_a_profile_that_is_removed_during_an_upload_costs_its_rows_only(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_once_found(api, monkeypatch, "workflows.bulk.known")
    answers = upload(api, [{"name": "pump-1", "profile": "named"}, {"name": "pump-2"}])
    assert [answer.get("code") for answer in answers] == ["profile_refused", None]


def test_a_profile_that_is_removed_during_a_registration_is_not_given(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_once_found(api, monkeypatch, "workflows.registration")
    refusal(api.post("/register", PUMP | {"profile": "named"}), "no certificate profile named")
    assert api.get("/devices").json["devices"] == []


@pytest.mark.parametrize("way", ["/register", "/register/bulk"])
def test_a_profile_is_locked_before_the_audit_record(api: Api, app: Flask, way: str) -> None:
    """Else a removal, which takes both in this order, and a registration could wait for each other."""
    add(api, NAMED)
    transactions: list[list[str]] = [[]]
    engine = portal_of(app).database.engine

    def begun(_connection: Any) -> None:
        transactions.append([])

    def executed(statement: str, _rows: Any) -> None:
        transactions[-1].append(statement)

    sa.event.listen(engine, "begin", begun)
    device = {"name": "pump-1", "profile": "named", "external_id": "a", "csr": csr_pem()}
    with noting(engine, executed):
        if way == "/register":
            api.register(**device)
        else:
            upload(api, [device])
    [writing] = [seen for seen in transactions if any("INSERT INTO devices" in text for text in seen)]
    profile = next(number for number, text in enumerate(writing) if text.startswith("SELECT certificate_profiles.id"))
    assert profile < next(number for number, text in enumerate(writing) if "FROM audit_heads" in text)


@pytest.mark.parametrize("way", ["/register", "/register/bulk"])
def test_of_two_devices_that_want_one_name_at_once_one_gets_it(
    api: Api, app: Flask, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    another = api_as(app, Role.ADMIN)
    both_have_looked, look = threading.Barrier(2), names._living_owners

    def look_together(*arguments: Any) -> dict[str, str]:
        owners = look(*arguments)
        with contextlib.suppress(threading.BrokenBarrierError):  # one of them waits for the other's transaction
            both_have_looked.wait(0.3)
        return owners

    def code_of(one: Api) -> str:
        if way == "/register":
            return str(one.post(way, PUMP | {"profile": "named"}).json.get("code"))
        return str(upload(one, [{"name": "pump-1", "profile": "named"}])[0].get("code"))

    add(api, NAMED)
    monkeypatch.setattr(names, "_living_owners", look_together)
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(code_of, (api, another)))
    assert sorted(codes) == ["None", "name_in_use"]


def test_a_tenant_neither_takes_another_ones_names_nor_learns_of_them(api: Api, app: Flask) -> None:
    neighbour = api_as(app, Role.ADMIN, "another")
    for one in (api, neighbour):
        add(one, NAMED)
        one.register(name="pump-1", profile="named")
        problem_of(one.post("/register", PUMP | {"profile": "named"}), 409, "name_in_use")
