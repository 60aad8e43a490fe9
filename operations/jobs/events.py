"""The jobs around events: certificates that should be renewed, events that are over."""

from __future__ import annotations

import logging
from datetime import timedelta

from operations.wiring import Portal
from store import certificates, webhooks
from workflows import events
from workflows.events import EventType

log = logging.getLogger("portal.jobs")

BATCH = 500


def announce_expiring(portal: Portal) -> None:
    """Say once of each certificate past two thirds of its life that it should be renewed, by log line and event."""
    more = True
    while more:
        now = portal.clock()
        with portal.database.snapshot() as tx:
            found = certificates.renewals_to_announce(tx, now=now, limit=BATCH)
        if not found:
            return
        with portal.database.transaction() as tx:
            for one in found:
                events.record(
                    tx,
                    one.tenant_id,
                    EventType.EXPIRING,
                    one.device_id,
                    at=now,
                    name=one.name,
                    serial_number=one.serial_number,
                    expires_at=one.not_after,
                )
            certificates.mark_announced(tx, found, at=now)
        for one in found:
            detail = {"device_id": one.device_id, "expires_at": one.not_after.isoformat()}
            log.warning("a device's certificate should be renewed", extra=detail)
        more = len(found) == BATCH


def prune_events(portal: Portal) -> None:
    """Forget events that were delivered or given up ``PORTAL_EVENT_DAYS`` ago."""
    if not events.has_subscribers(portal.database.engine):
        return
    before = portal.clock() - timedelta(days=portal.settings.event_days)
    with portal.database.snapshot() as tx:
        pruned = BATCH if webhooks.anything_to_prune(tx, before=before) else 0
    while pruned == BATCH:
        with portal.database.transaction() as tx:
            pruned = webhooks.prune(tx, before=before, limit=BATCH)
