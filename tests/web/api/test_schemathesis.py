"""The application keeps to its OpenAPI text, whatever is sent: judged by schemathesis.

No server error (503 only where it is documented), no status and no media type that is not described, every answer of
the form described, what does not fit refused, what fits accepted.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from flask import Flask
from schemathesis.checks import load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.generation.feedback import FeedbackSources
from schemathesis.pytest._test_builder import build_operation_test
from schemathesis.python._constants.orchestrator import make_constants_value_source
from schemathesis.specs.openapi.checks import allow_header_conformance, negative_data_rejection, unsupported_method

from app import ROUTES
from core.roles import Role
from core.states import METADATA_BYTES
from tests.support.harness import ALL, ON_SQLITE, Api, api_as, csr_pem
from tests.support.pki import PEM, Authority
from web.api.openapi import openapi
from web.api.problems import IN_PLAIN_TEXT, OF_DEVICES

CONFIG: dict[str, Any] = {
    "seed": 1,
    "generation": {"deterministic": True, "max-examples": 60 if ALL else 15, "database": "none"},
    "checks": {
        "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "503"]},
        # What fits may still not exist (404), not be possible (409) or be over (410); it is never called malformed.
        "positive_data_acceptance": {"expected-statuses": ["2xx", "404", "409", "410", "503"]},
    },
}


INSIDE = "https://localhost:8443/"  # fits, and nothing is ever sent there


class Application:
    """The WSGI application under test, which exists only once the fixtures have made it."""

    made: Flask | None = None

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        assert self.made is not None
        return self.made(environ, start_response)


@schemathesis.serializer("application/x-ndjson")
def lines_of_text(_context: object, value: object) -> bytes:
    return str(value).encode()


application = Application()
schema = schemathesis.openapi.from_dict(
    openapi(ROUTES, server_url="http://localhost"), config=SchemathesisConfig.from_dict(CONFIG)
)
schema.app = application
OPERATIONS = [made.ok() for made in list[Any](schema.get_all_operations())]


@schemathesis.serializer("application/ocsp-request", "application/pkcs10")
def as_it_is(_context: object, value: object) -> bytes:
    """A body that is bytes; to a reader of bytes nothing is of the wrong type."""
    return value if isinstance(value, bytes) else str(value).encode()


@dataclass
class There:
    """What is really there, to be asked for now and then in place of what is made up."""

    api: Api
    csr: str
    parts_of_paths: dict[str, str]
    basic: str  # an enrolment token, as HTTP Basic authentication has it
    numbers: Iterator[int] = field(default_factory=itertools.count)


@pytest.fixture(scope="module")
def there(shared_app: Flask) -> There:
    application.made = shared_app
    return things(shared_app)


def things(app: Flask, tenant: str = "default") -> There:
    """One of each thing of a tenant that a path can speak of, made again."""
    api = api_as(app, Role.SYSTEM if tenant == "default" else Role.ADMIN, tenant)
    parts = {
        "device_id": api.register()["device_id"],
        "token": api.register()["download_url"].rpartition("/")[2],
        "token_id": api.post("/tokens", {"name": "one to be revoked", "role": "auditor"}).json["token_id"],
        "webhook_id": api.post("/webhooks", {"name": "one to be tried", "url": INSIDE}).json["webhook_id"],
        "issuer": "issuing-1",
        "application_id": "3f2b8c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b",  # none: they need the guard
        "request": "MDAwLjAsMCowCQYFKw4DAhoFAAQU",
    }
    manufacturer = {"name": "a maker", "certificate": ca_pem()}
    parts |= {
        "enrolment_token_id": api.post("/enrolment-tokens", {"name": "one to be revoked"}).json["enrolment_token_id"],
        "manufacturer_id": api.post("/manufacturers", manufacturer).json["manufacturer_id"],
        "label": tenant,
        "tenant": tenant,
        "log": "0" * 16,
        "broker": "main",
        "profile": "a-profile" if tenant == "default" else f"a-profile-of-{tenant}",
    }
    parts["group"] = "a-group" if tenant == "default" else f"a-group-of-{tenant}"
    for path, name in (("/profiles", parts["profile"]), ("/groups", parts["group"])):
        api.post(path, {"name": name})  # it may be there already
    enrolment_token = api.post("/enrolment-tokens", {"name": "a batch"}).json["token"]
    return There(api, csr_pem(), parts, base64.b64encode(f":{enrolment_token}".encode()).decode())


def ca_pem() -> str:
    return Authority("A maker's CA").certificate.public_bytes(PEM).decode()


def name_it(case: schemathesis.Case[Any]) -> None:
    """Give a name where the path says that one follows, and nowhere else."""
    for part in ("device_id", "application_id"):
        if part in case.path_parameters:
            case.query = {name: value for name, value in case.query.items() if name not in ("name", "external_id")}
            if case.path_parameters[part] == "-":
                case.query["name"] = "pump-1"


def fit(case: schemathesis.Case[Any], there: There) -> None:
    """Change of a request that fits the schema what a schema cannot say: what exists, is signed, reaches no other."""
    number = next(there.numbers)
    if number % 3 and not case.path.endswith("/proof"):  # nobody makes up a proof
        case.path_parameters.update({name: there.parts_of_paths[name] for name in case.path_parameters})
    if "Idempotency-Key" in case.headers and number % 5:
        case.headers["Idempotency-Key"] = f"the-key-of-request-{number}"
    name_it(case)
    case.query.pop("cursor", None)
    if "confirm" in case.query:  # a name that has to be repeated
        case.query["confirm"] = next(
            case.path_parameters[part] for part in ("tenant", "broker") if part in case.path_parameters
        )
    if case.path.startswith(IN_PLAIN_TEXT) and case.method == "POST":
        case.body = there.csr.encode()
    if case.media_type == "text/csv":
        case.body = b"name,type,location,firmware\n" + str(case.body).encode()
    if isinstance(case.body, dict):
        body: dict[str, Any] = case.body
        fit_body(body, there)
        if case.method == "PATCH" and not body:
            body["description" if case.path.startswith("/groups") else "name"] = "changed"
        if case.path.startswith("/applications"):
            for index, topic in enumerate(body.get("topics") or ()):
                topic["filter"] = f"devices/+/{index}"


# Rules that contradict none that an earlier request has left.
RULES = {
    "profile": "default",
    "default_days": 9,
    "max_days": 9,
    "extended_key_usage": ["client_auth"],
    "dns_names": ["{name}.devices.example.com"],
    "ip_addresses": ["{metadata.ip}"],
    "organization": "{location}",
    "organizational_unit": "{location}",
    "serial_number": "{serial}",
}


def fit_body(body: dict[str, Any], there: There) -> None:
    existing = RULES | {"groups": [there.parts_of_paths["group"]], "url": INSIDE, "address": "edge-1.example.com"}
    body.update({name: rule for name, rule in existing.items() if body.get(name)})
    if body.get("csr") is not None:
        body["csr"] = there.csr
        body.pop("key_type", None)
        body.pop("bundle_password", None)
        body.pop("bundle_format", None)
    for keyed in (body, body.get("choices") or {}, body.get("renewal") or {}):
        if keyed.get("key_type"):
            keyed["key_type"] = "ec-p256"  # RSA keys take a second to make
    if body.get("filter") and "action" in body:
        body["filter"]["q"] = there.parts_of_paths["device_id"]  # of all that earlier requests have made
    if body.get("certificate") is not None:
        body["certificate"] = ca_pem()
    attestation = body.get("attestation")
    if isinstance(attestation, dict) and "evidence" not in attestation:
        attestation["anchors"] = [ca_pem()]
        attestation["reference_values"] = [{"environment": {"class": {"vendor": "a maker"}}}]
    elif body.get("csr") is None:
        body.pop("attestation", None)
    for name in ("ek_certificate", "ak_public", "policy_id"):  # nobody makes up a TPM
        body.pop(name, None)
    if len(json.dumps(body.get("metadata"), ensure_ascii=False).encode()) > METADATA_BYTES:
        body["metadata"] = {}
    for index, topic in enumerate(body.get("topics") or ()):
        topic["filter"] = f"devices/{{id}}/{index}"
    if body.get("topics"):  # no narrower than the default, which the style of a new installation cannot express
        body["topics"][0] = {"filter": "devices/{id}/#", "access": "readwrite"}


@pytest.mark.parametrize("operation", OPERATIONS, ids=[operation.label for operation in OPERATIONS])
@ON_SQLITE
def test_what_is_answered_is_what_is_described(operation: Any, there: There) -> None:
    """As ``schema.parametrize()``, which makes all cases at the collection, in every process of xdist."""
    load_all_checks()
    learnt = FeedbackSources(constants_value_source=make_constants_value_source(schema))
    build_operation_test(config=schema.config, operation=operation, test_func=judge, given_kwargs={}, feedback=learnt)(
        there=there
    )


def judge(case: schemathesis.Case[Any], there: There) -> None:
    if case.meta is not None and case.meta.generation.mode.is_positive:
        fit(case, there)
    if any(value in (None, [], {}) for value in case.query.values()):
        return  # sent as nothing at all, it is no mistake that could be refused
    if case.path.endswith(("/simplereenroll", "/onboarding/config")):
        return  # it wants a client certificate, which is shown in TLS
    of_device = case.path.startswith(IN_PLAIN_TEXT)
    if of_device and case.method == "POST" and not (case.meta and case.meta.generation.mode.is_positive):
        return  # to a reader of bytes nothing is of the wrong type
    authorization = f"Basic {there.basic}" if of_device or case.path in OF_DEVICES else f"Bearer {there.api.token}"
    # A body of rows is text, whatever it holds: what is wrong with it is said row by row.
    excluded: Any = [negative_data_rejection] if case.path == "/register/bulk" else []
    if case.path == "/devices/actions":  # by another method it is the path of a device, which is not there
        excluded = [unsupported_method, allow_header_conformance]
    case.call_and_validate(headers={"Authorization": authorization}, excluded_checks=excluded)


PUMP = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
DEVICE_ID = "3f2b8c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b"


@pytest.mark.parametrize(
    ("path", "body", "fits"),
    [
        ("/devices/{device_id}", {}, False),
        ("/devices/{device_id}", {"external_id": None, "name": "x"}, False),
        ("/devices/{device_id}", {"external_id": None}, True),
        ("/devices/{device_id}", {"name": "x"}, True),
        ("/manufacturers/{manufacturer_id}/proof", {}, False),
        ("/manufacturers/{manufacturer_id}/proof", {"signature": None}, False),
        ("/manufacturers/{manufacturer_id}/proof", {"signature": "AAAA", "certificate": "x"}, False),
        ("/manufacturers/{manufacturer_id}/proof", {"signature": "AAAA", "certificate": None}, True),
        ("/manufacturers", {"name": "a maker", "certificate": ""}, False),
        ("/enrolment-tokens", {"name": "x", "device_id": DEVICE_ID, "count": 2}, False),
        ("/enrolment-tokens", {"name": "x", "device_id": DEVICE_ID}, True),
        ("/enrolment-tokens", {"name": "x", "count": 2}, True),
        ("/enrolment-tokens", {"name": "x", "device_id": DEVICE_ID, "profile": "a-profile"}, False),
        ("/profiles", {"name": "x", "dns_names": []}, True),
        ("/profiles", {"name": "X"}, False),
        ("/profiles", {"name": "x", "extended_key_usage": ["server_auth"]}, False),
        ("/profiles", {"name": "x", "key_types": ["ec-p256", "ec-p256"]}, False),
        ("/webhooks", {"name": "x", "url": "https://ex\u00e4mple.com/"}, False),
        ("/webhooks", {"name": "x", "url": "HTTPS://example.com/"}, True),
        ("/register/bulk", "", False),
        ("/register", PUMP | {"metadata": {"a": {"b": [1, 0.5, True, None, "c"]}}}, True),
        ("/register", PUMP | {"metadata": {"a": ["b\n"]}}, False),
        ("/register", PUMP | {"metadata": {"a": {"b\t": 1}}}, False),
        ("/register", PUMP | {"metadata": {"a": [[2**53 + 1]]}}, False),
        ("/register", PUMP | {"metadata": {"a": 1e20}}, False),
        ("/register", PUMP | {"metadata": {"a": {"b": {"c": {"d": {}}}}}}, True),
        ("/register", PUMP | {"metadata": {"a": {"b": {"c": {"d": {"e": 1}}}}}}, False),
        *(
            ("/register", PUMP | {"topics": [{"filter": text, "access": "read"}]}, False)
            for text in (
                "devices/\n",
                "devices//x",
                "devices/a+",
                "devices/#/x",
                "/devices/x",
                "devices/x ",
                "50%",
                "\u00e9",
            )
        ),
        *(
            ("/register", PUMP | {"topics": [{"filter": text, "access": "read"}]}, True)
            for text in ("devices/{id}/#", "devices/a b/+/c", "devices/{id}/+")
        ),
    ],
)
@ON_SQLITE
def test_what_the_server_refuses_is_not_described_as_fitting(there: There, path: str, body: object, fits: bool) -> None:
    described = openapi(ROUTES, server_url="http://localhost")
    method = "patch" if path.startswith("/devices/") else "post"
    content = described["paths"][path][method]["requestBody"]["content"]
    inner = content.get("application/json") or content["text/csv"]
    judged = jsonschema_rs.validator_for({**inner["schema"], "components": described["components"]})
    assert judged.is_valid(body) is fits
    if path == "/register" and not fits:
        assert there.api.post(path, body).status_code == 422


def test_no_two_models_have_one_name() -> None:
    """A generator of clients makes a class of each, and leaves out what uses a second one of a name."""
    names = openapi(ROUTES, server_url="http://localhost")["components"]["schemas"]
    assert "DeviceModel" in names
    assert [name for name in names if not name.isalnum()] == []  # two of one name have their modules in it


@pytest.mark.parametrize(
    ("path", "cursor"), [("/devices", "0"), ("/devices", "x" * 60), ("/audit", "0"), ("/audit", "-1")]
)
@ON_SQLITE
def test_a_cursor_that_no_page_gave_does_not_fit(there: There, path: str, cursor: str) -> None:
    described = openapi(ROUTES, server_url="http://localhost")["paths"][path]["get"]["parameters"]
    [schema] = [parameter["schema"] for parameter in described if parameter["name"] == "cursor"]
    assert not jsonschema_rs.validator_for(schema).is_valid(cursor)
    assert there.api.get(f"{path}?cursor={cursor}").status_code == 422
