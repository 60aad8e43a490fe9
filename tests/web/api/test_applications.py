"""Applications over HTTP: register, list, show, change, renew, revoke; devices and applications are kept apart."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography import x509
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from app import create_app, portal_of
from config import Settings
from core.broker_control import JOURNAL_FILE
from core.roles import Role
from operations.wiring import Portal, prepare
from store.generations import get_broker_state
from store.tables import AclEntry, Certificate, Delivery, Device, WebhookDelivery
from tests.support.est import Device as EstClient
from tests.support.est import certificates_of, csr_der, refused
from tests.support.guard_stub import GuardStub, journal_lines
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, csr_pem, problem_of

READ_ALL = [{"filter": "devices/+/telemetry", "access": "read"}]
BACK_END = {"name": "back end", "topics": READ_ALL}


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Flask]:
    """A portal under the control of the guard, which answers it."""
    settings = make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_TOPIC_PREFIXES="homeassistant, zigbee2mqtt")
    built = create_app(settings, background=False, clock=clock)
    portal = portal_of(built)
    prepare(portal)
    with GuardStub(settings.broker_socket, settings.broker_file(JOURNAL_FILE)) as guard:
        built.extensions["guard"] = guard
        yield built
    portal.close()


@pytest.fixture
def portal(app: Flask) -> Portal:
    return portal_of(app)


@pytest.fixture
def guard(app: Flask) -> GuardStub:
    stub: GuardStub = app.extensions["guard"]
    return stub


def added(api: Api, **fields: Any) -> dict[str, Any]:
    """Register an application; returns the answer."""
    answer = api.post("/applications", BACK_END | fields)
    assert answer.status_code == 201, answer.text
    registered: dict[str, Any] = answer.json
    return registered


def journal_of(portal: Portal) -> list[str]:
    return journal_lines(portal.settings.broker_file(JOURNAL_FILE))


def last_line_of(portal: Portal, identity: str) -> str:
    return [line for line in journal_of(portal) if identity in line.split(" ")[1:2]][-1]


# --- Register -----------------------------------------------------------------------------------------------------


def test_a_registration_is_answered_as_a_devices_with_link_and_password(api: Api) -> None:
    answer = api.post("/applications", BACK_END)
    assert answer.status_code == 201
    assert {*answer.json} == {
        "application_id", "name", "status", "fingerprint", "serial_number", "issued_at", "expires_at",
        "download_url", "download_expires_at", "bundle_password",
    }  # fmt: skip
    assert answer.headers["Location"] == f"/applications/{answer.json['application_id']}"
    shown = api.get(answer.headers["Location"]).json
    assert (shown["name"], shown["status"], shown["topics"]) == ("back end", "active", READ_ALL)
    assert shown["certificate"]["fingerprint"] == answer.json["fingerprint"]
    fetched = api.get("/download/" + answer.json["download_url"].rpartition("/")[2])
    assert fetched.status_code == 200
    assert fetched.data.startswith(b"PK")


def test_a_csr_gets_a_certificate_with_the_applications_id_once_the_guard_allows_it(api: Api, portal: Portal) -> None:
    registered = added(api, csr=csr_pem())
    certificate = x509.load_pem_x509_certificate(registered["certificate"].encode())
    assert certificate.subject.rfc4514_string() == f"CN={registered['application_id']}"
    assert last_line_of(portal, registered["application_id"]).endswith(" r:devices/+/telemetry")


def rows_of(portal: Portal, client_id: str) -> dict[str, list[dict[str, Any]]]:
    """The rows about a client, without what is of its own: names, ids, keys, times."""
    own = {
        "id", "device_id", "kind", "name", "type", "location", "firmware", "serial_number", "fingerprint", "der",
        "bundle", "certificate_id", "created_at", "updated_at", "issued_at", "not_before", "not_after", "expires_at",
        "generation", "filter",
    }  # fmt: skip
    found = {}
    with portal.database.snapshot() as tx:
        for table, column in (
            (Device, Device.id), (AclEntry, AclEntry.device_id), (Certificate, Certificate.device_id),
            (Delivery, Delivery.device_id),
        ):  # fmt: skip
            rows = tx.execute(sa.select(*table.__table__.columns).where(column == client_id)).mappings()
            of_client = [{name: row[name] for name in row if name not in own} for row in rows]
            found[table.__tablename__] = sorted(of_client, key=repr)
    return found


def test_an_applications_rows_are_those_of_a_device_but_for_the_kind(api: Api, portal: Portal) -> None:
    device = api.register(
        topics=[{"filter": "devices/{id}/#", "access": "read"}, {"filter": "devices/x", "access": "read"}]
    )
    application = added(api, topics=[*READ_ALL, {"filter": "devices/x", "access": "read"}])
    assert rows_of(portal, application["application_id"]) == rows_of(portal, device["device_id"])
    with portal.database.snapshot() as tx:
        kinds = dict(tx.execute(sa.select(Device.id, Device.kind)).all())
    assert kinds == {device["device_id"]: "device", application["application_id"]: "application"}


def test_an_idempotency_key_makes_a_repeat_return_the_first_answer(api: Api) -> None:
    key = {"Idempotency-Key": "a-key-of-16-chars"}
    first, again = (api.post("/applications", BACK_END, headers=key).json for _ in range(2))
    assert first == again
    problem_of(api.post("/applications", BACK_END | {"name": "x"}, headers=key), 409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("topic", "code"),
    [
        ("#", "topic_refused"),
        ("+/telemetry", "topic_refused"),
        ("$SYS/#", "topic_refused"),
        ("$CONTROL/#", "topic_refused"),
        ("$share/g/#", "topic_refused"),
        ("portal/guard/#", "topic_refused"),
        ("zigbee/#", "topic_refused"),
        ("devices/x\u0000", "topic_refused"),
        ("devices/x\u0085", "topic_refused"),
        ("d" * 65535, "invalid_input"),
        ("", "invalid_input"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_filters_that_reach_outside_are_refused_and_cost_nothing(
    api: Api, portal: Portal, topic: str, code: str
) -> None:
    before = journal_of(portal)
    answer = api.post("/applications", BACK_END | {"topics": [{"filter": topic, "access": "read"}]})
    assert "topics.0.filter" in problem_of(answer, 422, code)["detail"]
    assert api.get("/applications").json["applications"] == []
    assert journal_of(portal) == before


@ON_SQLITE
def test_bytes_that_are_no_utf_8_and_too_many_topics_are_refused(api: Api) -> None:
    body = json.dumps(BACK_END).replace("telemetry", "X").encode().replace(b"X", b"\xff")
    answer = api.call("POST", "/applications", data=body, content_type="application/json")
    problem_of(answer, 400, "malformed_request")
    many = [{"filter": f"devices/{number}", "access": "read"} for number in range(65)]
    problem_of(api.post("/applications", BACK_END | {"topics": many}), 422, "invalid_input")
    problem_of(api.post("/applications", BACK_END | {"topics": []}), 422, "invalid_input")
    problem_of(api.post("/applications", {"name": "x"}), 422, "invalid_input")
    assert len(added(api, topics=many[:64])) > 5


@ON_SQLITE
def test_other_prefixes_are_those_that_the_installation_allows(api: Api, portal: Portal) -> None:
    topics = [{"filter": "homeassistant/#", "access": "readwrite"}, {"filter": "zigbee2mqtt/+/state", "access": "read"}]
    registered = added(api, topics=topics, csr=csr_pem())
    line = last_line_of(portal, registered["application_id"])
    assert line.endswith(" rw:homeassistant/# r:zigbee2mqtt/+/state")
    device = [{"filter": "homeassistant/x", "access": "write"}]
    answer = api.post("/register", {"name": "x", "type": "x", "location": "x", "firmware": "1", "topics": device})
    problem_of(answer, 422, "topic_refused")


@ON_SQLITE
def test_a_broker_with_files_has_no_applications_and_says_why(make_settings: Callable[..., Settings]) -> None:
    app = create_app(make_settings(PORTAL_BROKER_CONTROL="files"), background=False)
    problem = problem_of(api_as(app, Role.ADMIN).post("/applications", BACK_END), 409, "guard_needed")
    assert problem["detail"] == (
        "Applications need the guard in the broker, which alone can hold them to their topics: set"
        " PORTAL_BROKER_CONTROL=guard."
    )
    portal_of(app).close()


# --- Kept apart from devices --------------------------------------------------------------------------------------


def test_devices_and_applications_are_listed_and_counted_apart(api: Api) -> None:
    device = api.register()["device_id"]
    ids = [added(api, name=f"consumer {number}")["application_id"] for number in range(3)]
    assert [one["device_id"] for one in api.get("/devices").json["devices"]] == [device]
    assert api.get("/devices?expires_before=2099-01-01T00:00:00Z").json["devices"][0]["device_id"] == device
    assert api.get("/devices?q=consumer").json["devices"] == []
    assert api.get(f"/devices?q={ids[0]}").json["devices"] == []
    page = api.get("/applications?limit=2").json
    rest = api.get(f"/applications?limit=2&cursor={page['next_cursor']}").json
    listed = [one["application_id"] for one in (*page["applications"], *rest["applications"])]
    assert (listed, rest["next_cursor"]) == (ids[::-1], None)
    assert [one["name"] for one in api.get("/applications?q=R 1").json["applications"]] == ["consumer 1"]
    assert api.get(f"/applications?q={device}").json["applications"] == []
    assert len(api.get("/applications?expires_before=2099-01-01T00:00:00Z").json["applications"]) == 3
    gauges = {
        (sample.name, sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(api.get("/metrics").text)
        for sample in family.samples
    }
    assert gauges["portal_devices", "active"] == 1
    assert gauges["portal_applications", "active"] == 3


def test_certificates_that_expire_soon_are_counted_apart(api: Api) -> None:
    api.register(validity_days=3)
    added(api, validity_days=3)
    added(api, validity_days=20)
    gauges = {
        (sample.name, sample.labels.get("within")): sample.value
        for family in text_string_to_metric_families(api.get("/metrics").text)
        for sample in family.samples
    }
    assert [gauges["portal_certificates_expiring", within] for within in ("7d", "30d")] == [1, 1]
    assert [gauges["portal_application_certificates_expiring", within] for within in ("7d", "30d")] == [1, 2]


@ON_SQLITE
def test_an_id_of_one_kind_is_not_found_as_the_other(api: Api) -> None:
    device, application = api.register()["device_id"], added(api)["application_id"]
    for method, path in (
        ("GET", "/devices/{}"), ("PATCH", "/devices/{}"), ("GET", "/devices/{}/certificates"), ("POST", "/revoke/{}"),
        ("POST", "/devices/{}/renew"), ("POST", "/devices/{}/suspend"), ("POST", "/devices/{}/resume"),
    ):  # fmt: skip
        body: dict[str, str] | None = {"name": "x"} if method == "PATCH" else {} if method == "POST" else None
        problem_of(api.call(method, path.format(application), body), 404, "device_not_found")
    for method, path in (
        ("GET", "/applications/{}"), ("PATCH", "/applications/{}"), ("POST", "/applications/{}/renew"),
        ("DELETE", "/applications/{}"),
    ):  # fmt: skip
        answer = api.call(method, path.format(device), {"name": "x"} if method == "PATCH" else None)
        problem_of(answer, 404, "application_not_found")
    actions = api.post("/devices/actions", {"action": "revoke", "ids": [application]})
    assert json.loads(actions.data)["code"] == "device_not_found"
    assert api.get(f"/devices/{device}").json["status"] == "active"
    assert api.get(f"/applications/{application}").json["status"] == "active"
    assert api.get(f"/devices/{application}").json["detail"].endswith("an application, see GET /applications/{id}.")
    assert api.get(f"/applications/{device}").json["detail"].endswith("a device, see GET /devices/{id}.")


def test_the_list_says_what_each_application_may_do_and_whether_it_was_ever_seen(api: Api) -> None:
    more = [{"filter": "homeassistant/#", "access": "readwrite"}, *READ_ALL]
    ids = [added(api)["application_id"], added(api, topics=more)["application_id"]]
    api.register(topics=[{"filter": "devices/{id}/#", "access": "read"}, {"filter": "devices/x", "access": "read"}])
    listed = {one["application_id"]: one for one in api.get("/applications").json["applications"]}
    assert [listed[client_id]["topics"] for client_id in ids] == [READ_ALL, more]
    assert [listed[client_id]["connection"]["last_seen"] for client_id in ids] == [None, None]


@ON_SQLITE
def test_the_database_keeps_the_kind_and_the_topics_of_an_application(api: Api, portal: Portal) -> None:
    application = added(api)["application_id"]
    for values in ({"kind": "device"}, {"own_topics": False}):
        with pytest.raises(sa.exc.IntegrityError), portal.database.transaction() as tx:
            tx.execute(sa.update(Device).where(Device.id == application).values(values))


# --- Change, renew, revoke ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topics", "ended"),
    [
        (["devices/+/telemetry:read"], False),
        (["devices/#:read"], False),
        (["devices/+/telemetry:readwrite", "devices/+/command:write"], False),
        (["devices/+/telemetry:write"], True),
        (["devices/a/telemetry:read"], True),
    ],
)
def test_an_application_that_can_read_less_has_its_session_ended_a_stored_one_too(
    api: Api, guard: GuardStub, topics: list[str], *, ended: bool
) -> None:
    application = added(api)["application_id"]
    other = added(api, name="other")["application_id"]
    pairs = [topic.rpartition(":") for topic in topics]
    body = {"topics": [{"filter": pattern, "access": access} for pattern, _, access in pairs]}
    for _ in range(2):  # a repeat ends nothing more
        assert api.patch(f"/applications/{application}", body).json["broker"] == "enforced"
    assert guard.clients.count(application) == ended
    assert other not in guard.clients


def test_a_session_that_could_not_be_ended_is_ended_once_the_guard_follows_again(
    api: Api, guard: GuardStub, portal: Portal
) -> None:
    application = added(api)["application_id"]
    assert portal.reconciler.apply(generation_of(portal)).problem is None
    guard.stopped = True
    narrower = {"topics": [{"filter": "devices/a/telemetry", "access": "read"}]}
    assert api.patch(f"/applications/{application}", narrower).json["broker"] == "pending"
    assert application not in guard.clients
    guard.stopped = False
    assert portal.reconciler.apply(generation_of(portal)).problem is None
    assert guard.clients.count(application) == 1
    assert api.get(f"/applications/{application}").json["broker"] == "enforced"


def test_who_is_denied_everything_because_a_prefix_was_removed_is_said_to_be(api: Api, portal: Portal) -> None:
    own = [{"filter": "homeassistant/#", "access": "read"}]
    home, other = added(api, topics=own)["application_id"], added(api, name="other")["application_id"]
    device = api.register(topics=[{"filter": "devices/{id}/a", "access": "write"}])["device_id"]
    settings = portal.settings.model_copy(update={"topic_prefix": "things", "topic_prefixes": ("devices",)})
    app = create_app(settings, background=False)
    later = portal_of(app)
    prepare(later)
    assert later.reconciler.apply(generation_of(later)).problem is None
    narrowed = api_as(app, Role.ADMIN)

    def said(path: str) -> tuple[str, bool]:
        answer = narrowed.get(path).json
        problem = answer["broker_problem"]
        return answer["broker"], problem is not None and "denies it everything" in problem

    assert said(f"/applications/{other}") == ("enforced", False)
    for path in (f"/applications/{home}", f"/devices/{device}"):
        assert said(path) == ("closed", True)
        assert "must begin with" in narrowed.get(path).json["broker_problem"]
    assert last_line_of(later, home) == f"deny {home}"
    listed = narrowed.get("/applications").json["applications"]
    assert {one["application_id"]: one["broker_problem"] is not None for one in listed} == {home: True, other: False}
    assert narrowed.get("/devices").json["devices"][0]["broker_problem"] is not None
    assert narrowed.patch(f"/applications/{home}", {"topics": READ_ALL}).json["broker"] == "enforced"
    narrowed.delete(f"/applications/{home}")
    assert said(f"/applications/{home}") == ("enforced", False)
    later.close()


def generation_of(portal: Portal) -> int:
    with portal.database.snapshot() as tx:
        return get_broker_state(tx).generation


def test_topics_that_are_taken_away_are_taken_away_before_the_answer(api: Api, portal: Portal) -> None:
    application = added(api, topics=[*READ_ALL, {"filter": "devices/+/command", "access": "write"}])["application_id"]
    answer = api.patch(f"/applications/{application}", {"topics": READ_ALL})
    assert (answer.status_code, answer.json["broker"], answer.json["topics"]) == (200, "enforced", READ_ALL)
    assert last_line_of(portal, application) == f"allow {application} r:devices/+/telemetry"
    assert api.patch(f"/applications/{application}", {"name": "other"}).json["name"] == "other"
    wrong: list[dict[str, Any]] = [{}, {"topics": None}, {"topics": []}, {"type": "x"}]
    for body in (*wrong, {"topics": [{"filter": "#", "access": "read"}]}):
        assert api.patch(f"/applications/{application}", body).status_code == 422
    assert api.get(f"/applications/{application}").json["topics"] == READ_ALL


def test_a_journal_that_begins_anew_forgets_the_numbers_of_certificates_that_have_expired(
    api: Api, portal: Portal, clock: Clock
) -> None:
    short, long = (added(api, validity_days=days) for days in (3, 300))
    for application in (short, long):
        assert api.delete(f"/applications/{application['application_id']}").json["broker"] == "enforced"
    assert all(any(one["serial_number"] in line for line in journal_of(portal)) for one in (short, long))
    clock.advance(days=30)
    portal.settings.broker_file(JOURNAL_FILE).unlink()  # as after it has grown long
    added(api)
    assert portal.reconciler.apply(generation_of(portal)).installed == generation_of(portal)
    revoked = [line for line in journal_of(portal) if line.startswith("serial ")]
    assert any(long["serial_number"] in line for line in revoked)
    assert not any(short["serial_number"] in line for line in revoked)
    assert f"deny {short['application_id']}" in journal_of(portal)


def test_a_revoked_application_is_denied_with_proof_and_stays_revoked(api: Api, portal: Portal) -> None:
    application = added(api)["application_id"]
    answer = api.delete(f"/applications/{application}?reason=key_compromise")
    assert {name: answer.json[name] for name in ("status", "reason", "broker", "application_id")} == {
        "status": "revoked", "reason": "key_compromise", "broker": "enforced", "application_id": application,
    }  # fmt: skip
    assert last_line_of(portal, application) == f"deny {application}"
    again = api.delete(f"/applications/{application}")
    assert (again.status_code, again.json) == (200, answer.json)
    problem_of(api.patch(f"/applications/{application}", {"name": "x"}), 409, "state_conflict")
    problem_of(api.post(f"/applications/{application}/renew"), 409, "state_conflict")
    assert api.get("/applications?status=revoked").json["applications"][0]["application_id"] == application


def test_a_renewal_gives_another_certificate_for_the_same_topics(api: Api) -> None:
    application = added(api, csr=csr_pem())["application_id"]
    answer = api.post(f"/applications/{application}/renew", {"csr": csr_pem(), "overlap_hours": 0})
    assert answer.status_code == 201, answer.text
    assert (answer.json["application_id"], answer.json["broker"]) == (application, "enforced")
    assert answer.json["name"] == "back end"
    shown = api.get(f"/applications/{application}").json
    assert shown["certificate"]["serial_number"] == answer.json["serial_number"]
    assert shown["topics"] == READ_ALL


def test_an_application_renews_by_itself_over_est_as_a_device_does(api: Api, portal: Portal, clock: Clock) -> None:
    registered = added(api, csr=csr_pem())
    application = registered["application_id"]
    shown = ssl.PEM_cert_to_DER_cert(registered["certificate"])
    request = csr_der(None, application, names=[x509.UniformResourceIdentifier(f"urn:uuid:{application}")])
    refused(EstClient(api, certificate=shown).enrol(request, "simplereenroll"), 409)  # too early
    clock.advance(days=300)
    [renewed] = certificates_of(EstClient(api, certificate=shown).enrol(request, "simplereenroll"))
    assert renewed.subject.rfc4514_string() == f"CN={application}"
    certificate = api.get(f"/applications/{application}").json["certificate"]
    assert int(certificate["serial_number"], 16) == renewed.serial_number
    entry = api.get(f"/audit?object=application:{application}").json["entries"][0]
    assert (entry["action"], entry["actor"]) == ("application:renew", f"application {application}")


# --- What is said of them -----------------------------------------------------------------------------------------


def test_audit_entries_and_events_name_applications(api: Api, portal: Portal) -> None:
    hook = {"name": "all", "url": "https://inventory.example.com/portal"}
    assert api.post("/webhooks", hook).status_code == 201
    registered = added(api)
    application = registered["application_id"]
    link = "/download/" + registered["download_url"].rpartition("/")[2]
    assert [api.get(link).status_code for _ in range(2)] == [200, 410]
    api.patch(f"/applications/{application}", {"name": "other"})
    api.post(f"/applications/{application}/renew", {"csr": csr_pem()})
    api.delete(f"/applications/{application}")
    entries = api.get(f"/audit?object=application:{application}").json["entries"]
    assert [entry["action"] for entry in entries][::-1] == [
        "application:register", "bundle:fetch", "bundle:deliver", "bundle:fetch", "application:update",
        "application:renew", "application:revoke",
    ]  # fmt: skip
    with portal.database.snapshot() as tx:
        sent = [*tx.execute(sa.select(WebhookDelivery.type, WebhookDelivery.body).order_by(WebhookDelivery.id))]
    assert [type_ for type_, _ in sent] == [
        "application_registered", "application_delivered", "application_link_reused", "application_renewed",
        "application_revoked", "application_broker_enforced",
    ]  # fmt: skip
    for _, body in sent:
        assert json.loads(body)["application_id"] == application
        assert "device_id" not in json.loads(body)
    webhook = api.get("/webhooks").json["webhooks"][0]["webhook_id"]
    delivery = api.get(f"/webhooks/{webhook}/deliveries?limit=1").json["deliveries"][0]
    assert (delivery["application_id"], delivery["device_id"]) == (application, None)


@ON_SQLITE
def test_an_operator_and_an_auditor_read_applications_and_change_none(
    api: Api, as_role: Callable[[Role | None], Api]
) -> None:
    application = added(api)["application_id"]
    for role in (Role.OPERATOR, Role.AUDITOR):
        other = as_role(role)
        assert other.get(f"/applications/{application}").status_code == 200
        problem_of(other.post("/applications", BACK_END), 403, "forbidden")
        problem_of(other.patch(f"/applications/{application}", {"name": "x"}), 403, "forbidden")
        problem_of(other.delete(f"/applications/{application}"), 403, "forbidden")


# --- The broker's side --------------------------------------------------------------------------------------------


@ON_SQLITE
def test_a_prefix_that_is_allowed_no_more_closes_the_applications_that_use_it(
    make_settings: Callable[..., Settings],
) -> None:
    settings = make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_TOPIC_PREFIXES="homeassistant")
    with ExitStack() as stack:
        app = create_app(settings, background=False)
        stack.callback(portal_of(app).close)
        prepare(portal_of(app))
        topics = [{"filter": "homeassistant/#", "access": "read"}]
        application = added(api_as(app, Role.ADMIN), topics=topics, csr=csr_pem())["application_id"]
        other = added(api_as(app, Role.ADMIN), csr=csr_pem())["application_id"]
        assert last_line_of(portal_of(app), application) == f"allow {application} r:homeassistant/#"
    with ExitStack() as stack:
        app = create_app(settings.model_copy(update={"topic_prefixes": ()}), background=False)
        stack.callback(portal_of(app).close)
        prepare(portal_of(app))
        assert last_line_of(portal_of(app), application) == f"deny {application}"
        assert last_line_of(portal_of(app), other) == f"allow {other} r:devices/+/telemetry"
