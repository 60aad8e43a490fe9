"""Nothing of a tenant is seen or changed by another one, whichever route it calls with what is the first one's."""

from __future__ import annotations

import base64
import json
import ssl
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flask import Flask

import db
from app import ROUTES, portal_of
from core.roles import MAY, Role
from core.states import Approval, ClientKind, DeviceStatus, RepeatedSerial
from operations.wiring import Portal
from pki.est import read_enrolment_request
from store import tenants
from store.audit import Actor
from store.enrolment import EnrolmentProfile
from store.tables import METADATA
from tests.support.est import Device as EstClient
from tests.support.est import csr_der, in_base64, new_key
from tests.support.exposition import samples_of
from tests.support.harness import Api, api_as, csr_pem, problem_of
from tests.support.pki import PEM, Authority, ca_without_key_identifiers
from tests.support.tenants import add_issuer
from web.api.operation import FOR_OPERATORS
from web.api.routing import Route
from workflows.enrolment.credentials import Waiting, by_token
from workflows.operators import new_token

IDEMPOTENCY_KEY = "hidden-idempotency-key"
DEVICE = {"name": "hidden-device", "type": "hidden-type", "location": "hidden-place", "firmware": "hidden-firmware"}
PLAIN = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}
MAKER = Authority("hidden-authority").certificate.public_bytes(PEM).decode()
EVIDENCE = {"type": "eat-jwt", "nonce": "AAAA", "evidence": "AAAA"}
POLICY = {"mode": "require", "anchors": [MAKER]}


@dataclass(frozen=True)
class Owned:
    """What the first tenant has: by the names of the parts of paths, and all words that nobody else may be told."""

    parts: dict[str, str]
    pending: str
    policy_id: str
    registration: dict[str, Any]
    words: tuple[str, ...]


def expect_one_to_enrol(portal: Portal) -> str:
    """A device that waits for approval."""
    profile = EnrolmentProfile(
        "hidden-type", "hidden-place", "1.0", "hidden-{serial}", ("ec-p256",), 9, Approval.OPERATOR,
        RepeatedSerial.OPERATOR,
    )  # fmt: skip
    actor = Actor(portal.first_tenant, "hidden-operator", Role.ADMIN, "request-1", "192.0.2.1")
    secret, _ = portal.enrolment_tokens.create(
        actor, "hidden-batch", profile, device_id=None, count=9, life=timedelta(days=1)
    )
    token, request = portal.enrolment_tokens.find(secret), read_enrolment_request(csr_der())
    assert token is not None
    outcome = portal.enrolment.enrol(actor, by_token(token, request), request)
    assert isinstance(outcome, Waiting)
    return outcome.device_id


def application(portal: Portal) -> str:
    """An application, as it is in the database: to register one takes the guard."""
    now = portal.clock()
    application_id = db.new_device_id(now)
    with portal.database.transaction() as tx:
        db.add_device(
            tx, tenant_id=portal.first_tenant, device_id=application_id, kind=ClientKind.APPLICATION,
            name="hidden-application", type="", location="", firmware="", metadata={}, status=DeviceStatus.ACTIVE,
            topics=[("devices/#", "read")], created_at=now, generation=0,
        )  # fmt: skip
    return application_id


@pytest.fixture(scope="module")
def owner(shared_app: Flask) -> Api:
    """The admin of the first tenant."""
    return api_as(shared_app, Role.ADMIN)


