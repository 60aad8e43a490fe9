"""A portal that is killed while it adds, suspends, resumes or removes a tenant leaves nothing half-made or behind."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from store.tables import METADATA
from tests.support.crash import Victim
from tests.support.deployment import PLAIN, wait_until
from tests.support.guard import may_publish
from tests.support.harness import csr_pem
from tests.support.mqtt import MqttClient, connect_tls, tls_context
from tests.support.pki import Credentials
from tests.system.test_crash import arm, die, start_again

pytestmark = [pytest.mark.system, pytest.mark.long]


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with Victim(PORTAL_WORKERS="1") as running:
        yield running


def as_admin(victim: Victim, token: str, method: str, path: str, body: Any = None) -> requests.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return victim.session.request(method, victim.url + path, json=body, headers=headers, timeout=20)


def added(victim: Victim, name: str) -> str:
    """Add a tenant; return the token of its admin."""
    answer = victim.call("POST", "/tenants", {"name": name})
    assert (answer.status_code, answer.json()["broker"]) == (201, "enforced"), answer.text
    return str(answer.json()["token"])


@dataclass(frozen=True)
class Admitted:
    """A device of a tenant, whose topics begin with the tenant's name."""

    tenant: str
    id: str
    credentials: Credentials


def registered(victim: Victim, token: str, tenant: str) -> Admitted:
    key = ec.generate_private_key(ec.SECP256R1())
    answer = as_admin(victim, token, "POST", "/register", PLAIN | {"csr": csr_pem(key)})
    assert answer.status_code == 201, answer.text
    certificate = x509.load_pem_x509_certificate(answer.json()["certificate"].encode())
    return Admitted(tenant, answer.json()["device_id"], Credentials(certificate, key))


def is_accepted(victim: Victim, device: Admitted) -> bool:
    """Whether the broker lets a device in, and takes what it publishes."""
    files = device.credentials.write(victim.folder, uuid.uuid4().hex)
    context = tls_context(victim.data / "broker" / "ca.pem", *files)
    try:
        with MqttClient(connect_tls(victim.mqtt_port, context)) as client:
            return client.connect("any") == 0 and may_publish(client, f"{device.tenant}/{device.id}/up")
    except OSError:  # of a CA that is not trusted any more
        return False


def keys_of(victim: Victim, name: str) -> list[str]:
    return sorted(path.name for path in (victim.data / "ca").glob(f"{name}-*.key.pem"))


def rows_of(victim: Victim, name: str) -> dict[str, int]:
    """How many rows of a tenant each table has."""
    tables = [table.name for table in METADATA.sorted_tables if "tenant_id" in table.c]
    with sqlite3.connect(victim.data / "portal.db") as database:
        query = "SELECT count(*) FROM {} WHERE tenant_id = ?"
        found = {table: database.execute(query.format(table), (name,)).fetchone()[0] for table in tables}
    return {table: count for table, count in found.items() if count}


def dies_by_itself(victim: Victim, step: str) -> None:
    """Start a portal whose job is killed at a step, with nobody asking."""
    victim.kill_portal()
    process = victim.launch_portal(PORTAL_FAILPOINT=f"{step}=killgroup")
    wait_until(lambda: process.poll() is not None)
    victim.kill_portal()


