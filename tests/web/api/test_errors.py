"""Bad input gets a clear error and changes nothing; every error has the same form."""

from __future__ import annotations

import base64
import json
import logging
import re
import secrets
import textwrap
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flask import Flask

from app import ROUTES, portal_of
from core import errors
from core.roles import Role
from tests.support.harness import Api, Clock, api_as, csr_pem, problem_of, state_of
from web.api.problems import STATUS_OF
from workflows.devices import Inventory

PUMP = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
ID = "3f2b8c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b"
OTHER = "00000000-0000-4000-8000-000000000000"


@dataclass(frozen=True)
class Bad:
    """An invalid request; ``{active}`` and ``{revoked}`` in its path are existing devices."""

    request: str
    status: int
    code: str
    json: Any = None
    data: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()


def register(*fields: str, without: str = "", **changes: Any) -> Bad:
    """A registration that is refused for ``fields``."""
    body = {name: value for name, value in (PUMP | changes).items() if name != without}
    return Bad("POST /register", 422, "invalid_input", json=body, fields=fields)


def not_json(data: bytes) -> Bad:
    return Bad("POST /register", 400, "malformed_request", data=data, headers={"Content-Type": "application/json"})


def topic(pattern: str) -> Bad:
    topics = [{"filter": pattern, "access": "read"}]
    return Bad("POST /register", 422, "topic_refused", json={**PUMP, "topics": topics}, fields=("topics.0.filter",))


def nested(depth: int) -> dict[str, Any]:
    return {"in": nested(depth - 1)} if depth > 1 else {}


