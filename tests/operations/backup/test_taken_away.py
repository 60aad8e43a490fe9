"""A restore gives back neither topics that were taken away since, nor deleted webhooks, nor devices revoked since."""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from config import Settings
from core.errors import EnrolmentRefused
from core.roles import Role
from core.states import Approval, RepeatedSerial
from operations.wiring import Portal, prepare
from pki.est import read_enrolment_request
from pki.profiles import CertificateProfile
from store.enrolment import EnrolmentProfile
from store.tables import AclEntry, Device, Webhook
from tests.support.attestation import Maker as AttestationMaker
from tests.support.attested import policy
from tests.support.backups import copied, opened, put_back
from tests.support.est import csr_der
from tests.support.harness import PER_DEVICE, Clock
from tests.support.pki import PEM, Authority
from tests.web.api.test_est_clients import der, pem
from tests.workflows.test_registration import OPERATOR, PUMP
from web.api.evidence import AttestationPolicyRequest
from workflows.enrolment.clients import ManufacturedClient
from workflows.enrolment.credentials import Enrolled, by_manufacturer

pytestmark = pytest.mark.both_stores

WIDE = [("devices/{id}/#", "readwrite"), ("devices/hall/temperature", "read")]
NARROW = [("devices/{id}/up", "write")]
TERMS = EnrolmentProfile(
    "pump", "hall 1", "1", "{serial}", ("ec-p256",), None, Approval.AT_ONCE, RepeatedSerial.SAME_DEVICE
)
ADMIN = dataclasses.replace(OPERATOR, role=Role.ADMIN)


def topics_of(portal: Portal, device_id: str) -> tuple[bool, list[tuple[str, str]]]:
    with portal.database.snapshot() as tx:
        own = tx.execute(sa.select(Device.own_topics).where(Device.id == device_id)).scalar_one()
        query = sa.select(AclEntry.filter, AclEntry.access).where(AclEntry.device_id == device_id)
        return own, [(row.filter, row.access) for row in tx.execute(query.order_by(AclEntry.position))]


def webhook_ids(portal: Portal) -> set[str]:
    with portal.database.snapshot() as tx:
        return set(tx.execute(sa.select(Webhook.id)).scalars())


@PER_DEVICE
@pytest.mark.parametrize(
    ("before", "since", "stays_taken"),
    [(WIDE, NARROW, True), (None, NARROW, True), (WIDE, None, True), (NARROW, NARROW + WIDE[1:], False)],
)
def test_topics_that_were_taken_away_stay_away(
    settings: Settings, file: Path, clock: Clock, before: Any, since: Any, stays_taken: bool
) -> None:
    with opened(settings, clock) as portal:
        device_id = portal.registrations.register(OPERATOR, PUMP).device_id
        portal.registrations.update(OPERATOR, device_id, {}, before)
        then = topics_of(portal, device_id)
        copied(settings, file, clock)
        portal.registrations.update(OPERATOR, device_id, {}, since)
        now = topics_of(portal, device_id)
    assert then != now
    done = put_back(settings, file, clock)
    assert [kept.what for kept in done.kept] == ([f"topics of device {device_id} (pump-1)"] if stays_taken else [])
    with opened(settings, clock) as portal:
        assert topics_of(portal, device_id) == (now if stays_taken else then)