def test_a_tenant_whose_adding_was_cut_off_is_whole_after_a_repeat_and_has_one_ca(victim: Victim) -> None:
    request: dict[str, Any] = {
        "json": {"name": "cut", "own_root": True},
        "headers": {"Idempotency-Key": "a-key-for-the-tenant"},
    }
    for step, issuers in (
        ("tenant_add.before_commit", 0),
        ("tenant_add.after_commit", 0),
        ("tenant_add.root_key_made", 0),
        ("tenant_add.key_made", 0),
        ("tenant_add.before_ca_commit", 0),
        ("tenant_add.after_ca_commit", 0),
    ):
        arm(victim, step)
        is_there = step not in ("tenant_add.before_commit", "tenant_add.after_commit")
        assert victim.call("GET", "/tenants/cut").status_code == (200 if is_there else 404)
        assert rows_of(victim, "cut").get("issuers", 0) == issuers
        assert victim.call("GET", "/readyz").status_code == 200
        die(victim, "POST", f"{victim.url}/tenants", **request)
    start_again(victim)
    answers = [victim.session.post(f"{victim.url}/tenants", timeout=20, **request) for _ in range(2)]
    assert [(answer.status_code, answer.json()["broker"]) for answer in answers] == [(201, "enforced")] * 2
    token = answers[0].json()["token"]
    assert answers[1].json()["token"] == token
    assert rows_of(victim, "cut")["issuers"] == 2  # its root, and the one that issues
    assert is_accepted(victim, registered(victim, token, "cut"))


def test_a_tenant_whose_suspension_or_resumption_was_cut_off_is_out_or_in_as_a_whole(victim: Victim) -> None:
    start_again(victim)
    device = registered(victim, added(victim, "parked"), "parked")
    for step, operation, status in (
        ("tenant_move.before_commit", "suspend", "active"),
        ("tenant_move.after_commit", "suspend", "active"),
        ("tenant_move.before_commit", "resume", "suspended"),
        ("tenant_move.after_commit", "resume", "suspended"),
    ):
        arm(victim, step)
        assert victim.call("GET", "/tenants/parked").json()["status"] == status
        assert is_accepted(victim, device) is (status == "active")
        die(victim, "POST", f"{victim.url}/tenants/parked/{operation}")
    start_again(victim)
    assert is_accepted(victim, device)
    for operation, accepted in (("suspend", False), ("suspend", False), ("resume", True), ("resume", True)):
        assert victim.call("POST", f"/tenants/parked/{operation}").json()["broker"] == "enforced"
        assert is_accepted(victim, device) is accepted


def test_of_a_tenant_whose_removal_was_cut_off_anywhere_nothing_is_left(victim: Victim) -> None:
    start_again(victim)
    token = added(victim, "gone")
    device = registered(victim, token, "gone")
    for step in ("tenant_remove.before_commit", "tenant_remove.after_commit"):
        arm(victim, step)
        assert victim.call("GET", "/tenants/gone").json()["status"] == "active"
        assert is_accepted(victim, device)
        die(victim, "DELETE", f"{victim.url}/tenants/gone?confirm=gone")
    for step in ("tenant_remove.some_revoked", "tenant_remove.issuers_retired"):
        dies_by_itself(victim, step)
    arm(victim, "tenant_remove.some_deleted")  # which is not reached before the time of grace is over
    assert not is_accepted(victim, device)
    assert as_admin(victim, token, "GET", "/devices").status_code in (401, 403)
    answer = victim.call("DELETE", "/tenants/gone?confirm=gone").json()
    assert (answer["status"], answer["broker"], answer["devices_left"]) == ("removed", "enforced", 0)
    assert keys_of(victim, "gone") == ["gone-issuing-1.key.pem"]
    victim.kill_portal()
    with sqlite3.connect(victim.data / "portal.db") as database:
        long_ago = (datetime.now(UTC) - timedelta(days=40)).strftime("%Y-%m-%d %H:%M:%S.%f")
        database.execute("UPDATE tenants SET changed_at = ? WHERE id = 'gone'", (long_ago,))
    for step in ("some_deleted", "key_destroyed", "before_gone", "gone"):
        dies_by_itself(victim, f"tenant_remove.{step}")
    start_again(victim)
    assert victim.call("GET", "/tenants/gone").status_code == 404
    assert (rows_of(victim, "gone"), keys_of(victim, "gone")) == ({}, [])
    assert not is_accepted(victim, device)
    broker = [path for path in (victim.data / "broker").rglob("*") if path.is_file()]
    wait_until(lambda: not [path for path in broker if device.id.encode() in path.read_bytes()])
    assert is_accepted(victim, registered(victim, added(victim, "gone"), "gone"))