@pytest.fixture(scope="module")
def owned(shared_app: Flask, owner: Api) -> Owned:
    def made(path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        answer = owner.post(path, body, headers=headers)
        assert answer.status_code == 201, answer.text
        return dict(answer.json)

    portal = portal_of(shared_app)
    profile = {"name": "hidden-profile", "dns_names": ["{external_id}.example.com"]}
    profile["extended_key_usage"] = ["client_auth", "server_auth"]
    made("/profiles", profile)
    registration = DEVICE | {"external_id": "hidden-1", "profile": "hidden-profile"}
    device = made("/register", registration, **{"Idempotency-Key": IDEMPOTENCY_KEY})
    made("/groups", {"name": "hidden-group", "description": "hidden-purpose"})
    enrolment = made("/enrolment-tokens", {"name": "hidden-token", "attestation": POLICY})
    parts = {
        "device_id": device["device_id"],
        "application_id": application(portal),
        "token_id": made("/tokens", {"name": "hidden-operator", "role": "auditor"})["token_id"],
        "webhook_id": made("/webhooks", {"name": "hidden-hook", "url": "https://hidden.example.com"})["webhook_id"],
        "enrolment_token_id": enrolment["enrolment_token_id"],
        "manufacturer_id": made("/manufacturers", {"name": "hidden-maker", "certificate": MAKER})["manufacturer_id"],
        "profile": "hidden-profile",
        "group": "hidden-group",
    }
    waiting, policy_id = expect_one_to_enrol(portal), str(enrolment["attestation"]["policy_id"])
    words = (*parts.values(), waiting, policy_id, *registration.values(), device["serial_number"])
    words += (
        "hidden-application",
        "hidden-operator",
        "hidden-hook",
        "hidden-token",
        "hidden-maker",
        "hidden-batch",
        "hidden-purpose",
    )
    return Owned(parts, waiting, policy_id, registration, words)


@pytest.fixture(scope="module")
def neighbours(shared_app: Flask) -> dict[Role, Api]:
    """An operator of another tenant of the same portal for each role."""
    portal = portal_of(shared_app)
    found = {}
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "another", created_at=portal.clock())
        for role in (Role.ADMIN, Role.OPERATOR, Role.AUDITOR):
            secret, record = new_token("another", "a neighbour", role, None, now=portal.clock())
            tenants.add_token(tx, record, secret=secret)
            found[role] = Api(shared_app.test_client(), secret)
    add_issuer(portal, "another")
    return found


def rows_of(portal: Portal, tenant_id: str) -> dict[str, list[str]]:
    """Every row of a tenant, its audit record, too."""
    with portal.database.snapshot() as tx:
        return {
            table.name: [repr(tuple(row)) for row in tx.execute(sa.select(table).where(table.c.tenant_id == tenant_id))]
            for table in METADATA.sorted_tables
            if "tenant_id" in table.c
        }


def told(answer: Any, owned: Owned, asked: object) -> list[str]:
    """The words of the first tenant that an answer says, without those that were in the request."""
    text, known = answer.get_data(as_text=True) + str(answer.headers), str(asked)
    return [word for word in owned.words if word in text and word not in known]


# Bodies that are good, so that nothing else is wrong with a request; a POST without one has an empty body.
BODIES: dict[str, dict[str, Any]] = {
    "POST /register": PLAIN,
    "POST /devices": PLAIN,
    "PATCH /devices/{device_id}": {"name": "taken over"},
    "PATCH /enrolment-tokens/{enrolment_token_id}": {"attestation": {}},
    "PATCH /profiles/{profile}": {"max_days": 9},
    "PATCH /groups/{group}": {"description": "taken over"},
    "POST /groups": {"name": "own"},
    "POST /groups/{group}/members": {"add": ["0f9d2c4e-5b1a-4c7d-9e8f-102030405060"]},
    "PATCH /manufacturers/{manufacturer_id}": {"name": "taken over"},
    "POST /manufacturers/{manufacturer_id}/proof": {"signature": "x"},
    "PATCH /applications/{application_id}": {"name": "taken over"},
    "POST /enrolment-tokens": {"name": "own"},
    "POST /tokens": {"name": "own", "role": "auditor"},
    "POST /webhooks": {"name": "own", "url": "https://example.com"},
    "POST /profiles": {"name": "own"},
}
# For anyone, whatever token comes along: who has a link has the bundle.
BY_LINK = "/download/{token}"


