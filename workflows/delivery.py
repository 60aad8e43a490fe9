"""The use case of a download: a bundle handed out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import credential_delivery as delivery
from config import Settings
from core.errors import LinkRevoked
from core.failpoints import failpoint
from delivery.formats import BundleFormat
from store import deliveries
from store.database import Database
from workflows import audit, events
from workflows.audit import Actor
from workflows.events import EventType
from workflows.registration import Onboarding
from workflows.terms import Bundle

# A fetch holds its link for this long; a portal that dies meanwhile leaves the link to be fetched again after it.
FETCH_LEASE = timedelta(seconds=30)


class Deliveries:
    """The bundles behind the signed links."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        onboarding: Onboarding,
        link_keys: Sequence[str],
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._database = database
        self._onboarding = onboarding
        self._link_keys = link_keys
        self._clock = clock

    def check_download(self, token: str) -> deliveries.DeliveryRecord:
        """Look at what a link's token stands for and spend nothing.

        Raises ``LinkUnknown``, ``LinkUsed``, ``LinkExpired``, ``LinkRevoked``.
        """
        now = self._clock()
        # The signature's own age limit is the longest a link can live; what counts is the time in the database.
        delivery_id = delivery.read_download_token(
            token, self._link_keys, now=now, max_age=timedelta(hours=self._settings.link_hours) + timedelta(days=1)
        )
        with self._database.snapshot() as tx:
            return deliveries.get_delivery(tx, delivery_id, now=now)

    def claim_download(self, actor: Actor, token: str) -> Bundle:
        """Take the bundle behind a link for one fetch; call ``end_download`` before its end goes out.

        Call ``finish_download`` or ``release_download`` afterwards.

        Raises as ``check_download`` does, and ``Unavailable`` while the broker does not know the device.
        """
        record = self.check_download(token)
        self._onboarding.wait_until_granted(record.generation)
        now = self._clock()
        grace = timedelta(seconds=self._settings.link_grace)
        with self._database.transaction() as tx:
            content = deliveries.claim_delivery(tx, record.id, now=now, lease=FETCH_LEASE, grace=grace)
            audit.record(tx, actor, "bundle:fetch", f"device:{record.device_id}", at=now, delivery=record.id)
        failpoint("deliver.after_claim")
        return Bundle(record.id, record.device_id, content, BundleFormat(record.format))

    def end_download(self, bundle: Bundle) -> None:
        """Call before the end of the bundle goes out: from here on a crash leaves the link used, not open again.

        Raises ``LinkRevoked`` where the device was revoked meanwhile; the end must not go out then.
        """
        if not self._database.write(lambda tx: deliveries.close_delivery(tx, bundle.delivery_id)):
            raise LinkRevoked("What this link leads to has been revoked, so its bundle was destroyed.")
        failpoint("deliver.after_end")

    def finish_download(self, actor: Actor, bundle: Bundle) -> None:
        """The bundle has arrived: destroy it."""
        failpoint("deliver.before_finish")
        now = self._clock()
        with self._database.transaction() as tx:
            if deliveries.finish_delivery(tx, bundle.delivery_id, delivered_at=now):
                events.record(tx, actor.tenant_id, EventType.DELIVERED, bundle.device_id, at=now)
                audit.record(
                    tx, actor, "bundle:deliver", f"device:{bundle.device_id}", at=now, delivery=bundle.delivery_id
                )

    def release_download(self, bundle: Bundle) -> None:
        """The fetch broke off: the same link may be used again within the grace time."""
        with self._database.transaction() as tx:
            deliveries.release_delivery(tx, bundle.delivery_id, now=self._clock())
