"""Each query about what devices have shown, asked for and been told finds and changes nothing of another tenant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from core.errors import PortalError
from core.roles import Role
from core.states import (
    Approval,
    AttestationVerdict,
    EnrolmentStatus,
    EventDeliveryStatus,
    ManufacturerStatus,
    PresenceState,
    RepeatedSerial,
)
from operations.wiring import Portal
from store import (
    attestation,
    audit,
    bulk,
    certificates,
    devices,
    enrolment,
    issuers,
    keys,
    mail,
    names,
    profiles,
    sessions,
    tenant_rows,
    tenants,
    webhooks,
)
from store.attestation import AttestationRecord, PolicyRecord
from store.enrolment import EnrolmentProfile, ManufacturerRecord
from store.enrolment_tables import EnrolmentRow
from store.names import NameClaim
from store.sessions import SessionRecord
from store.tables import AuditEntry, Certificate, Presence, WebhookDelivery
from store.webhooks import ClaimedEvent
from tests.store.test_tenant_conditions import rows_of_default
from tests.support.harness import ON_SQLITE
from tests.workflows.test_admission import OPERATOR, request_of

pytestmark = ON_SQLITE  # where a statement that is refused leaves those before it, which are to be looked at
SOON, LONG_AGO = datetime(2100, 1, 1, tzinfo=UTC), datetime(2000, 1, 1, tzinfo=UTC)
LATER = datetime(2200, 1, 1, tzinfo=UTC)
ID = "1" * 16
HASH, OTHER_HASH = "a" * 64, "b" * 64


@dataclass(frozen=True)
class Owned:
    """What the first tenant has, of which there is one each."""

    device_id: str
    certificate_id: int
    other_certificate_id: int
    enrolment_id: int
    webhook_id: str
    token_id: str
    event: ClaimedEvent
    entry_id: int
    result: AttestationRecord
    known: bulk.KnownDevice
    now: datetime


def manufacturer(now: datetime) -> ManufacturerRecord:
    profile = EnrolmentProfile(
        "pump", "hall 1", "1.0", "{number}", ("ec-p256",), 9, Approval.OPERATOR, RepeatedSerial.OPERATOR
    )
    registered = ManufacturerStatus.REGISTERED
    return ManufacturerRecord(
        ID, "default", "A maker", b"0", HASH, SOON, registered, "n", SOON, now, now, None, profile
    )


@pytest.fixture
def owned(portal: Portal) -> Owned:
    now = portal.clock()
    device_id = portal.registrations.register(OPERATOR, request_of(1, csr=False), None).device_id
    _, token = portal.operators.create(OPERATOR, "auditor", Role.AUDITOR, None)
    _, webhook = portal.webhooks.create(OPERATOR, "hook", "https://example.com", [])
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "another", created_at=now)
        certificate = certificates.current_certificate(tx, "default", device_id)
        assert certificate is not None
        policy = PolicyRecord(ID, "default", 1, {}, [], now)
        attestation.add_policy(tx, policy)
        attestation.add_nonce(tx, "default", "holder", nonce_hash=HASH, seed=b"s", expires_at=SOON, limit=9)
        passed = AttestationVerdict.PASSED
        result = AttestationRecord(device_id, "default", ID, 1, "tpm2", passed, "", [], {}, HASH, HASH, now)
        attestation.put_attestation(tx, result)
        enrolment.add_manufacturer(tx, manufacturer(now))
        enrolled = {"device_id": device_id, "token_id": None, "manufacturer_id": ID, "identity": HASH}
        enrolled |= {"key_fingerprint": HASH, "status": EnrolmentStatus.WAITING, "certificate_id": None, "serial": "sn"}
        enrolment.add_enrolment(tx, "default", **enrolled, serial_hash=HASH, created_at=now, decided_at=None)
        enrolment_id = tx.execute(sa.select(EnrolmentRow.id)).scalar_one()
        enrolment.add_factory_key(tx, "default", OTHER_HASH, enrolment_id)
        enrolment.add_factory_key(tx, "default", "c" * 64, None)
        enrolment.add_reenrolment(tx, "default", enrolment_id, key_fingerprint=HASH, asked_at=now)
        profiles.add_profile(tx, "default", ID, PROFILE, now=now)
        devices.update_device(tx, "default", device_id, {"profile_id": ID, "external_id": "line-1"})
        names.claim_names(tx, "default", [(NameClaim(device_id, ("pump.example.com",)), certificate.id)], now=now)
        tx.execute(sa.update(Presence).values(state=PresenceState.CONNECTED))
        assert tx.execute(sa.select(sa.func.count()).select_from(Presence)).scalar_one()
        session = SessionRecord(ID, "default", token.id, now, now, SOON, "192.0.2.1", "a browser")
        sessions.add_session(tx, session, secret="a secret")
        mail.record_message(tx, "default", [("webhook", "one")], now=now)
        event: dict[str, Any] = {
            "tenant_id": "default",
            "webhook_id": webhook.id,
            "event_id": ID,
            "type": "registered",
            "body": "{}",
        }
        event |= {"body": "{}", "created_at": now, "status": EventDeliveryStatus.DEAD, "next_at": now, "ended_at": now}
        tx.execute(sa.insert(WebhookDelivery), event)
        event_id = tx.execute(sa.select(WebhookDelivery.id)).scalars().all()[-1]
        return Owned(
            device_id,
            certificate.id,
            tx.execute(sa.select(Certificate.id).where(Certificate.id != certificate.id)).scalars().all()[0],
            enrolment_id,
            webhook.id,
            token.id,
            ClaimedEvent(**_claimed(tx, event_id)),
            tx.execute(sa.select(AuditEntry.id)).scalars().all()[-1],
            result,
            bulk.find_known(tx, "default", ["line-1"])["line-1"],
            now,
        )


PROFILE: dict[str, Any] = {
    "name": "servers", "default_days": None, "max_days": None, "key_types": [], "extended_key_usage": [],
    "dns_names": [], "ip_addresses": [], "organization": None, "organizational_unit": None, "serial_number": None,
}  # fmt: skip


def _claimed(tx: Connection, event_id: int) -> dict[str, Any]:
    row = tx.execute(sa.select(WebhookDelivery.__table__).where(WebhookDelivery.id == event_id)).mappings().one()
    return {name: row[name] for name in ClaimedEvent.__slots__}


def add_two_nonces(tx: Connection, of: str) -> None:
    """Add one nonce more than the holder may have, that are good for longer than the one there is."""
    for nonce in "de":
        attestation.add_nonce(tx, of, "holder", nonce_hash=nonce * 64, seed=b"s", expires_at=LATER, limit=1)


Ask = Callable[[Connection, str, Owned], Any]
# Each finds something for the first tenant, and nothing for another one.
READS: dict[str, Ask] = {
    "a policy": lambda tx, of, it: attestation.get_policy(tx, of, ID),
    "policies": lambda tx, of, it: attestation.policies_by_id(tx, of, [ID]),
    "a result": lambda tx, of, it: attestation.find_attestation(tx, of, it.device_id),
    "a manufacturer": lambda tx, of, it: enrolment.get_manufacturer(tx, of, ID),
    "manufacturers": lambda tx, of, it: enrolment.list_manufacturers(tx, of),
    "registered ones": lambda tx, of, it: enrolment.registered_manufacturers(tx, tenant_id=of),
    "an enrolment": lambda tx, of, it: enrolment.find_enrolment(tx, of, token_id=None, identity=HASH),
    "one by another key": lambda tx, of, it: enrolment.find_enrolment(tx, of, token_id=None, identity=OTHER_HASH),
    "the last one": lambda tx, of, it: enrolment.last_enrolment(tx, of, it.device_id),
    "a blocked factory key": lambda tx, of, it: enrolment.is_blocked(tx, of, "c" * 64),
    "a request for a key": lambda tx, of, it: enrolment.find_reenrolment(tx, of, it.enrolment_id),
    "waiting requests": lambda tx, of, it: enrolment.waiting_reenrolments(tx, of, limit=9),
    "a profile": lambda tx, of, it: profiles.find_profile(tx, of, "servers"),
    "profiles": lambda tx, of, it: profiles.list_profiles(tx, of),
    "a profile to hold": lambda tx, of, it: profiles.hold_profile(tx, of, "servers"),
    "the id of a profile": lambda tx, of, it: tx.execute(sa.select(profiles.id_of(of, "servers"))).scalar(),
    "users of a profile": lambda tx, of, it: profiles.users_of(tx, of, ID, now=it.now).get("device"),
    "the owner of a name": lambda tx, of, it: names.refusals(
        tx, of, [NameClaim("another device", ("pump.example.com",))], now=it.now
    ),
    "a certificate": lambda tx, of, it: certificates.get_certificate(tx, of, it.certificate_id),
    "a matter of mail": lambda tx, of, it: mail.said(tx, of, "webhook", ["one"]),
    "the last message": lambda tx, of, it: mail.last_message(tx, of),
    "CAs": lambda tx, of, it: issuers.list_issuers(tx, tenant_id=of),
    "a CA that is trusted": lambda tx, of, it: tenant_rows.has_trusted_issuer(tx, of),
    "those not revoked": lambda tx, of, it: tenant_rows.count_not_revoked(tx, of),
    "exported devices": lambda tx, of, it: tenant_rows.rows_of_devices(tx, of, after="", limit=9),
    "exported certificates": lambda tx, of, it: tenant_rows.rows_of_certificates(tx, of, after=0, limit=9),
    "sessions": lambda tx, of, it: sessions.list_sessions(tx, of, None, now=it.now),
    "events sent": lambda tx, of, it: webhooks.list_deliveries(
        tx, of, it.webhook_id, limit=9, before=None, status=None
    ),
    "the backlog": lambda tx, of, it: webhooks.backlog(tx, of),
    "a page of entries": lambda tx, of, it: list(audit.read_entries(tx, of, after=0)),
    "the hash of an entry": lambda tx, of, it: audit.hash_at(tx, of, 1),
}
# Each changes something for the first tenant, and nothing as another one.
WRITES: dict[str, Ask] = {
    "a policy": lambda tx, of, it: attestation.replace_policy(tx, of, ID, {"a": 1}, [], now=it.now),
    "nonces beyond the limit": lambda tx, of, it: attestation.add_nonce(
        tx, of, "holder", nonce_hash=OTHER_HASH, seed=b"s", expires_at=LONG_AGO, limit=1
    ),
    "the oldest nonce": lambda tx, of, it: add_two_nonces(tx, of),
    "a nonce": lambda tx, of, it: attestation.spend_nonce(tx, of, "holder", HASH, now=it.now),
    "a new result": lambda tx, of, it: attestation.put_attestation(
        tx, AttestationRecord(**{**_values(it.result), "tenant_id": of, "claims": {"a": 1}})
    ),
    "an outdated result": lambda tx, of, it: attestation.outdate_attestation(
        tx, of, it.device_id, key_fingerprint=OTHER_HASH, code="outdated", problem="Another key."
    ),
    "a result that is appraised again": lambda tx, of, it: attestation.update_attestation(
        tx, AttestationRecord(**{**_values(it.result), "tenant_id": of}), policy_version=2
    ),
    "a manufacturer": lambda tx, of, it: enrolment.update_manufacturer(tx, of, ID, name="taken over"),
    "an enrolment": lambda tx, of, it: enrolment.update_enrolment(tx, of, it.enrolment_id, serial="taken over"),
    "another request for a key": lambda tx, of, it: enrolment.add_reenrolment(
        tx, of, it.enrolment_id, key_fingerprint=OTHER_HASH, asked_at=it.now
    ),
    "a decision": lambda tx, of, it: enrolment.decide_reenrolment(
        tx, of, it.enrolment_id, key_fingerprint=HASH, status=EnrolmentStatus.APPROVED, decided_at=it.now
    ),
    "an approval": lambda tx, of, it: enrolment.use_reenrolment(tx, of, it.enrolment_id, HASH),
    "a name": lambda tx, of, it: names.claim_names(
        tx, of, [(NameClaim(it.device_id, ("pump.example.com",)), it.other_certificate_id)], now=SOON
    ),
    "a message": lambda tx, of, it: mail.forget(tx, of, "webhook"),
    "old matters": lambda tx, of, it: mail.forget_older(tx, of, before=SOON),
    "a bundle that an upload replaces": lambda tx, of, it: bulk.supersede_unfetched(
        tx, of, [it.known], at=it.now, generation=9
    ),
    "events that are sent again": lambda tx, of, it: webhooks.redeliver(tx, of, it.webhook_id, None, now=it.now),
    "some of them": lambda tx, of, it: webhooks.redeliver(tx, of, it.webhook_id, [it.event.id], now=it.now),
    "a webhook": lambda tx, of, it: webhooks.remove_webhook(tx, of, it.webhook_id),
    "the use of a session": lambda tx, of, it: sessions.mark_seen(tx, of, ID, at=SOON),
    "a session": lambda tx, of, it: sessions.end_session(tx, of, ID),
    "the sessions of a token": lambda tx, of, it: sessions.end_sessions_of(tx, of, it.token_id),
    "all devices": lambda tx, of, it: tenant_rows.revoke_some(
        tx, of, reason="superseded", at=it.now, generation=9, limit=9
    ),
    "all access": lambda tx, of, it: tenant_rows.end_access(tx, of, at=it.now),
    "a compromised key": lambda tx, of, it: keys.block_keys(tx, of, None, [_key_of(tx, it.device_id)], at=it.now),
}


def _values(record: AttestationRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in AttestationRecord.__slots__}


def _key_of(tx: Connection, device_id: str) -> str:
    query = "SELECT key_fingerprint FROM device_keys WHERE device_id = :device"
    return str(tx.execute(sa.text(query), {"device": device_id}).scalars().first())


def outcome(tx: Connection, of: str, ask: Ask, owned: Owned) -> Any:
    """What is answered, nothing if it is refused: by the store, or by the database."""
    try:
        return ask(tx, of, owned)
    except (PortalError, sa.exc.NoResultFound, IntegrityError):
        return None


def test_nothing_of_another_tenant_is_found(portal: Portal, owned: Owned) -> None:
    with portal.database.transaction() as tx:
        for name, ask in READS.items():
            assert outcome(tx, "default", ask, owned), name
            assert not outcome(tx, "another", ask, owned), name


def test_nothing_of_another_tenant_is_changed(portal: Portal, owned: Owned) -> None:
    with portal.database.transaction() as tx:
        for name, ask in WRITES.items():
            savepoint = tx.begin_nested()
            if name == "an approval":
                WRITES["a decision"](tx, "default", owned)
            before = rows_of_default(tx)
            outcome(tx, "another", ask, owned)
            assert rows_of_default(tx) == before, name
            outcome(tx, "default", ask, owned)
            assert rows_of_default(tx) != before, name
            savepoint.rollback()


def test_a_factory_key_that_one_tenant_knows_is_new_to_another(portal: Portal, owned: Owned) -> None:
    assert owned.enrolment_id
    with portal.database.transaction() as tx:
        for known in (HASH, OTHER_HASH):
            enrolment.add_factory_key(tx, "another", known, None)
            assert enrolment.is_blocked(tx, "another", known)
            assert not enrolment.is_blocked(tx, "default", known)