TEXTS = {
    "of the wrong type, a number": 5,
    "of the wrong type, null": None,
    "of the wrong type, a list": ["pump"],
    "of the wrong type, an object": {"a": 1},
    "empty": "",
    "over-long": "x" * 129,
    "blank": "   ",
    "with white space before it": " pump",
    "with white space after it": "pump ",
    "with a newline": "pump\ntopic readwrite #",
    "with a carriage return and ACL syntax": "pump\r\nuser other\r\ntopic #",
    "with a NUL": "pu\0mp",
    "with an escape sequence": "pu\x1b[2Jmp",
    "with a C1 control": "pu\x9bmp",
    "with a line separator": "pu\u2028mp",
    "with a text direction override": "pu\u202emp",
    "with a zero width space": "pu\u200bmp",
}
BAD_FIELDS: dict[str, Bad] = {
    **{f"name {what}": register("name", name=text) for what, text in TEXTS.items()},
    **{f"PATCH name {what}": Bad("PATCH /devices/{active}", 422, "invalid_input", json={"name": text}, fields=("name",))
       for what, text in TEXTS.items()},
    "type over-long": register("type", type="x" * 65),
    "location over-long": register("location", location="x" * 129),
    "firmware with a tab": register("firmware", firmware="1\t0"),
    "a field is missing": register("location", without="location"),
    "every field is missing": Bad("POST /register", 422, "invalid_input", json={},
                                  fields=("name", "type", "location", "firmware")),
    "a field is unknown": register("nmae", nmae="pump"),
    "a field is unknown, of a terminal's language": register("a\\x1b[2Jb\\n", **{"a\x1b[2Jb\n": "x"}),
    "a list for the body": Bad("POST /register", 422, "invalid_input", json=[PUMP], fields=("body",)),
    "null for the body": Bad("POST /register", 422, "invalid_input", data=b"null",
                             headers={"Content-Type": "application/json"}, fields=("body",)),
    "metadata a list": register("metadata", metadata=[]),
    "metadata too deep": register("metadata", metadata=nested(6)),
    "metadata too long": register("metadata", metadata={"a": "é" * 4096}),
    "metadata with a control character": register("metadata", metadata={"a": ["b\n"]}),
    "metadata with a NUL in a name": register("metadata", metadata={"a\0": 1}),
    "metadata with a huge number": register("metadata", metadata={"a": 2**53 + 1}),
    "metadata with what is no number": register("metadata", metadata={"a": float("nan")}),
    "key type unknown": register("key_type", key_type="rsa-1024"),
    "validity as text": register("validity_days", validity_days="30"),
    "validity of nothing": register("validity_days", validity_days=0),
    "validity of a century and more": register("validity_days", validity_days=36501),
    "validity in halves": register("validity_days", validity_days=1.5),
    "validity true": register("validity_days", validity_days=True),
    "bundle password short": register("bundle_password", bundle_password="elevenchars"),
    "bundle password over-long": register("bundle_password", bundle_password="x" * 129),
    "bundle password with a newline": register("bundle_password", bundle_password="a password with\n"),
    "bundle password beyond ASCII": register("bundle_password", bundle_password="pässwörter-lang"),
    "no topics": register("topics", topics=[]),
    "too many topics": register("topics", topics=[{"filter": f"devices/{{id}}/{n}", "access": "read"}
                                                  for n in range(33)]),
    "topic with an unknown access": register("topics.0.access", topics=[{"filter": "devices/{id}/a",
                                                                         "access": "deny"}]),
    "topic with an unknown field": register("topics.0.qos", topics=[{"filter": "devices/{id}/a", "access": "read",
                                                                     "qos": 1}]),
    "topics as text": register("topics", topics="devices/{id}/#"),
    "nothing to change": Bad("PATCH /devices/{active}", 422, "invalid_input", json={}, fields=("body",)),
    "status cannot be set": Bad("PATCH /devices/{revoked}", 422, "invalid_input", json={"status": "active"},
                                fields=("status",)),
    "id cannot be set": Bad("PATCH /devices/{active}", 422, "invalid_input", json={"device_id": OTHER},
                            fields=("device_id",)),
    "reason unknown": Bad("POST /revoke/{active}", 422, "invalid_input", json={"reason": "because"},
                          fields=("reason",)),
    "reason that is not for revoking": Bad("POST /revoke/{active}", 422, "invalid_input",
                                           json={"reason": "certificate_hold"}, fields=("reason",)),
    "role unknown": Bad("POST /tokens", 422, "invalid_input", json={"name": "x", "role": "root"}, fields=("role",)),
    "token name with a newline": Bad("POST /tokens", 422, "invalid_input", json={"name": "x\ny", "role": "admin"},
                                     fields=("name",)),
    "token for ever and a day": Bad("POST /tokens", 422, "invalid_input",
                                    json={"name": "x", "role": "admin", "expires_in_days": 3651},
                                    fields=("expires_in_days",)),
    "idempotency key too short": Bad("POST /register", 422, "invalid_input", json=PUMP,
                                     headers={"Idempotency-Key": "fifteen-letters"}, fields=("Idempotency-Key",)),
    "idempotency key too long": Bad("POST /register", 422, "invalid_input", json=PUMP,
                                    headers={"Idempotency-Key": "x" * 256}, fields=("Idempotency-Key",)),
}  # fmt: skip
BAD_TOPICS: dict[str, Bad] = {
    f"topic {pattern!r}": topic(pattern)
    for pattern in (
        "#",
        "+/x",
        "devices/#",
        "devices/+/x",
        "devices/+",
        f"devices/{OTHER}/#",
        f"devices/{OTHER.replace('-', '')}/a",
        "$SYS/#",
        "$share/g/devices/{id}/a",
        "/devices/{id}/a",
        "devices//a",
        "devices/{id}/",
        "other/{id}/a",
        "devices/{id}/a#",
        "devices/{id}/#/a",
        "devices/{id}/a+",
        "devices/{id}x/a",
        "devices/{id}/%u",
        "devices/{id}/%c",
        "devices/{id}/a\ntopic readwrite #",
        "devices/{id}/a\r",
        "devices/{id}/\0",
        "devices/{id}/é",
        "devices",
        "devices/{id}/" + "x" * 220,
    )
} | {
    "PATCH to another's topic": Bad(
        "PATCH /devices/{active}",
        422,
        "topic_refused",
        fields=("topics.0.filter",),
        json={"topics": [{"filter": f"devices/{OTHER}/#", "access": "readwrite"}]},
    ),
}
BAD_BODIES: dict[str, Bad] = {
    "cut off": not_json(b'{"name": "pump'),
    "nothing": not_json(b""),
    "not UTF-8": not_json(b'{"name": "\xff"}'),
    "UTF-16": not_json(json.dumps(PUMP).encode("utf-16")),
    "single quotes": not_json(b"{'name': 'pump'}"),
    "a lone surrogate": not_json(b'{"name": "\\ud800"}'),
    "very deep": not_json(b'{"metadata": ' + b'{"a":' * 20000),
    "two documents": not_json(b"{}{}"),
    "too large": Bad("POST /register", 413, "body_too_large", data=b" " * (1 << 20) + b"{}",
                     headers={"Content-Type": "application/json"}),
    "of another type": Bad("POST /register", 415, "unsupported_media_type", data=b"name=pump",
                           headers={"Content-Type": "application/x-www-form-urlencoded"}),
    "of no type": Bad("POST /register", 415, "unsupported_media_type", data=json.dumps(PUMP).encode()),
    "of another type for PATCH": Bad("PATCH /devices/{active}", 415, "unsupported_media_type", data=b"{}",
                                     headers={"Content-Type": "application/merge-patch+json"}),
    "of another type though optional": Bad("POST /revoke/{active}", 415, "unsupported_media_type", data=b"x",
                                           headers={"Content-Type": "text/plain"}),
    "not JSON though optional": Bad("POST /revoke/{active}", 400, "malformed_request", data=b"x",
                                    headers={"Content-Type": "application/json"}),
}  # fmt: skip


