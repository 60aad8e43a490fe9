"""A restore gives back neither topics that were taken away since nor webhooks that were deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from config import Settings
from operations.wiring import Portal
from store.tables import AclEntry, Device, Webhook
from tests.support.backups import copied, opened, put_back
from tests.support.harness import PER_DEVICE, Clock
from tests.workflows.test_registration import OPERATOR, PUMP

WIDE = [("devices/{id}/#", "readwrite"), ("devices/hall/temperature", "read")]
NARROW = [("devices/{id}/up", "write")]


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
