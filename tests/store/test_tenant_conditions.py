"""Each query of the store finds and changes nothing of another tenant, one that is asked after a check, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import NoResultFound

import db
from core.errors import NotFound
from core.roles import Role
from core.states import Approval, RepeatedSerial
from operations.wiring import Portal
from store import (
    bulk,
    certificates,
    deliveries,
    devices,
    enrolment,
    groups,
    keys,
    presences,
    renewal,
    tenants,
    webhooks,
)
from store.enrolment import EnrolmentProfile
from store.tables import METADATA, IdempotencyKey
from tests.workflows.test_admission import OPERATOR, request_of

PROFILE = EnrolmentProfile(
    "pump", "hall 1", "1.0", "{number}", ("ec-p256",), 9, Approval.OPERATOR, RepeatedSerial.OPERATOR
)
SOON, LONG_AGO = datetime(2100, 1, 1, tzinfo=UTC), datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Owned:
    """What the first tenant has."""

    device_id: str
    fingerprint: str
    key: str
    answer: str
    token_id: str
    webhook_id: str
    enrolment_token_id: str
    group_id: str
    now: datetime


@pytest.fixture
def owned(portal: Portal) -> Owned:
    now = portal.clock()
    request = dataclasses.replace(request_of(1, csr=False), external_id="hidden-1")
    device_id = portal.registrations.register(OPERATOR, request, "an-idempotency-key").device_id
    _, token = portal.operators.create(OPERATOR, "auditor", Role.AUDITOR, None)
    _, webhook = portal.webhooks.create(OPERATOR, "hook", "https://example.com", [])
    _, enrolment_token = portal.enrolment_tokens.create(
        OPERATOR, "batch", PROFILE, device_id=None, count=9, life=timedelta(days=1)
    )
    group = portal.groups.add(OPERATOR, "pilots", "", saved=None, topics=None, validity_days=9)
    portal.groups.change_members(OPERATOR, "pilots", [device_id])
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "another", created_at=now)
        current = certificates.current_certificate(tx, "default", device_id)
        assert current is not None
        key = tx.execute(sa.text("SELECT key_fingerprint FROM device_keys")).scalars().first()
        answer = tx.execute(sa.select(IdempotencyKey.key_hash)).scalar_one()
    return Owned(
        device_id, current.fingerprint, str(key), answer, token.id, webhook.id, enrolment_token.id, group.id, now
    )


Ask = Callable[[Connection, str, Owned], Any]
# Each finds something for the first tenant, and nothing for another one.
READS: dict[str, Ask] = {
    "a device by its external id": lambda tx, of, it: devices.device_with_external_id(tx, of, "hidden-1"),
    "the devices of an upload": lambda tx, of, it: bulk.find_known(tx, of, ["hidden-1"]),
    "certificates": lambda tx, of, it: certificates.device_certificates(tx, of, it.device_id),
    "the certificate": lambda tx, of, it: certificates.current_certificate(tx, of, it.device_id),
    "how many were issued": lambda tx, of, it: certificates.count_issued(tx, of, it.device_id, since=LONG_AGO),
    "the dates of one": lambda tx, of, it: renewal.valid_dates(tx, of, it.device_id, it.fingerprint),
    "whether one is current": lambda tx, of, it: renewal.is_current(tx, of, it.device_id, it.fingerprint),
    "unfetched ones": lambda tx, of, it: renewal.unfetched_certificates(tx, of, it.device_id),
    "an answer": lambda tx, of, it: deliveries.find_answer(tx, of, it.answer, now=it.now),
    "the presence": lambda tx, of, it: presences.presence_of(tx, of, it.device_id),
    "a key": lambda tx, of, it: keys.refusals(tx, of, [keys.KeyClaim(it.key, "another device")]),
    "tokens": lambda tx, of, it: tenants.list_tokens(tx, of),
    "webhooks": lambda tx, of, it: webhooks.list_webhooks(tx, of),
    "enrolment tokens": lambda tx, of, it: enrolment.list_enrolment_tokens(tx, of, limit=9),
    "a webhook": lambda tx, of, it: webhooks.get_webhook(tx, of, it.webhook_id),
    "an enrolment token": lambda tx, of, it: enrolment.get_enrolment_token(tx, of, it.enrolment_token_id),
    "an enrolment token to use": lambda tx, of, it: enrolment.lock_enrolment_token(tx, of, it.enrolment_token_id),
    "groups": lambda tx, of, it: groups.list_groups(tx, of),
    "a group": lambda tx, of, it: groups.find_group(tx, of, "pilots"),
    "the groups of a device": lambda tx, of, it: groups.groups_of_device(tx, of, it.device_id),
    "names of groups": lambda tx, of, it: groups.group_names_of(tx, of, [it.device_id]),
    "devices for a group": lambda tx, of, it: groups.lock_devices(tx, of, [it.device_id]),
    "members": lambda tx, of, it: groups.members_among(tx, of, it.group_id, [it.device_id]),
    "a device": lambda tx, of, it: db.get_device(tx, of, it.device_id),
}
# Each changes something for the first tenant, and nothing as another one.
WRITES: dict[str, Ask] = {
    "a name": lambda tx, of, it: devices.update_device(tx, of, it.device_id, {"name": "taken over"}),
    "a suspension": lambda tx, of, it: devices.suspend_device(tx, of, it.device_id, suspended_at=it.now, generation=9),
    "a revocation": lambda tx, of, it: db.revoke_device(
        tx, of, it.device_id, revoked_at=it.now, reason="superseded", generation=9
    ),
    "a renewal": lambda tx, of, it: renewal.replace_current(tx, of, it.device_id, until=SOON, ends_when_used=False),
    "answers": lambda tx, of, it: deliveries.empty_answers(tx, of, it.device_id),
    "an answer that has ended": lambda tx, of, it: deliveries.add_answer(
        tx,
        tenant_id=of,
        key_hash=it.answer,
        created_at=SOON,
        request_hash="0",
        sealed_answer=b"0",
        generation=0,
        expires_at=SOON,
        made_by=None,
        device_id=None,
    ),
    "a token": lambda tx, of, it: tenants.revoke_token(tx, of, it.token_id, revoked_at=it.now),
    "a group": lambda tx, of, it: groups.remove_group(tx, of, it.group_id),
    "what a group says": lambda tx, of, it: groups.update_group(tx, of, it.group_id, {"description": "taken over"}),
    "a webhook": lambda tx, of, it: webhooks.remove_webhook(tx, of, it.webhook_id),
    "a use of an enrolment token": lambda tx, of, it: enrolment.count_use(tx, of, it.enrolment_token_id),
    "the end of an enrolment token": lambda tx, of, it: enrolment.revoke_enrolment_token(
        tx, of, it.enrolment_token_id, revoked_at=it.now
    ),
    "the policy of an enrolment token": lambda tx, of, it: enrolment.set_token_policy(
        tx, of, it.enrolment_token_id, "0" * 16
    ),
}


def outcome(tx: Connection, of: str, ask: Ask, owned: Owned) -> Any:
    try:
        return ask(tx, of, owned)
    except (NotFound, NoResultFound):
        return None


def rows_of_default(tx: Connection) -> dict[str, list[str]]:
    tables = [table for table in METADATA.sorted_tables if "tenant_id" in table.c]
    return {
        table.name: [str(row) for row in tx.execute(sa.select(table).where(table.c.tenant_id == "default"))]
        for table in tables
    }


def test_nothing_of_another_tenant_is_found(portal: Portal, owned: Owned) -> None:
    with portal.database.transaction() as tx:
        for name, ask in READS.items():
            assert outcome(tx, "default", ask, owned), name
            assert not outcome(tx, "another", ask, owned), name


@pytest.mark.parametrize("name", WRITES)
def test_nothing_of_another_tenant_is_changed(portal: Portal, owned: Owned, name: str) -> None:
    with portal.database.transaction() as tx:
        before = rows_of_default(tx)
        outcome(tx, "another", WRITES[name], owned)
        assert rows_of_default(tx) == before