def cursor(*parts: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


BAD_QUERIES: dict[str, Bad] = {
    f"{path} {query}": Bad(f"GET {path}?{query}", 422, "invalid_input", fields=(query.partition("=")[0],))
    for path, queries in {
        "/devices": (
            "limit=0",
            "limit=201",
            "limit=-1",
            "limit=ten",
            "limit=1e2",
            "limit=",
            "limit=%D9%A3",
            "limit=99999999999999",
            "status=gone",
            "sort=colour",
            "type=",
            "q=a%00b",
            "type=x%0Ay",
            "expires_before=tomorrow",
            "expires_before=2027-01-31",
            "expires_before=2027-01-31T00:00:00",
            "expires_before=0001-01-01T00:00:00%2B14:00",
            "expires_before=2027-W01-1T00:00:00Z",
            "expires_before=1800000000",
            "limit=1&limit=2",
            "cursor=",
            "cursor=!",
            "cursor=abc",
            f"cursor={'x' * 129}",
            f"cursor={cursor(1, ID)}",
            f"cursor={cursor('2030-01-01', 5)}",
            f"cursor={cursor('2030-01-01T00:00:00+00:00', chr(0) * 36)}",
            f"cursor={cursor('2030-01-01T00:00:00+00:00')}",
            f"cursor={cursor('0001-01-01T00:00:00+14:00', ID)}",
            f"cursor={cursor('9999-12-31T23:59:59-14:00', ID)}",
        ),
        "/audit": ("limit=0", "cursor=x", "cursor=-1", f"cursor={'9' * 19}", "outcome=maybe", "at=2030", "actor=%0A"),
    }.items()
    for query in queries
}
BAD_PATHS: dict[str, Bad] = {
    **{f"{method} of {what}": Bad(f"{method} {path.format(part)}", 404, "device_not_found", json=body)
       for method, path, body in (("GET", "/devices/{}", None), ("GET", "/devices/{}/certificates", None),
                                  ("PATCH", "/devices/{}", {"name": "x"}), ("POST", "/revoke/{}", None))
       for what, part in {"nobody": OTHER, "no UUID": "1", "upper case": ID.upper(), "a URN": f"urn:uuid:{ID}",
                          "braces": f"%7B{ID}%7D", "a NUL": f"{ID}%00", "a newline": f"{ID}%0A", "SQL": "'%20OR%201=1",
                          "an ACL": "%23", "over-long": "x" * 500}.items()},
    **{f"token {what}": Bad(f"DELETE /tokens/{part}", 404, "not_found")
       for what, part in {"nobody's": "0" * 16, "upper case": "A" * 16, "a NUL": "0" * 15 + "%00", "SQL": "'--",
                          "over-long": "0" * 500}.items()},
    "no such path": Bad("GET /nothing", 404, "not_found"),
    "a slash more": Bad("GET /devices/", 404, "not_found"),
    "two slashes": Bad("GET /devices//", 404, "not_found"),
    "a path out": Bad("GET /devices/..%2f..%2fsecrets", 404, "not_found"),
    "a segment too long": Bad(f"GET /devices/{'x' * 513}", 404, "not_found"),
    "no such method": Bad("DELETE /devices/{active}", 405, "method_not_allowed"),
    "a method that nobody knows": Bad("BREW /devices", 405, "method_not_allowed"),
    "options": Bad("OPTIONS /register", 405, "method_not_allowed"),
    "GET of a POST": Bad("GET /register", 405, "method_not_allowed"),
    "change of a revoked device": Bad("PATCH /devices/{revoked}", 409, "state_conflict", json={"name": "back"}),
}  # fmt: skip
BAD_TOKENS: dict[str, Bad] = {
    f"authorization {what}": Bad("GET /devices", 401, "unauthenticated", headers={"Authorization": header})
    for what, header in {
        "empty": "",
        "of no scheme": "op_" + "x" * 43,
        "Basic": "Basic YWRtaW46YWRtaW4=",
        "without a token": "Bearer",
        "blank": "Bearer  ",
        "wrong": "Bearer op_" + "x" * 43,
        "not ASCII": "Bearer op_é",
        "over-long": "Bearer " + "x" * 9000,
        "two": "Bearer a, Bearer b",
        "SQL": "Bearer ' OR 1=1 --",
    }.items()
}
BAD = BAD_FIELDS | BAD_TOPICS | BAD_BODIES | BAD_QUERIES | BAD_PATHS | BAD_TOKENS


@pytest.fixture(scope="module")
def admin(shared_app: Flask) -> Api:
    return api_as(shared_app, Role.ADMIN)


@pytest.fixture(scope="module")
def devices(admin: Api) -> dict[str, str]:
    active, revoked = (admin.register()["device_id"] for _ in range(2))
    admin.post(f"/revoke/{revoked}")
    return {"active": active, "revoked": revoked}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_gets_a_clear_error_and_changes_nothing(
    shared_app: Flask, admin: Api, devices: dict[str, str], bad: Bad
) -> None:
    before = state_of(portal_of(shared_app))
    method, path = bad.request.split(" ", 1)
    path = re.sub(r"\{(\w+)\}", lambda name: devices[name[1]], path)
    answer = admin.call(method, path, bad.json, data=bad.data, headers=bad.headers)
    problem = problem_of(answer, bad.status, bad.code)
    for name in bad.fields:
        assert name in [error["field"] for error in problem["errors"]]
    assert all(error["message"] for error in problem.get("errors", ()))
    assert answer.text.isprintable()
    assert "^" not in problem["detail"]  # words, and no pattern
    assert (answer.status_code == 405) == ("Allow" in answer.headers)
    assert state_of(portal_of(shared_app)) == before


def test_an_error_names_at_most_32_fields(admin: Api) -> None:
    answer = admin.post("/register", PUMP | {f"field-{number}": 1 for number in range(100)})
    assert len(problem_of(answer, 422, "invalid_input")["errors"]) == 32


def test_of_thousands_of_unknown_fields_only_their_number_is_answered(admin: Api) -> None:
    answer = admin.post("/register", PUMP | {f"field-{number}": 1 for number in range(20_000)})
    (error,) = problem_of(answer, 422, "invalid_input")["errors"]
    assert error == {"field": "body", "message": "has 20000 unknown or invalid fields; see /docs"}


def test_metadata_that_are_too_long_are_refused_before_their_values_are_looked_at(admin: Api) -> None:
    answer = admin.post("/register", PUMP | {"metadata": {"a": ["\n"] * 60_000}})
    (error,) = problem_of(answer, 422, "invalid_input")["errors"]
    assert error == {"field": "metadata", "message": "must be at most 8192 bytes of JSON"}


@pytest.mark.parametrize(
    ("request_line", "form"),
    [
        ("GET /devices/{}", "UUID"),
        ("DELETE /tokens/{}", "hexadecimal"),
        ("DELETE /webhooks/{}", "hexadecimal"),
        ("DELETE /enrolment-tokens/{}", "hexadecimal"),
        ("GET /manufacturers/{}", "hexadecimal"),
    ],
)
def test_an_id_of_another_form_is_refused_with_the_form_of_ids(admin: Api, request_line: str, form: str) -> None:
    method, path = request_line.format("x%00y").split(" ")
    answer = admin.call(method, path)
    assert answer.status_code == 404
    assert form in answer.json["detail"]


# --- CSRs ---------------------------------------------------------------------------------------------------------


def der_of(pem: str) -> bytes:
    return base64.b64decode("".join(pem.strip().splitlines()[1:-1]))


def pem_of(der: bytes) -> str:
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n"


def with_bad_signature() -> str:
    der = bytearray(der_of(csr_pem()))
    der[-5] ^= 1
    return pem_of(bytes(der))


def private_key() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def weak_rsa() -> str:
    return csr_pem(rsa.generate_private_key(65537, 1024))  # noqa: S505 - weak, to be refused


BAD_CSRS = {
    "empty": ("csr_invalid", lambda: ""),
    "no PEM": ("csr_invalid", lambda: "a CSR, honestly"),
    "no Base64": ("csr_invalid", lambda: csr_pem().replace("\nM", "\n!")),
    "truncated PEM": ("csr_invalid", lambda: csr_pem()[:200]),
    "truncated DER": ("csr_invalid", lambda: pem_of(der_of(csr_pem())[:-20])),
    "more after the DER": ("csr_invalid", lambda: pem_of(der_of(csr_pem()) + b"more")),
    "bad signature": ("csr_invalid", with_bad_signature),
    "two CSRs": ("csr_invalid", lambda: csr_pem() + csr_pem()),
    "a private key": ("csr_invalid", private_key),
    "RSA of 1024 bits": ("key_refused", weak_rsa),
    "RSA with exponent 3": ("key_refused", lambda: csr_pem(rsa.generate_private_key(3, 2048))),
    "a curve that is not accepted": ("key_refused", lambda: csr_pem(ec.generate_private_key(ec.SECP256K1()))),
    "a curve too strong": ("key_refused", lambda: csr_pem(ec.generate_private_key(ec.SECP521R1()))),
    "over-long": ("invalid_input", lambda: csr_pem() + "\n" * 16384),
    "100 KB": ("invalid_input", lambda: pem_of(secrets.token_bytes(75_000))),
    "with a NUL in it": ("csr_invalid", lambda: csr_pem().replace("\n", "\0")),
}  # fmt: skip


@pytest.mark.parametrize(("code", "make"), BAD_CSRS.values(), ids=BAD_CSRS)
def test_a_bad_csr_gets_a_clear_error_and_changes_nothing(shared_app: Flask, admin: Api, code: str, make: Any) -> None:
    csr = make()
    before = state_of(portal_of(shared_app))
    answer = admin.post("/register", {**PUMP, "csr": csr})
    problem = problem_of(answer, 422, code)
    assert [error["field"] for error in problem["errors"]] == ["csr"]
    assert "PRIVATE" not in answer.text
    assert not [line for line in csr.splitlines() if len(line) > 40 and line in answer.text]
    assert state_of(portal_of(shared_app)) == before


@pytest.mark.parametrize("also", [{"key_type": "ed25519"}, {"bundle_password": "a long enough one"}])
def test_a_csr_excludes_the_fields_of_a_generated_key(admin: Api, also: dict[str, str]) -> None:
    problem = problem_of(admin.post("/register", {**PUMP, "csr": csr_pem(), **also}), 422, "invalid_input")
    assert problem["errors"][0]["field"] == "csr"


def test_a_certificate_is_refused_as_a_csr(admin: Api) -> None:
    certificate = admin.get("/ca.pem").text
    problem_of(admin.post("/register", {**PUMP, "csr": certificate}), 422, "csr_invalid")


def test_the_key_of_the_ca_itself_is_not_certified(shared_app: Flask, admin: Api) -> None:
    key = portal_of(shared_app).authority.first.issuing.issuer.key
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    problem_of(admin.post("/register", {**PUMP, "csr": csr_pem(key)}), 422, "key_refused")


# --- What is not echoed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {**PUMP, "bundle_password": "hunter2hunter2\n"},
        {**PUMP, "bundle_password": ["hunter2hunter2"]},
        {**PUMP, "csr": "hunter2hunter2"},
        {**PUMP, "metadata": {"a": "hunter2\n"}},
        {**PUMP, "key_type": "hunter2"},
        {**PUMP, "bundle_password": "hunter2hunter2", "nmae": "hunter2"},
    ],
)
def test_an_error_never_contains_the_value_of_a_field(
    admin: Api, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = admin.post("/register", body)
    assert answer.status_code == 422
    assert "hunter2" not in answer.text
    assert "hunter2" not in "".join(str(vars(record)) for record in caplog.records if record.name != "werkzeug")


# --- Tokens and conflicts -----------------------------------------------------------------------------------------


def test_expired_and_revoked_tokens_are_refused(api: Api, app: Flask, clock: Clock) -> None:
    expired, revoked = (
        api.post("/tokens", {"name": "x", "role": "admin", "expires_in_days": 1}).json for _ in range(2)
    )
    api.delete(f"/tokens/{revoked['token_id']}")
    clock.advance(days=1, seconds=1)
    before = state_of(portal_of(app))
    for made in (expired, revoked):
        problem_of(Api(api.client, made["token"]).post("/register", PUMP), 401, "unauthenticated")
    assert state_of(portal_of(app)) == before


def test_an_idempotency_key_with_another_body_is_a_conflict(api: Api, app: Flask) -> None:
    headers = {"Idempotency-Key": "a-key-of-16-chars"}
    assert api.post("/register", PUMP, headers=headers).status_code == 201
    before = state_of(portal_of(app))
    problem_of(api.post("/register", {**PUMP, "name": "b"}, headers=headers), 409, "idempotency_conflict")
    assert state_of(portal_of(app)) == before


def test_an_unavailable_dependency_is_a_503(admin: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise errors.DatabaseUnavailable("The database does not answer, is read-only or full; try again shortly.")

    monkeypatch.setattr(Inventory, "devices", away)
    answer = admin.get("/devices")
    problem_of(answer, 503, "database_unavailable")
    assert int(answer.headers["Retry-After"]) > 0


# --- Failures of the portal's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("inner workings"),
        errors.ProjectionInvalid("inner workings."),
        errors.StartupError("inner workings."),
        errors.PortalError("inner workings."),
        KeyError("inner workings"),
        RecursionError("inner workings"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_the_body_of_a_500_is_constant_and_only_the_log_has_its_cause(
    admin: Api, failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(Inventory, "device", fails)
    answer = admin.get(f"/devices/{ID}")
    problem = problem_of(answer, 500, "internal_error")
    assert problem["detail"] == "Unexpected error; the portal's log has the cause under this request id."
    assert set(problem) == {"type", "title", "status", "detail", "code", "request_id"}
    assert "inner workings" not in answer.text
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is failure
    assert vars(record)["request_id"] == problem["request_id"]


def test_every_error_of_the_portal_has_a_status() -> None:
    def below(kind: type[errors.PortalError]) -> list[type[errors.PortalError]]:
        return [kind, *(inner for child in kind.__subclasses__() for inner in below(child))]

    for kind in below(errors.PortalError):
        nearest = next(STATUS_OF[ancestor] for ancestor in kind.__mro__ if ancestor in STATUS_OF)
        internal = (errors.StartupError, errors.ProjectionInvalid, errors.SignatureCheckFailed)
        assert (nearest == 500) == (kind is errors.PortalError or issubclass(kind, internal)), kind


def test_the_tree_drawn_in_the_docstring_is_the_tree() -> None:
    drawn: dict[str, tuple[str, int]] = {}
    path: list[tuple[int, str]] = []
    status = 500
    for line in (errors.__doc__ or "").partition("::\n")[2].splitlines():
        indent, words = len(line) - len(line.lstrip()), re.split(" {2,}", line.strip())
        names = [word for word in words if word in vars(errors)]
        while path and path[-1][0] >= indent:
            path.pop()
        if len(path) <= 1:
            status = next((int(word[:3]) for word in words if word[:3].isdigit()), 500)
        drawn.update(dict.fromkeys(names, (path[-1][1] if path else "Exception", status)))
        path += [(indent, name) for name in names[:1]]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PortalError)]
    for kind in kinds:
        nearest = next(STATUS_OF[ancestor] for ancestor in kind.__mro__ if ancestor in STATUS_OF)
        assert drawn.pop(kind.__name__) == (kind.__bases__[0].__name__, nearest)
    assert not drawn


# --- The request id -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_answer_has_the_request_id_that_is_in_the_log(
    admin: Api, route: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="portal.request")
    path = re.sub(r"\{\w+\}", ID, route.path)
    answer = admin.call(route.method, path, headers={"X-Request-Id": "chosen by the client"})
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-Id"])
    [line] = [record for record in caplog.records if record.getMessage() == "request"]
    fields = vars(line)
    assert fields["request_id"] == answer.headers["X-Request-Id"]
    assert (fields["method"], fields["route"]) == (route.method, route.path)
    assert fields["status"] == answer.status_code
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_only_the_key_of_a_csr_is_used(api: Api) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    wish = x509.SubjectAlternativeName([x509.DNSName("broker.example.com")])
    authority = x509.BasicConstraints(ca=True, path_length=None)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(wish, critical=False).add_extension(authority, critical=True)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    certificate = x509.load_pem_x509_certificate(api.register(csr=csr)["certificate"].encode())
    assert "broker.example.com" not in str(certificate.extensions)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