@pytest.mark.parametrize("route", [route for route in ROUTES if route.path != BY_LINK], ids=lambda r: r.name)
def test_no_route_shows_or_changes_what_is_another_tenants(
    shared_app: Flask, owned: Owned, neighbours: dict[Role, Api], route: Route
) -> None:
    path = route.path.format(
        **{"issuer": "0" * 16, "label": "another", "tenant": "default", "request": "0" * 16, "log": "0" * 16}
        | {"broker": "main"}
        | owned.parts
    )
    body = BODIES.get(f"{route.method} {route.path}", {}) if route.method in ("POST", "PATCH") else None
    before = rows_of(portal_of(shared_app), "default")
    for role, api in neighbours.items():
        answer = api.call(route.method, path, body)
        assert told(answer, owned, path) == [], (role, answer.text)
        if route.permission is not None and route.permission not in MAY[role]:
            problem_of(answer, 403, "forbidden")
        elif route.permission is not None and "{" in route.path:
            assert answer.status_code == 404, answer.text
    assert rows_of(portal_of(shared_app), "default") == before


@pytest.mark.parametrize(
    "query",
    [
        "/devices?external_id=hidden-1", "/devices?q=hidden", "/devices?type=hidden-type", "/devices?status=active",
        "/devices?location=hidden-place", "/devices?attested=none", "/devices?expires_before=2100-01-01T00:00:00Z",
        "/devices?sort=last_seen", "/applications?q=hidden", "/audit?object=device:{device_id}",
        "/devices?group=hidden-group",
        "/audit?actor=hidden-operator", "/audit?cursor=1000",
    ],
)  # fmt: skip
def test_no_filter_finds_what_is_another_tenants(owned: Owned, neighbours: dict[Role, Api], query: str) -> None:
    path = query.format(**owned.parts)
    answer = neighbours[Role.ADMIN].get(path)
    assert told(answer, owned, path) == []


def test_a_cursor_of_another_tenants_list_is_refused(owner: Api, owned: Owned, neighbours: dict[Role, Api]) -> None:
    cursor = owner.get("/devices?limit=1").json["next_cursor"]
    assert cursor is not None
    answer = neighbours[Role.ADMIN].get(f"/devices?cursor={cursor}&limit=200")
    assert (answer.status_code, answer.json["errors"][0]["field"]) == (422, "cursor")
    assert told(answer, owned, cursor) == []