def test_a_reason_that_was_made_worse_stays_worse(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        device_id = portal.registrations.register(OPERATOR, PUMP).device_id
        first = portal.revocations.revoke(OPERATOR, device_id, "superseded")
        copied(settings, file, clock)
        clock.advance(minutes=5)
        portal.revocations.revoke(OPERATOR, device_id, "key_compromise")
    done = put_back(settings, file, clock)
    assert [(kept.what, kept.reason, kept.at) for kept in done.kept] == [
        (f"device {device_id} (pump-1)", "key_compromise", first.revoked_at)
    ]
    with opened(settings, clock) as portal:
        assert portal.inventory.device("default", device_id).device.revocation_reason == "key_compromise"


def test_a_webhook_that_was_deleted_stays_deleted_and_the_others_come_back(
    settings: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        portal.registrations.register(OPERATOR, PUMP)
        gone, stays = (
            portal.webhooks.create(OPERATOR, name, f"https://{name}.example.com/", ())[1].id for name in ("a", "b")
        )
        copied(settings, file, clock)
        portal.webhooks.delete(OPERATOR, gone)
    done = put_back(settings, file, clock)
    assert [kept.what for kept in done.kept] == ["webhook a"]
    with opened(settings, clock) as portal:
        assert webhook_ids(portal) == {stays}


def test_terms_that_were_made_stricter_are_told_line_by_line_where_they_are_as_before(
    settings: Settings, file: Path, clock: Clock
) -> None:
    attestation = AttestationPolicyRequest.model_validate_json(json.dumps(policy(AttestationMaker()))).wanted()
    with opened(settings, clock) as portal:
        portal.registrations.register(OPERATOR, PUMP)
        _same, stricter, gone = (
            portal.manufacturers.add(OPERATOR, name, pem(Authority(name)), TERMS).id for name in ("a", "b", "c")
        )
        _, token = portal.enrolment_tokens.create(
            OPERATOR, "batch", TERMS, device_id=None, count=9, life=timedelta(hours=2)
        )
        for name in ("changed", "removed", "kept"):
            portal.profiles.add(OPERATOR, CertificateProfile(name))
        for name in ("changed", "kept"):
            portal.groups.add(OPERATOR, name, "", saved=None, topics=None, validity_days=9)
        copied(settings, file, clock)
        portal.manufacturers.update(OPERATOR, stricter, {"approval": "operator", "key_types": ["ec-p384"]})
        portal.manufacturers.update(OPERATOR, gone, {"approval": "operator"})
        portal.manufacturers.remove(OPERATOR, gone)
        portal.enrolment_tokens.set_attestation(ADMIN, token.id, attestation)
        portal.profiles.update(OPERATOR, "changed", {"max_days": 9})
        portal.profiles.remove(OPERATOR, "removed")
        portal.groups.update(OPERATOR, "changed", {"validity_days": 2})
    done = put_back(settings, file, clock)
    assert [line.partition(" (")[0] + line.partition(")")[2] for line in done.older] == [
        "manufacturer b: approval, key_types",
        "enrolment token batch: attestation",
        "certificate profile changed: max_days",
        "certificate profile removed: it was removed since, and exists again",
        "group changed: validity_days",
    ]


def enrol(portal: Portal, factory_certificate: bytes) -> str:
    """Have a device enrol with its factory certificate, DER; return its id."""
    client, request = portal.clients.identify(factory_certificate), read_enrolment_request(csr_der())
    assert isinstance(client, ManufacturedClient)
    outcome = portal.enrolment.enrol(OPERATOR, by_manufacturer(client), request)
    assert isinstance(outcome, Enrolled)
    return outcome.device_id


def test_a_device_that_enrolled_and_was_revoked_since_does_not_come_back_by_its_factory_certificates(
    settings: Settings, file: Path, clock: Clock
) -> None:
    maker = Authority("A maker's CA")
    revoked, active = ([der(maker.issue(serial).certificate) for _ in range(2)] for serial in ("sn-1", "sn-2"))
    with opened(settings, clock) as portal:
        prepare(portal)
        record = portal.manufacturers.add(OPERATOR, "maker", pem(maker), TERMS)
        proof = maker.issue(record.nonce).certificate.public_bytes(PEM).decode()
        portal.manufacturers.prove(OPERATOR, record.id, certificate=proof)
        portal.registrations.register(OPERATOR, PUMP)
        copied(settings, file, clock)
        for certificate in (*revoked, active[0]):
            device_id = enrol(portal, certificate)
            if certificate == revoked[1]:
                portal.revocations.revoke(OPERATOR, device_id, "privilege_withdrawn")
    for _ in range(2):  # the second time the block itself is what the replaced database has
        put_back(settings, file, clock)
        with opened(settings, clock) as portal:
            prepare(portal)
            for certificate in revoked:
                with pytest.raises(EnrolmentRefused, match="was revoked"):
                    enrol(portal, certificate)
            enrol(portal, active[0])
