"""The use case of a download: the bundle behind a link is handed out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

import credential_delivery
from config import Settings
from core.failpoints import failpoint
from delivery.formats import BundleFormat
from store import audit, deliveries
from store.audit import Actor
from store.database import Database
from workflows import events
from workflows.events import EventType
from workflows.reconciliation import Reconciler


@dataclass(frozen=True, slots=True)
class DeliveredBundle:
    """A bundle that was taken from the database, and is nowhere else."""

    delivery_id: str
    device_id: str
    content: bytes
    format: BundleFormat = BundleFormat.ZIP


class Deliveries:
    """The bundles behind the signed links."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        reconciler: Reconciler,
        link_keys: Sequence[str],
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._database = database
        self._reconciler = reconciler
        self._link_keys = link_keys
        self._clock = clock

    def check_download(self, token: str) -> deliveries.DeliveryRecord:
        """Return what a link's token leads to, without using the link.

        Raises ``LinkUnknown``, ``LinkUsed``, ``LinkExpired``, ``LinkRevoked``.
        """
        now = self._clock()
        # The signature's own age limit is the longest a link can live; what counts is the time in the database.
        delivery_id = credential_delivery.read_download_token(
            token, self._link_keys, now=now, max_age=timedelta(hours=self._settings.link_hours) + timedelta(days=1)
        )
        with self._database.snapshot() as tx:
            return deliveries.get_delivery(tx, delivery_id, now=now)

    def deliver(self, actor: Actor, token: str) -> DeliveredBundle:
        """Return the bundle behind a link; the link is used, and the bundle destroyed, before this returns.

        Whether the bundle reaches the client cannot be known, so nothing that happens afterwards opens the link again.
        Raises as ``check_download`` does, and ``Unavailable`` while the broker does not know the device.
        """
        record = self.check_download(token)
        self._reconciler.wait_until_granted(record.generation)
        now = self._clock()
        device = f"device:{record.device_id}"

        def spend(tx: Connection) -> bytes:
            content = deliveries.spend_delivery(tx, record.id, now=now)
            events.record(tx, actor.tenant_id, EventType.DELIVERED, record.device_id, at=now)
            audit.record(tx, actor, "bundle:fetch", device, at=now, delivery=record.id)
            audit.record(tx, actor, "bundle:deliver", device, at=now, delivery=record.id)
            failpoint("deliver.before_commit")
            return content

        content = self._database.write(spend)
        failpoint("deliver.after_commit")
        return DeliveredBundle(record.id, record.device_id, content, BundleFormat(record.format))