REFERENCES: dict[str, tuple[str, dict[str, Any], int]] = {
    "profile of a registration": ("/register", PLAIN | {"profile": "{profile}"}, 422),
    "profile of an expected device": ("/devices", PLAIN | {"profile": "{profile}"}, 422),
    "profile of an enrolment token": ("/enrolment-tokens", {"name": "own", "profile": "{profile}"}, 422),
    "device of an enrolment token": ("/enrolment-tokens", {"name": "own", "device_id": "{pending}"}, 404),
    "policy of a nonce": (
        "/attestation/nonce",
        {"policy_id": "{policy_id}", "type": "tpm2", "ek_certificate": "AAAA", "ak_public": "AAAA"},
        404,
    ),
    "policy of a registration": (
        "/register",
        PLAIN
        | {
            "csr": "",
            "attestation": {"type": "eat-jwt", "nonce": "AAAA", "evidence": "AAAA", "policy_id": "{policy_id}"},
        },
        404,
    ),
    "external id": ("/register", PLAIN | {"external_id": "hidden-1"}, 201),
    "external id of an expected device": ("/devices", PLAIN | {"external_id": "hidden-2"}, 201),
    "name of a group": ("/groups", {"name": "hidden-group"}, 201),
    "name of a profile": ("/profiles", {"name": "hidden-other"}, 201),
    "name of a token": ("/tokens", {"name": "hidden-operator", "role": "auditor"}, 201),
    "manufacturer": ("/manufacturers", {"name": "hidden-maker", "certificate": MAKER}, 201),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_what_names_something_of_another_tenant_is_answered_as_if_it_were_not_there(
    shared_app: Flask, owned: Owned, neighbours: dict[Role, Api], name: str
) -> None:
    path, body, status = REFERENCES[name]
    values = {**owned.parts, "pending": owned.pending, "policy_id": owned.policy_id}
    given = json.loads(json.dumps(body).replace('""', json.dumps(csr_pem())))
    for key, value in values.items():
        given = json.loads(json.dumps(given).replace(f"{{{key}}}", value))
    before = rows_of(portal_of(shared_app), "default")
    answer = neighbours[Role.ADMIN].post(path, given)
    assert answer.status_code == status, answer.text
    assert told(answer, owned, given) == [], answer.text
    assert rows_of(portal_of(shared_app), "default") == before


def test_an_idempotency_key_of_another_tenant_is_unused(owned: Owned, neighbours: dict[Role, Api]) -> None:
    body = owned.registration | {"name": "pump-1", "profile": "default", "external_id": "own-1"}
    answer = neighbours[Role.ADMIN].post("/register", body, headers={"Idempotency-Key": IDEMPOTENCY_KEY})
    assert answer.status_code == 201
    assert told(answer, owned, body) == []


@pytest.mark.parametrize(
    "which",
    [{"ids": ["{device_id}", "{pending}"]}, {"filter": {"profile": "hidden-profile"}}, {"filter": {"q": "hidden-d"}}],
)
@pytest.mark.parametrize("action", ["revoke", "suspend", "resume"])
def test_no_action_reaches_the_devices_of_another_tenant(
    shared_app: Flask, owned: Owned, neighbours: dict[Role, Api], action: str, which: dict[str, Any]
) -> None:
    text = json.dumps({"action": action, **which})
    body = json.loads(text.replace("{device_id}", owned.parts["device_id"]).replace("{pending}", owned.pending))
    before = rows_of(portal_of(shared_app), "default")
    answer = neighbours[Role.ADMIN].post("/devices/actions", body)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert {line["code"] for line in lines if line["device_id"] in body.get("ids", ())} <= {"device_not_found"}
    assert told(answer, owned, body) == []
    assert rows_of(portal_of(shared_app), "default") == before


def test_a_row_of_an_upload_with_anothers_profile_is_refused(owned: Owned, neighbours: dict[Role, Api]) -> None:
    row = PLAIN | {"profile": owned.parts["profile"], "external_id": "own-2"}
    answer = neighbours[Role.ADMIN].call(
        "POST", "/register/bulk", data=json.dumps(row), headers={"Content-Type": "application/x-ndjson"}
    )
    assert json.loads(answer.text)["code"] == "profile_refused"
    assert told(answer, owned, row) == []


# --- What is one in the whole installation --------------------------------------------------------------------------


def test_a_manufacturer_that_tls_takes_for_another_tenants_is_refused_without_a_word_of_that_one(
    owner: Api, owned: Owned, neighbours: dict[Role, Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As CAs could be added before there was a second tenant.
    monkeypatch.setattr("workflows.enrolment.clients.TlsClients.check_identifier", lambda *_arguments: None)
    pem, key = ca_without_key_identifiers("Maker CA")
    added = owner.post("/manufacturers", {"name": "hidden-maker", "certificate": pem}).json
    signature = base64.b64encode(key.sign(added["nonce"].encode(), ec.ECDSA(hashes.SHA256()))).decode()
    proven = owner.post(f"/manufacturers/{added['manufacturer_id']}/proof", {"signature": signature})
    assert proven.json["status"] == "registered"
    other = {"name": "own", "certificate": ca_without_key_identifiers("Maker CA")[0]}
    answer = neighbours[Role.ADMIN].post("/manufacturers", other)
    assert "The CA of another manufacturer has the same name" in problem_of(answer, 409, "conflict")["detail"]
    assert told(answer, owned, other) == []


def test_nobody_keeps_the_ca_of_another_tenants_manufacturer_out_by_one_of_the_same_name(
    owner: Api, neighbours: dict[Role, Api]
) -> None:
    def pem_of(authority: Authority) -> str:
        return authority.certificate.public_bytes(PEM).decode()

    name, attacker = "Pump Maker CA", neighbours[Role.ADMIN]
    real = Authority(name)
    copied, short = (pem_of(Authority(name, key_identifier=chosen)) for chosen in (real.key_identifier, b"short"))
    for fake in (ca_without_key_identifiers(name)[0], copied, short):
        answer = attacker.post("/manufacturers", {"name": "fake", "certificate": fake})
        assert "hash of its key" in problem_of(answer, 422, "manufacturer_invalid")["detail"]
    for api, authority in ((attacker, Authority(name)), (owner, real), (attacker, real)):
        added = api.post("/manufacturers", {"name": "maker", "certificate": pem_of(authority)})
        assert added.status_code == 201, added.text


def test_figures_and_problems_of_the_installation_are_told_to_the_role_above_the_tenants_alone(
    shared_app: Flask, owner: Api, neighbours: dict[Role, Api]
) -> None:
    portal_of(shared_app).tenant_terms.refresh()
    system = api_as(shared_app, Role.SYSTEM)
    assert system.get("/metrics").status_code == 200
    assert {check.get("problem") for check in system.get("/readyz").json["checks"]} - {None, FOR_OPERATORS}
    for api in (owner, *neighbours.values()):
        own = samples_of(api.get("/metrics").text)
        names = {name for name, _labels in own}
        assert "portal_devices" in names
        assert not {"portal_generation", "portal_http_requests_total", "portal_crl_life_left_seconds"} & names
        assert not [labels for _name, labels in own if "tenant" in dict(labels)]
        problems = {check.get("problem") for check in api.get("/readyz").json["checks"]} - {None}
        assert problems == {FOR_OPERATORS}


# --- Devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "status"), [("default", 401), ("nobody", 404), ("another", 200), (None, 200)])
def test_a_device_enrols_under_the_label_of_its_tenant_or_none(
    shared_app: Flask, neighbours: dict[Role, Api], label: str | None, status: int
) -> None:
    token = neighbours[Role.OPERATOR].post("/enrolment-tokens", {"name": "own"}).json["token"]
    path = "/.well-known/est/" + ("" if label is None else f"{label}/")
    before = rows_of(portal_of(shared_app), "default")["devices"]
    answer = EstClient(Api(shared_app.test_client(), None), token, path=path).enrol(csr_der())
    assert answer.status_code == status, answer.text
    listed = neighbours[Role.AUDITOR].get("/devices?limit=200").json["devices"]
    assert any(device["name"] == "serial-1" for device in listed) == (status == 200)
    assert rows_of(portal_of(shared_app), "default")["devices"] == before


@pytest.mark.parametrize("label", ["default", "another"])
def test_a_device_is_known_by_its_certificate_under_the_label_of_its_tenant_alone(
    shared_app: Flask, owner: Api, neighbours: dict[Role, Api], label: str
) -> None:
    assert neighbours
    key = new_key()
    registered = owner.post("/register", PLAIN | {"csr": csr_pem(key)}).json
    certificate = ssl.PEM_cert_to_DER_cert(registered["certificate"])
    device = EstClient(Api(shared_app.test_client(), None), None, certificate, f"/.well-known/est/{label}/")
    answer = device.call("POST", "simplereenroll", in_base64(csr_der(new_key(), registered["device_id"])))
    # Under its own label it is known, and told that it is too early to renew.
    assert answer.status_code == (409 if label == "default" else 403), answer.text


def test_who_uses_a_link_is_recorded_where_the_device_is(
    shared_app: Flask, neighbours: dict[Role, Api], owner: Api
) -> None:
    device = neighbours[Role.ADMIN].register()
    link = "/download/" + device["download_url"].rpartition("/")[2]
    anyone = Api(shared_app.test_client(), None)
    for status in (200, 410):
        assert anyone.get(link).status_code == status
    entries = f"/audit?object=device:{device['device_id']}"
    assert owner.get(entries).json["entries"] == []
    recorded = neighbours[Role.ADMIN].get(entries).json["entries"]
    assert [(one["action"], one["outcome"]) for one in recorded[:3]] == [
        ("bundle:fetch", "refused"), ("bundle:deliver", "done"), ("bundle:fetch", "done"),
    ]  # fmt: skip
