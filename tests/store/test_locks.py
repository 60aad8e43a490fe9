"""What is one in the whole installation is decided by one transaction after the other, of whichever tenants."""

from __future__ import annotations

import base64
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy.engine import Connection

from core.errors import Conflict
from core.states import Approval, RepeatedSerial
from operations.wiring import Portal
from store import enrolment, tenants
from store.audit import Actor
from store.enrolment import EnrolmentProfile, ManufacturerRecord
from tests.support.pki import ca_without_key_identifiers

PROFILE = EnrolmentProfile(
    "pump", "hall 1", "1.0", "{serial}", ("ec-p256",), 9, Approval.OPERATOR, RepeatedSerial.OPERATOR
)


def test_of_two_tenants_whose_manufacturers_tls_could_confuse_one_registers_its_own(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_have_looked, look = threading.Barrier(2), enrolment.registered_manufacturers

    def look_together(tx: Connection) -> list[ManufacturerRecord]:
        found = list(look(tx))
        with contextlib.suppress(threading.BrokenBarrierError):  # one of them waits for the other's transaction
            both_have_looked.wait(0.3)
        return found

    def outcome(prepared: tuple[Actor, str, str]) -> str:
        actor, manufacturer_id, signature = prepared
        try:
            return portal.manufacturers.prove(actor, manufacturer_id, signature=signature).status
        except Conflict as error:
            return error.code

    # As they were added before there was a second tenant.
    monkeypatch.setattr("workflows.enrolment.clients.TlsClients.check_identifier", lambda *_arguments: None)
    unproven = []
    for tenant_id in ("default", "another"):
        with portal.database.transaction() as tx:
            tenants.add_tenant(tx, tenant_id, created_at=portal.clock())
        actor = Actor(tenant_id, "an admin", "admin", "request-1", "192.0.2.1")
        pem, key = ca_without_key_identifiers("Maker CA")
        added = portal.manufacturers.add(actor, "maker", pem, PROFILE)
        signature = key.sign(added.nonce.encode(), ec.ECDSA(hashes.SHA256()))
        unproven.append((actor, added.id, base64.b64encode(signature).decode()))
    monkeypatch.setattr("workflows.enrolment.clients.enrolment.registered_manufacturers", look_together)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(outcome, unproven)) == ["conflict", "registered"]
