"""Suspending and resuming, against a real database, CA and files; the broker does not run."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509

import db
from core.errors import DeviceNotFound, StateConflict
from core.states import DeviceStatus
from operations.own_certificates import probe_certificates
from operations.wiring import Portal
from store import certificates, issuers
from tests.support.harness import PER_DEVICE, Api, Clock, problem_of
from tests.workflows.test_registration import OPERATOR, PUMP, token_of
from workflows.registration import Registered

PENDING = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"


def status_of(portal: Portal, device_id: str) -> tuple[DeviceStatus, list[str]]:
    with portal.database.snapshot() as tx:
        device = db.get_device(tx, "default", device_id)
        return device.status, [row.status for row in certificates.device_certificates(tx, "default", device_id)]


def crl_entry(portal: Portal, registered: Registered) -> x509.RevokedCertificate | None:
    crl = x509.load_pem_x509_crl(portal.settings.broker_file("crl.pem").read_bytes())
    return crl.get_revoked_certificate_by_serial_number(int(registered.serial_number, 16))


def stands_in_acl(portal: Portal, device_id: str) -> bool:
    return device_id in portal.settings.broker_file("acl").read_text()


def actions(portal: Portal, device_id: str, count: int) -> list[str]:
    """What was done to the device, the newest first."""
    filters = {"object": f"device:{device_id}"}
    return [entry.action for entry in portal.operators.audit("default", limit=count, before=None, filters=filters)[0]]


@PER_DEVICE
def test_a_suspended_device_is_on_hold_in_the_crl_and_keeps_its_topics_until_it_is_revoked(
    portal: Portal, clock: Clock
) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    answer = portal.revocations.suspend(OPERATOR, registered.device_id)
    assert (answer.status, answer.suspended_at is not None, answer.enforced) == ("suspended", True, False)
    assert answer.problem is not None
    assert status_of(portal, registered.device_id) == (DeviceStatus.SUSPENDED, ["held"])
    entry = crl_entry(portal, registered)
    assert entry is not None
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason is x509.ReasonFlags.certificate_hold
    # The CRL refuses it. Without its block the broker would have to be restarted once it is resumed.
    assert stands_in_acl(portal, registered.device_id)
    assert actions(portal, registered.device_id, 1) == ["device:suspend"]
    clock.advance(minutes=1)
    assert portal.revocations.suspend(OPERATOR, registered.device_id) == dataclasses.replace(answer, repeated=True)
    portal.revocations.revoke(OPERATOR, registered.device_id, "key_compromise")
    assert not stands_in_acl(portal, registered.device_id)


def test_the_certificate_that_shows_the_broker_a_new_crl_is_in_the_audit_record(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.suspend(OPERATOR, registered.device_id)
    probe = x509.load_pem_x509_certificates(probe_certificates(portal.settings).revoked.certificate.read_bytes())[0]
    newest, before = portal.operators.audit("default", limit=2, before=None, filters={})[0]
    assert (newest.action, newest.object) == ("certificate:issue", f"certificate:{probe.serial_number:x}")
    assert newest.detail == {"purpose": "canary"}
    assert before.action == "device:suspend"


def test_openssl_refuses_a_suspended_device_and_accepts_it_again(portal: Portal, tmp_path: Path) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    with portal.database.snapshot() as tx:
        certificate = certificates.current_certificate(tx, "default", registered.device_id)
    assert certificate is not None
    (tmp_path / "device.der").write_bytes(certificate.der)

    def judged() -> str:
        with portal.database.snapshot() as tx:
            crl = issuers.get_crl(tx, portal.authority.first.issuing.id)
        assert crl is not None
        (tmp_path / "crl.der").write_bytes(crl.der)
        command = ["openssl", "verify", "-x509_strict", "-crl_check"]
        command += ["-CAfile", str(portal.settings.data_dir / "ca.pem"), "-CRLfile", "crl.der", "device.der"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return f"{done.stdout}{done.stderr}"

    portal.revocations.suspend(OPERATOR, registered.device_id)
    assert "certificate revoked" in judged()
    portal.revocations.resume(OPERATOR, registered.device_id)
    assert judged().endswith(": OK\n")


@PER_DEVICE
def test_a_resumed_device_leaves_the_crl_and_is_as_it_was(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.suspend(OPERATOR, registered.device_id)
    answer = portal.revocations.resume(OPERATOR, registered.device_id)
    assert (answer.status, answer.suspended_at) == ("active", None)
    assert status_of(portal, registered.device_id) == (DeviceStatus.ACTIVE, ["active"])
    assert crl_entry(portal, registered) is None
    assert stands_in_acl(portal, registered.device_id)
    assert actions(portal, registered.device_id, 2) == ["device:resume", "device:suspend"]
    assert portal.revocations.resume(OPERATOR, registered.device_id).status == "active"
    assert actions(portal, registered.device_id, 1) == ["device:resume"]


def test_a_suspended_device_can_be_revoked_and_stays_revoked(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.suspend(OPERATOR, registered.device_id)
    portal.revocations.revoke(OPERATOR, registered.device_id, "key_compromise")
    with pytest.raises(StateConflict, match="revoked cannot become active"):
        portal.revocations.resume(OPERATOR, registered.device_id)
    with pytest.raises(StateConflict, match="revoked cannot become suspended"):
        portal.revocations.suspend(OPERATOR, registered.device_id)
    assert status_of(portal, registered.device_id) == (DeviceStatus.REVOKED, ["revoked"])
    entry = crl_entry(portal, registered)
    assert entry is not None
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason is x509.ReasonFlags.key_compromise


def test_a_pending_device_cannot_be_resumed(portal: Portal, clock: Clock) -> None:
    with portal.database.transaction() as tx:
        db.add_device(
            tx,
            tenant_id="default",
            device_id=PENDING,
            name="pump",
            type="pump",
            location="Hall 2",
            firmware="1.0",
            metadata={},
            status=DeviceStatus.PENDING,
            topics=None,
            created_at=clock(),
            generation=0,
        )
    with pytest.raises(StateConflict, match="pending cannot be resumed"):
        portal.revocations.resume(OPERATOR, PENDING)
    assert status_of(portal, PENDING) == (DeviceStatus.PENDING, [])
    assert "device:resume" not in actions(portal, PENDING, 1)


def test_suspend_resume_and_revoke_at_once_have_one_order_and_revoked_wins(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    start = threading.Barrier(7)
    moves: list[Callable[[], object]] = [
        *[lambda: portal.revocations.suspend(OPERATOR, registered.device_id)] * 3,
        *[lambda: portal.revocations.resume(OPERATOR, registered.device_id)] * 3,
        lambda: portal.revocations.revoke(OPERATOR, registered.device_id, "key_compromise"),
    ]

    def run(move: Callable[[], object]) -> None:
        start.wait()
        with contextlib.suppress(StateConflict):
            move()

    with ThreadPoolExecutor(7) as pool:
        list(pool.map(run, moves))
    assert status_of(portal, registered.device_id) == (DeviceStatus.REVOKED, ["revoked"])
    done = actions(portal, registered.device_id, 8)
    assert done[0] == "device:revoke"
    between = done[1 : done.index("device:register")]
    assert between == ["device:suspend" if number % 2 == 0 else "device:resume" for number in range(len(between))][::-1]


def test_the_bundle_of_a_suspended_device_waits_until_it_is_resumed(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.suspend(OPERATOR, registered.device_id)
    with pytest.raises(StateConflict):
        portal.deliveries.deliver(OPERATOR, token_of(registered))
    portal.revocations.resume(OPERATOR, registered.device_id)
    assert portal.deliveries.deliver(OPERATOR, token_of(registered)).content.startswith(b"PK")


def test_a_device_that_is_not_there_cannot_be_suspended(portal: Portal) -> None:
    with pytest.raises(DeviceNotFound):
        portal.revocations.suspend(OPERATOR, "00000000-0000-4000-8000-000000000000")


def test_the_interface_shows_what_became_of_it(api: Api) -> None:
    device_id = api.register()["device_id"]
    suspended = api.post(f"/devices/{device_id}/suspend")
    assert (suspended.status_code, suspended.json["status"], suspended.json["broker"]) == (200, "suspended", "pending")
    assert suspended.json["suspended_at"].endswith("Z")
    assert api.get(f"/devices/{device_id}").json["certificate"]["revocation_reason"] == "certificate_hold"
    assert [device["device_id"] for device in api.get("/devices?status=suspended").json["devices"]] == [device_id]
    assert api.post(f"/devices/{device_id}/resume").json["suspended_at"] is None
    api.post(f"/revoke/{device_id}")
    problem_of(api.post(f"/devices/{device_id}/resume"), 409, "state_conflict")
