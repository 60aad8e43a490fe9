"""Bulk registration through the application, on each database; the processes that make keys included."""

from __future__ import annotations

import io
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.errors import DatabaseUnavailable
from core.roles import Role
from operations import jobs
from store import audit
from store.tables import Certificate, Delivery, Device
from tests.support.harness import ON_SQLITE, PER_DEVICE, Api, Clock, api_as, csr_pem, problem_of
from workflows.admission import admit
from workflows.bulk import upload as bulk_upload

DEVICE = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
NDJSON = "application/x-ndjson"


def rows(*changes: dict[str, Any]) -> str:
    return "".join(json.dumps(DEVICE | change) + "\n" for change in changes)


def upload(api: Api, body: str | bytes, media_type: str = NDJSON) -> list[dict[str, Any]]:
    answer = api.call("POST", "/register/bulk", data=body, headers={"Content-Type": media_type})
    assert answer.status_code == 200, answer.text
    assert answer.content_type == NDJSON
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["row"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def path_of(line: dict[str, Any]) -> str:
    return "/download/" + str(line["download_url"]).rpartition("/")[2]


def test_each_row_becomes_a_device_with_a_bundle_of_its_own(api: Api, tmp_path: Path) -> None:
    lines = upload(api, rows(*({"name": f"pump-{number}"} for number in range(3))))
    assert len({line["device_id"] for line in lines}) == 3
    for number, line in enumerate(lines):
        device = api.get(f"/devices/{line['device_id']}").json
        assert device["name"] == f"pump-{number}"
        assert device["status"] == "active"
        assert device["certificate"]["fingerprint"] == line["fingerprint"]
        assert device["certificate"]["serial_number"] == line["serial_number"]
        assert device["expires_at"] == line["expires_at"]
    bundle = tmp_path / "bundle.zip"
    bundle.write_bytes(api.get(path_of(lines[0])).data)
    subprocess.run(["7z", "t", f"-p{lines[0]['bundle_password']}", bundle], check=True, stdout=subprocess.DEVNULL)


@PER_DEVICE
def test_what_one_request_may_say_a_row_may_say(api: Api) -> None:
    topics = '"[{""filter"":""devices/{id}/#"",""access"":""read""}]"'
    csv = "name,type,location,firmware,metadata,validity_days,bundle_password,topics,key_type,external_id\n"
    csv += f'a,pump,"hall 1, left",1.0,"{{""line"": 4}}",7,a password of mine,{topics},ed25519,a-1\n'
    csv += "b,pump,hall 2,1.0,,,,,,\n"
    first, second = upload(api, csv, "text/csv; charset=utf-8")
    device = api.get(f"/devices/{first['device_id']}").json
    assert (device["location"], device["metadata"]) == ("hall 1, left", {"line": 4})
    assert device["topics"] == [{"filter": "devices/{id}/#", "access": "read"}]
    assert first["bundle_password"] == "a password of mine"
    assert first["external_id"] == "a-1"
    certificate = x509.load_pem_x509_certificate(device["certificate"]["certificate"].encode())
    assert type(certificate.public_key()).__name__ == "Ed25519PublicKey"
    assert 6 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 8
    assert api.get(f"/devices/{second['device_id']}").json["location"] == "hall 2"


def test_a_csr_in_a_row_is_answered_with_its_certificate(api: Api) -> None:
    (line,) = upload(api, rows({"csr": csr_pem()}))
    assert "download_url" not in line
    leaf, issuer = x509.load_pem_x509_certificates(line["chain"].encode())
    leaf.verify_directly_issued_by(issuer)
    assert x509.load_pem_x509_certificate(line["certificate"].encode()) == leaf


BAD = [
    (b"{", "malformed_row"),
    (b"\xff", "malformed_row"),
    (b"[]", "invalid_input"),
    (b'{"name": "x"}', "invalid_input"),
    (json.dumps(DEVICE | {"colour": "red"}).encode(), "invalid_input"),
    (json.dumps(DEVICE | {"csr": "no csr"}).encode(), "csr_invalid"),
    (json.dumps(DEVICE | {"csr": csr_pem(ec.generate_private_key(ec.SECP521R1()))}).encode(), "key_refused"),
    (json.dumps(DEVICE | {"topics": [{"filter": "#", "access": "read"}]}).encode(), "topic_refused"),
    (b'"' + b"x" * 200_000 + b'"', "row_too_long"),
    (json.dumps(DEVICE | {"name": "a\0b"}).encode(), "invalid_input"),
]


@ON_SQLITE
def test_a_bad_row_hurts_no_other(api: Api) -> None:
    good = rows({}).encode()
    lines = upload(api, good + b"\n".join(bad for bad, _ in BAD) + b"\n" + good)
    assert [line.get("code") for line in lines] == [None, *(code for _, code in BAD), None]
    for line in lines[1:-1]:
        assert line["detail"].endswith(".")
        assert "no csr" not in json.dumps(line)
    assert lines[4]["errors"][0] == {"field": "type", "message": "is missing"}
    assert len(api.get("/devices").json["devices"]) == 2


@ON_SQLITE
def test_cells_that_do_not_fit_are_said_by_column(api: Api) -> None:
    bad = ("{,", ",x", ",0", "[],", ",²", f",{'9' * 5000}")
    csv = "name,type,location,firmware,metadata,validity_days\n" + "".join(f"a,b,c,1,{cells}\n" for cells in bad)
    lines = upload(api, csv, "text/csv")
    assert [line["errors"][0]["field"] for line in lines] == [
        "metadata", "validity_days", "validity_days", "metadata", "validity_days", "validity_days"
    ]  # fmt: skip


@ON_SQLITE
@pytest.mark.parametrize(
    ("external_id", "shown"), [("line-4/17", "line-4/17"), ("\x1b[2J", None), ("x" * 129, None), (5, None)]
)
def test_a_refused_row_is_named_by_its_external_id_if_a_terminal_can_show_it(
    api: Api, external_id: object, shown: str | None
) -> None:
    [line] = upload(api, json.dumps(DEVICE | {"name": "", "external_id": external_id}))
    assert (line["code"], line.get("external_id")) == ("invalid_input", shown)


# --- The same row again -------------------------------------------------------------------------------------------


def test_a_row_that_was_there_is_no_second_device_and_gets_fresh_credentials(api: Api, app: Flask) -> None:
    body = rows({"external_id": "a-1"}, {"external_id": "a-2"})
    first, other = upload(api, body)
    again, _ = upload(api, body)
    assert again["repeated"] is True
    assert again["device_id"] == first["device_id"]
    assert again["fingerprint"] != first["fingerprint"]
    assert again["download_url"] != first["download_url"]
    assert len(api.get("/devices").json["devices"]) == 2
    problem_of(api.get(path_of(first)), 410, "link_revoked")
    assert api.get(path_of(again)).status_code == 200
    newest, oldest = api.get(f"/devices/{first['device_id']}/certificates").json["certificates"]
    assert (newest["status"], newest["fingerprint"]) == ("active", again["fingerprint"])
    assert (oldest["status"], oldest["revocation_reason"]) == ("revoked", "superseded")
    assert "repeated" not in other
    # On the CRL, as the next reconciliation makes it:
    portal = portal_of(app)
    portal.reconciler.install()
    crl = x509.load_der_x509_crl(portal.inventory.crl(portal.authority.first.issuing.id).der)  # type: ignore[union-attr]  # there is one
    assert crl.get_revoked_certificate_by_serial_number(int(first["serial_number"], 16)) is not None


def test_once_the_bundle_was_fetched_a_repeat_changes_nothing(api: Api) -> None:
    body = rows({"external_id": "a-1"})
    (first,) = upload(api, body)
    assert api.get(path_of(first)).status_code == 200
    (again,) = upload(api, body)
    assert again == {
        "row": 1, "device_id": first["device_id"], "fingerprint": first["fingerprint"], "repeated": True,
        "serial_number": first["serial_number"], "expires_at": first["expires_at"], "external_id": "a-1",
    }  # fmt: skip


def test_a_renewal_that_waits_for_its_fetch_is_left_alone(api: Api) -> None:
    for fetched, external_id in ((True, "a-1"), (False, "a-2")):
        body = rows({"external_id": external_id})
        (first,) = upload(api, body)
        if fetched:
            assert api.get(path_of(first)).status_code == 200
        renewed = api.post(f"/devices/{first['device_id']}/renew", {}).json
        (again,) = upload(api, body)
        assert (again["repeated"], "download_url" in again) == (True, not fetched)
        assert (again["fingerprint"] == renewed["fingerprint"]) is fetched


def test_a_repeated_csr_gets_the_certificate_that_it_had(api: Api) -> None:
    body = rows({"external_id": "a-1", "csr": csr_pem()})
    (first,), (again,) = upload(api, body), upload(api, body)
    assert again == first | {"repeated": True}
    (other,) = upload(api, rows({"external_id": "a-1", "csr": csr_pem()}))
    assert other["code"] == "external_id_taken"


def test_an_expired_bundle_is_made_again_unless_it_was_fetched(api: Api, clock: Clock, app: Flask) -> None:
    body = rows({"external_id": "a-1"}, {"external_id": "a-2"})
    first, second = upload(api, body)
    assert api.get(path_of(second)).status_code == 200
    clock.advance(days=2)
    jobs.expire(portal_of(app))
    fresh, used = upload(api, body)
    assert fresh["download_url"]
    assert fresh["device_id"] == first["device_id"]
    assert "download_url" not in used


@PER_DEVICE
@ON_SQLITE
@pytest.mark.parametrize(
    "change",
    [{"name": "x"}, {"metadata": {"a": 1}}, {"topics": [{"filter": "devices/{id}/a", "access": "read"}]}],
    ids=["name", "metadata", "topics"],
)
def test_a_row_that_says_something_else_of_the_device_is_refused(api: Api, change: dict[str, Any]) -> None:
    (first,) = upload(api, rows({"external_id": "a-1"}))
    (other,) = upload(api, rows({"external_id": "a-1"} | change))
    assert other["code"] == "external_id_taken"
    assert next(iter(change)) in other["detail"]
    assert other["external_id"] == "a-1"
    assert api.get(path_of(first)).status_code == 200  # nothing was taken away


@ON_SQLITE
def test_a_revoked_device_is_not_registered_again(api: Api) -> None:
    (first,) = upload(api, rows({"external_id": "a-1"}))
    api.post(f"/revoke/{first['device_id']}", {})
    (again,) = upload(api, rows({"external_id": "a-1"}))
    assert again["code"] == "state_conflict"


@ON_SQLITE
def test_an_external_id_that_is_twice_in_an_upload_is_one_device(api: Api) -> None:
    lines = upload(api, rows({"external_id": "a-1"}, {"external_id": "b"}, {"external_id": "a-1"}))
    assert [line.get("repeated") for line in lines] == [None, None, True]
    assert lines[0]["device_id"] == lines[2]["device_id"]
    problem_of(api.get(path_of(lines[0])), 410, "link_revoked")
    assert api.get(path_of(lines[2])).status_code == 200


def test_two_uploads_of_one_file_at_once_make_each_device_once(api: Api, app: Flask) -> None:
    body = rows(*({"external_id": f"a-{number}"} for number in range(12)))
    found: list[list[dict[str, Any]]] = []

    def send() -> None:
        found.append(upload(Api(app.test_client(), api.token), body))

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [line for lines in found for line in lines if "code" in line]
    assert len({line["device_id"] for lines in found for line in lines}) == 12
    with portal_of(app).database.snapshot() as tx:
        active = sa.select(sa.func.count()).where(Certificate.purpose == "device", Certificate.status == "active")
        assert tx.execute(active).scalar_one() == 12


# --- Batches ------------------------------------------------------------------------------------------------------


def test_processes_make_what_is_much(api: Api, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_upload, "BATCH", 40)
    changes = [{"external_id": f"a-{number}", "name": f"n-{number}"} for number in range(130)]
    changes[60]["csr"] = csr_pem()
    lines = upload(api, rows(*changes))
    assert [line["external_id"] for line in lines] == [change["external_id"] for change in changes]
    assert "chain" in lines[60]
    assert lines[129]["download_url"]
    with portal_of(app).database.snapshot() as tx:
        assert tx.execute(sa.select(sa.func.count()).select_from(Device)).scalar_one() == 130
        verdict = audit.verify(tx, "default")
    assert verdict.problem is None
    portal = portal_of(app)
    entries = portal.operators.audit("default", limit=200, before=None, filters={"action": "device:register"})[0]
    assert {entry.object for entry in entries} == {f"device:{line['device_id']}" for line in lines}


class Cut(io.BytesIO):
    """A body whose sender goes away."""

    def check(self) -> None:
        pass

    def read_some(self, _wait: float | None = None) -> bytes:
        part = self.read(4000)
        if not part:
            raise ConnectionResetError
        return part


@ON_SQLITE
def test_who_goes_away_leaves_whole_batches_and_sending_it_all_again_finishes_it(
    api: Api, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_upload, "BATCH", 10)
    body = rows(*({"external_id": f"a-{number}"} for number in range(95))).encode()
    answer = api.call("POST", "/register/bulk", input_stream=Cut(body), headers={"Content-Type": NDJSON})
    with pytest.raises(ConnectionResetError):
        _ = answer.data
    answer.close()
    with portal_of(app).database.snapshot() as tx:
        there = tx.execute(sa.select(sa.func.count()).select_from(Device)).scalar_one()
    assert there % 10 == 0
    assert 0 < there < 95
    lines = upload(api, body)
    assert [line.get("repeated", False) for line in lines] == [number < there for number in range(95)]
    assert all(line["download_url"] for line in lines)
    with portal_of(app).database.snapshot() as tx:
        assert tx.execute(sa.select(sa.func.count()).select_from(Device)).scalar_one() == 95
        waiting = sa.select(sa.func.count()).where(Delivery.status == "ready")
        assert tx.execute(waiting).scalar_one() == 95


# --- Limits and refusals ------------------------------------------------------------------------------------------


@pytest.fixture
def small(make_settings: Callable[..., Settings]) -> Iterator[Flask]:
    """An application that takes small uploads, one at a time."""
    limits = {"PORTAL_BULK_MAX_ROWS": "2", "PORTAL_BULK_MAX_BYTES": "1024", "PORTAL_BULK_UPLOADS": "1"}
    built = create_app(make_settings(**limits), background=False)
    yield built
    portal_of(built).close()


@ON_SQLITE
def test_rows_beyond_the_most_are_not_looked_at(small: Flask) -> None:
    lines = upload(api_as(small, Role.OPERATOR), rows({}, {}, {}, {}))
    assert [line.get("code") for line in lines] == [None, None, "too_many_rows"]
    assert (lines[2]["row"], lines[2]["stopped"]) == (3, True)


@ON_SQLITE
def test_an_upload_that_is_too_long_is_refused(small: Flask) -> None:
    answer = api_as(small, Role.OPERATOR).call(
        "POST", "/register/bulk", data=b" " * 1025, headers={"Content-Type": NDJSON}
    )
    problem_of(answer, 413, "body_too_large")


@ON_SQLITE
def test_there_is_a_most_of_uploads_at_a_time(small: Flask) -> None:
    api = api_as(small, Role.OPERATOR)
    with portal_of(small).bulk.place("default"):
        answer = api.call("POST", "/register/bulk", data=rows({}), headers={"Content-Type": NDJSON})
        problem_of(answer, 503, "too_many_uploads")
        assert answer.headers["Retry-After"]
    assert len(upload(api, rows({}))) == 1


@ON_SQLITE
def test_what_stops_the_portal_stops_the_upload_at_a_batch(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    body = rows(*({"external_id": f"a-{number}"} for number in range(30)))
    monkeypatch.setattr(bulk_upload, "BATCH", 10)
    whole = admit
    written = 0

    def once(*arguments: Any, **options: Any) -> Any:
        nonlocal written
        written += 1
        if written > 1:
            raise DatabaseUnavailable("The database is away.")
        return whole(*arguments, **options)

    monkeypatch.setattr("workflows.bulk.batch.admit", once)
    *done, last = upload(api, body)
    assert len(done) == 10
    assert last == {"row": 11, "code": "database_unavailable", "detail": "The database is away.", "stopped": True}


@ON_SQLITE
def test_the_form_of_the_body_must_be_one_that_is_read(api: Api) -> None:
    answer = api.call("POST", "/register/bulk", data="[]", headers={"Content-Type": "application/json"})
    problem_of(answer, 415, "unsupported_media_type")


@ON_SQLITE
@pytest.mark.parametrize("body", ["", "name\n", "colour,name,type,location,firmware\n"])
def test_csv_must_name_its_columns(api: Api, body: str) -> None:
    problem_of(
        api.call("POST", "/register/bulk", data=body, headers={"Content-Type": "text/csv"}), 422, "invalid_input"
    )


@ON_SQLITE
def test_nothing_is_an_upload_without_rows(api: Api) -> None:
    assert upload(api, "") == []


# --- The external id elsewhere --------------------------------------------------------------------------------------


def test_a_single_registration_takes_an_external_id_which_is_no_other_devices(api: Api) -> None:
    first = api.register(external_id="a-1")
    assert api.get(f"/devices/{first['device_id']}").json["external_id"] == "a-1"
    api.register()
    (found,) = api.get("/devices?external_id=a-1").json["devices"]
    assert found["device_id"] == first["device_id"]
    assert api.get("/devices?external_id=a-2").json["devices"] == []
    answer = api.post("/register", DEVICE | {"external_id": "a-1"})
    assert first["device_id"] in problem_of(answer, 409, "external_id_taken")["detail"]
    (line,) = upload(api, rows({"external_id": "a-1"}))
    assert line["device_id"] == first["device_id"]


def test_uploads_and_registrations_of_the_same_devices_at_once_do_not_wait_for_each_other(api: Api, app: Flask) -> None:
    names = [f"a-{number}" for number in range(10)]
    found: list[int | str] = []

    def send(order: list[str]) -> None:
        found.extend(line.get("code", 200) for line in upload(Api(app.test_client(), api.token), rows(
            *({"external_id": name} for name in order)
        )))  # fmt: skip

    def register(path: str = "/register") -> None:
        one = Api(app.test_client(), api.token)
        found.extend(one.post(path, DEVICE | {"external_id": name}).status_code for name in reversed(names))

    threads = [threading.Thread(target=send, args=(order,)) for order in (names, names[::-1])]
    threads += [threading.Thread(target=register), threading.Thread(target=register, args=("/devices",))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) <= {200, 201, 409, "busy", "state_conflict"}  # nobody has waited until the database ended it


@ON_SQLITE
def test_a_dry_run_knows_every_rule_and_writes_nothing(api: Api) -> None:
    known = DEVICE | {"external_id": "unit-1"}
    stolen, used, twice = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    upload(api, json.dumps(known))
    device_id = api.register(csr=csr_pem(stolen))["device_id"]
    api.post(f"/revoke/{device_id}", {"reason": "key_compromise"})
    api.register(csr=csr_pem(used))
    changes: list[dict[str, Any]] = [
        {}, {"name": "two\nlines"}, {"name": "a\0b"}, {"name": "\u00a0pump"}, {"name": " pump "}, {"name": "\u202e"},
        {"metadata": {"a": "\0"}}, {"csr": "none"}, {"topics": [{"filter": "#", "access": "read"}]},
        {"external_id": "unit-1"}, {"external_id": "unit-1", "firmware": "2"}, {"external_id": "unit-2"},
        *({"csr": csr_pem(key)} for key in (stolen, used, twice, twice)),
    ]  # fmt: skip
    before = api.get("/devices").json, api.get("/audit").json
    answer = api.call("POST", "/register/bulk?dry_run=true", data=rows(*changes), headers={"Content-Type": NDJSON})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert (api.get("/devices").json, api.get("/audit").json) == before
    assert all(line["dry_run"] is True and "device_id" not in line for line in lines)
    assert [line.get("code") for line in lines] == [
        None, *["invalid_input"] * 6, "csr_invalid", "topic_refused", None, "external_id_taken", None,
        "key_compromised", "key_in_use", None, "key_in_use",
    ]  # fmt: skip
    assert [line["row"] for line in lines if line.get("repeated")] == [10]
    real = upload(api, rows(*changes))
    assert [line.get("code") for line in real] == [line.get("code") for line in lines]


@ON_SQLITE
def test_a_dry_run_that_is_neither_true_nor_false_is_refused(api: Api) -> None:
    answer = api.call("POST", "/register/bulk?dry_run=yes", data=rows({}), headers={"Content-Type": NDJSON})
    problem_of(answer, 422, "invalid_input")
    assert api.get("/devices").json["devices"] == []
