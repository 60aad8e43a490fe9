"""A tenant that is removed is revoked as a whole at once, exported, and after a time of grace deleted row by row."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from app import portal_of
from config import Settings
from core.errors import TokenUnavailable
from core.roles import Role
from operations import jobs
from operations.wiring import Portal
from pki.keys.stores import KeyStores
from store import issuers, tenants
from store.tables import METADATA
from tests.support.est import Device as EstClient
from tests.support.est import new_key, refused
from tests.support.guarded import guarded_app
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, csr_pem, problem_of, state_of
from workflows import tenant_removal

PLAIN = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"}


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """A portal under the control of a guard that knows tenants."""
    with guarded_app(make_settings(PORTAL_BROKER_CONTROL="guard"), clock, monkeypatch) as built:
        yield built


@pytest.fixture
def system(app: Flask) -> Api:
    return api_as(app, Role.SYSTEM)


@pytest.fixture
def acme(system: Api) -> Api:
    """The admin of a second tenant, which has one of each thing."""
    made = system.post("/tenants", {"name": "acme", "topic_prefix": "sites/acme"})
    assert made.status_code == 201, made.text
    api = Api(system.client, made.json["token"])
    api.post("/profiles", {"name": "servers"})
    api.post("/webhooks", {"name": "hook", "url": "https://example.com"})
    api.register(name="with a bundle")
    api.post("/register", PLAIN | {"csr": csr_pem(), "topics": [{"filter": "sites/acme/{id}/up", "access": "write"}]})
    api.post("/applications", {"name": "dashboard", "topics": [{"filter": "sites/acme/#", "access": "read"}]})
    token = api.post("/enrolment-tokens", {"name": "a batch"}).json["token"]
    assert EstClient(api_as_anyone(api), token).enrol().status_code == 200
    suspended = api.register(name="suspended")["device_id"]
    assert api.post(f"/devices/{suspended}/suspend").status_code == 200
    compromised = api.register(name="compromised")["device_id"]
    assert api.post(f"/revoke/{compromised}", {"reason": "key_compromise"}).status_code == 200
    assert api.post("/devices", PLAIN | {"name": "pending"}).status_code == 201
    return api


def api_as_anyone(api: Api) -> Api:
    return Api(api.client, None)


def removed(system: Api, name: str = "acme") -> dict[str, Any]:
    answer = system.delete(f"/tenants/{name}?confirm={name}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json)


def rows_of(portal: Portal, tenant_id: str) -> dict[str, int]:
    """How many rows of a tenant each table has."""
    with portal.database.snapshot() as tx:
        counted = {
            table.name: tx.execute(
                sa.select(sa.func.count()).select_from(table).where(table.c.tenant_id == tenant_id)
            ).scalar_one()
            for table in METADATA.sorted_tables
            if "tenant_id" in table.c
        }
    return {name: count for name, count in counted.items() if count}


@ON_SQLITE
@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("acme", 422, "invalid_input"), ("acme?confirm=other", 422, "invalid_input"),
        ("acme?confirm=ACME", 422, "invalid_input"), ("nobody?confirm=nobody", 404, "not_found"),
        ("default?confirm=default", 409, "state_conflict"),
    ],
)  # fmt: skip
def test_a_tenant_is_removed_only_if_its_name_is_typed_again_and_never_that_which_one_is_in(
    system: Api, app: Flask, path: str, status: int, code: str
) -> None:
    system.post("/tenants", {"name": "acme"})
    before = state_of(portal_of(app))["tenants"]
    problem_of(system.delete(f"/tenants/{path}"), status, code)
    assert state_of(portal_of(app))["tenants"] == before


@ON_SQLITE
def test_all_that_a_removed_tenant_had_is_revoked_and_nobody_of_it_is_served(
    system: Api, acme: Api, app: Flask
) -> None:
    key = new_key()
    link = "/download/" + acme.register()["download_url"].rpartition("/")[2]
    device = acme.post("/register", PLAIN | {"csr": csr_pem(key)}).json
    enrolment = acme.post("/enrolment-tokens", {"name": "another batch"}).json["token"]
    own = system.register()["device_id"]
    answer = removed(system)
    assert (answer["status"], answer["broker"], answer["devices_left"]) == ("removed", "enforced", 0)
    problem_of(acme.get("/devices"), 401, "unauthenticated")
    anyone = api_as_anyone(system)
    assert anyone.get(link).status_code in (403, 410)
    for path in ("/.well-known/est/", "/.well-known/est/acme/"):
        assert EstClient(anyone, enrolment, None, path).enrol().status_code in (401, 403)
    certificate = ssl.PEM_cert_to_DER_cert(device["certificate"])
    refused(EstClient(anyone, None, certificate).call("POST", "simplereenroll", b"x"), 403)
    lines = exported(system)
    devices = [line for line in lines if line["kind"] == "device"]
    assert {line["status"] for line in devices} == {"revoked"}
    assert {line["revocation_reason"] for line in devices} == {"cessation_of_operation", "key_compromise"}
    assert {line["status"] for line in lines if line["kind"] == "certificate"} == {"revoked"}
    assert system.get(f"/devices/{own}").json["status"] == "active"


@ON_SQLITE
def test_a_removal_is_final_and_its_name_and_topics_are_kept_until_the_rows_are_deleted(system: Api, acme: Api) -> None:
    removed(system)
    assert removed(system)["status"] == "removed"
    assert acme.token
    for method, path, body in (
        ("POST", "/tenants/acme/resume", {}), ("POST", "/tenants/acme/suspend", {}),
        ("PATCH", "/tenants/acme", {"quotas": {"devices": 5}}), ("POST", "/tenants", {"name": "acme"}),
        ("POST", "/tenants", {"name": "other", "topic_prefix": "sites/acme"}),
    ):  # fmt: skip
        problem_of(system.call(method, path, body), 409, "state_conflict")
    assert [one["status"] for one in system.get("/tenants").json["tenants"]] == ["removed", "active"]


@ON_SQLITE
def test_devices_for_which_there_was_no_time_are_revoked_by_the_job_and_the_ca_is_retired(
    system: Api, acme: Api, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    portal = portal_of(app)
    monkeypatch.setattr(tenant_removal, "AT_ONCE", 2)
    monkeypatch.setattr(portal.tenant_removals, "_settings", portal.settings.model_copy(update={"enforce_timeout": 0}))
    left = removed(system)["devices_left"]
    assert left > 2
    portal.tenant_removals.run()
    assert removed(system)["devices_left"] == 0
    with portal.database.snapshot() as tx:
        assert issuers.list_issuers(tx, tenant_id="acme") == []
        assert len(issuers.list_issuers(tx, tenant_id="acme", retired=True)) == 1
    revoked = portal.operators.audit("acme", limit=200, before=None, filters={"actor": "portal"})[0]
    assert sum(entry.action in ("device:revoke", "application:revoke") for entry in revoked) == left
    assert sum(entry.action == "ca:retire" for entry in revoked) == 1


def test_after_the_time_of_grace_every_row_is_deleted_and_no_other_tenants(
    system: Api, acme: Api, app: Flask, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    portal = portal_of(app)
    monkeypatch.setattr(tenant_removal, "ROWS_AT_ONCE", 3)
    system.register()
    portal.audit_logs.of("acme").sign_if_due(256)
    kept = removed(system)
    assert kept["deleted_after"] > kept["changed_at"]
    clock.advance(days=29)
    portal.tenant_removals.run()
    assert rows_of(portal, "acme")["audit_entries"] > 10
    before = rows_of(portal, "default")
    clock.advance(days=2)
    for job in jobs.JOBS:
        if job.name == "removed tenants":
            job.run(portal)
    assert rows_of(portal, "acme") == {}
    after = rows_of(portal, "default")
    assert after.pop("audit_entries") == before.pop("audit_entries") + 1
    assert after == before
    api = api_as(app, Role.SYSTEM)
    assert api.get("/audit?limit=1").json["entries"][0]["action"] == "tenant:delete"
    problem_of(api.get("/tenants/acme"), 404, "not_found")
    # Name and topics are free, each for another tenant.
    made = [api.post("/tenants", body) for body in ({"name": "other", "topic_prefix": "sites/acme"}, {"name": "acme"})]
    assert [(one.status_code, one.json["broker"]) for one in made] == [(201, "enforced")] * 2
    assert Api(api.client, made[1].json["token"]).register()["status"] == "active"


@ON_SQLITE
@pytest.mark.parametrize("is_signed", [True, False])
def test_the_key_and_checkpoint_of_a_deleted_record_are_deleted_if_there_were_any(
    system: Api, app: Flask, clock: Clock, is_signed: bool
) -> None:
    portal = portal_of(app)
    assert system.post("/tenants", {"name": "acme"}).status_code == 201
    record_log = portal.audit_logs.of("acme")
    if is_signed:
        record_log.sign_if_due(256)
        assert record_log.files.checkpoint_path().exists()
    checkpoints = portal.settings.data_dir / "audit-checkpoints"
    removed(system)
    clock.advance(days=31)
    portal.tenant_removals.run()
    assert rows_of(portal, "acme") == {}
    assert not record_log.files.key_path.exists()
    assert not list(checkpoints.glob("*"))


@ON_SQLITE
def test_the_keys_of_its_cas_are_destroyed_with_the_rows_and_nobody_elses(
    system: Api, app: Flask, clock: Clock
) -> None:
    portal = portal_of(app)
    for name in ("acme", "corp"):
        assert system.post("/tenants", {"name": name, "own_root": True}).status_code == 201
    responder = portal.settings.ocsp_dir / "acme-issuing-1.pem"
    responder.parent.mkdir(exist_ok=True)
    responder.write_text("its key")
    before = portal.keys.names()
    removed(system)
    portal.tenant_removals.run()
    assert portal.keys.names() == before
    clock.advance(days=31)
    portal.tenant_removals.run()
    gone = ["acme-issuing-1", "acme-root"]
    assert portal.keys.names() == [name for name in before if name not in gone]
    assert not responder.exists()
    assert system.post("/tenants", {"name": "acme", "own_root": True}).status_code == 201
    assert set(portal.keys.names()) == {*before, "acme-issuing-2", "acme-root-2"} - {*gone}  # no name comes back


@ON_SQLITE
def test_a_tenant_with_a_key_that_cannot_be_destroyed_is_kept_until_it_can(
    system: Api, app: Flask, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    portal = portal_of(app)
    assert system.post("/tenants", {"name": "acme"}).status_code == 201
    removed(system)
    clock.advance(days=31)

    def is_away(_keys: KeyStores, _name: str) -> None:
        raise TokenUnavailable("The token is away.")

    with monkeypatch.context() as patch:
        patch.setattr(KeyStores, "destroy", is_away)
        portal.tenant_removals.run()
    assert rows_of(portal, "acme") == {}
    assert system.get("/tenants/acme").json["status"] == "removed"
    portal.tenant_removals.run()
    assert system.get("/tenants/acme").status_code == 404
    assert "acme-issuing-1" not in portal.keys.names()


def test_the_database_itself_keeps_a_tenant_that_was_not_removed(app: Flask, acme: Api) -> None:
    portal, assert_kept = portal_of(app), pytest.raises(sa.exc.IntegrityError)
    assert acme.token
    for statement in (
        "DELETE FROM audit_entries WHERE tenant_id = 'acme'",
        "DELETE FROM device_keys WHERE tenant_id = 'acme' AND compromised_at IS NOT NULL",
        "DELETE FROM tenants WHERE id = 'acme'",
    ):
        with pytest.raises(sa.exc.IntegrityError), portal.database.transaction() as tx:
            tx.exec_driver_sql(statement)
    with portal.database.transaction() as tx:
        tx.exec_driver_sql("UPDATE tenants SET status = 'removed' WHERE id = 'acme'")
    with assert_kept, portal.database.transaction() as tx:
        tx.exec_driver_sql("UPDATE tenants SET status = 'active' WHERE id = 'acme'")
    with portal.database.snapshot() as tx:
        assert tenants.get_tenant(tx, "acme").status == "removed"


def exported(system: Api) -> list[dict[str, Any]]:
    answer = system.get("/tenants/acme/export")
    assert (answer.status_code, answer.content_type) == (200, "application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


@ON_SQLITE
def test_nobody_sees_what_a_tenant_has_by_exporting_it_before_it_is_removed(system: Api, acme: Api) -> None:
    for change in (None, "suspend", "resume"):
        if change is not None:
            system.post(f"/tenants/acme/{change}")
        problem = problem_of(system.get("/tenants/acme/export"), 409, "state_conflict")
        assert "once it is removed" in problem["detail"]
    assert acme.get("/audit?action=tenant:export").json["entries"] == []
    removed(system)
    last = [line for line in exported(system) if line["kind"] == "audit"][-1]
    assert (last["action"], last["object"]) == ("tenant:export", "tenant:acme")
    assert system.get("/audit?action=tenant:export").json["entries"][0]["object"] == "tenant:acme"


@ON_SQLITE
def test_the_export_holds_devices_certificates_and_the_audit_record_and_no_keys_or_bundles(
    system: Api, acme: Api, app: Flask
) -> None:
    secret = acme.register()
    listed = acme.get("/devices?limit=200").json["devices"] + acme.get("/applications").json["applications"]
    removed(system)
    portal_of(app).audit_logs.of("acme").sign_if_due(256)
    lines = exported(system)
    kinds = [line["kind"] for line in lines]
    clients = [kind for kind in kinds if kind in ("device", "application")]
    assert kinds[: 1 + len(clients)] == ["tenant", *clients]
    assert list(dict.fromkeys(kinds[1 + len(clients) :])) == ["certificate", "audit", "checkpoint"]
    assert len(clients) == len(listed)
    assert [line["number"] for line in lines if line["kind"] == "audit"] == [*range(1, kinds.count("audit") + 1)]
    assert lines[-1]["note"].startswith(lines[-1]["key"].partition("+")[0])
    text = json.dumps(lines)
    for hidden in (
        secret["bundle_password"],
        secret["download_url"].rpartition("/")[2],
        "PRIVATE KEY",
        '"bundle":',
        "token_hash",
    ):
        assert hidden not in text
    told = system.get("/audit?limit=1&action=tenant:export").json[
        "entries"
    ]  # and in its own record, which was exported
    assert told[0]["object"] == "tenant:acme"
    other = system.register()["device_id"]
    assert other not in system.get("/tenants/acme/export").text
