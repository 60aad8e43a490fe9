"""What operators read about devices: lists, details, certificates; and the CRLs that are published."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import db
from config import Settings
from core.errors import FieldProblem, InputInvalid, PortalError
from core.topics import Access, Topic, default_topics, is_device_id
from store import certificates as store_certificates
from store import devices as store_devices
from store import generations, issuers
from store.certificates import CertificateRecord
from store.database import Database
from store.devices import DeviceFilter, DeviceRecord, Place
from store.issuers import CrlHead, CrlRecord

log = logging.getLogger("portal.devices")


@dataclass(frozen=True, slots=True)
class DeviceDetails:
    """A device with its current or last certificate; ``applied``: the broker enforces its latest change."""

    device: DeviceRecord
    certificate: CertificateRecord | None
    topics: tuple[Topic, ...]
    applied: bool


@dataclass(frozen=True, slots=True)
class Page:
    """A page of devices with the not_after and not_before of their certificates; ``cursor`` leads to the next page."""

    devices: Sequence[tuple[DeviceRecord, datetime | None, datetime | None]]
    cursor: str | None


@dataclass(eq=False, repr=False)
class Inventory:
    """Reads only, and each answer from one state of the database."""

    _settings: Settings
    _database: Database
    _sign_crls: Callable[[], None]
    _crls: dict[int, tuple[CrlHead, CrlRecord]] = field(init=False, default_factory=dict)  # by issuer, as read last

    def device(self, tenant_id: str, device_id: str) -> DeviceDetails:
        """Return one device; raises ``DeviceNotFound``."""
        with self._database.snapshot() as tx:
            device = db.get_device(tx, tenant_id, device_id)
            certificate = store_certificates.current_certificate(tx, tenant_id, device_id)
            own = store_devices.device_topics(tx, tenant_id, device_id) if device.own_topics else ()
            state = generations.get_broker_state(tx, tenant_id)
        topics = tuple(Topic(pattern, Access(access)) for pattern, access in own)
        return DeviceDetails(
            device=device,
            certificate=certificate,
            topics=topics or default_topics(self._settings.topic_prefix),
            applied=device.generation <= state.applied_generation,
        )

    def certificates(self, tenant_id: str, device_id: str) -> Sequence[CertificateRecord]:
        """Return every certificate the device has had, newest first; raises ``DeviceNotFound``."""
        with self._database.snapshot() as tx:
            db.get_device(tx, tenant_id, device_id)
            return store_certificates.device_certificates(tx, tenant_id, device_id)

    def devices(self, tenant_id: str, wanted: DeviceFilter, *, limit: int, cursor: str | None) -> Page:
        """Return a page of devices, newest first, or with ``expires_before`` those that expire soonest first.

        Where several things narrow the list, a page may hold fewer than ``limit``, or none, and lead to another.
        Raises ``InputInvalid`` for a cursor that no page gave.
        """
        after = None if cursor is None else _read_cursor(cursor)
        with self._database.snapshot() as tx:
            found = store_devices.list_devices(tx, tenant_id, wanted, limit=limit + 1, after=after)
        page, next_place = found.devices[:limit], found.end
        if len(found.devices) > limit:
            last, not_after, _ = page[-1]
            at = not_after if wanted.expires_before is not None else None
            next_place = (at or last.created_at, last.id)
        return Page(page, None if next_place is None else _make_cursor(next_place))

    def crl(self, issuer_id: int) -> CrlRecord | None:
        """Return the newest CRL of an issuer, ``None`` before the first.

        What is asked of the database each time is only which one that is: so it is never an old one, and is read once.
        If a revocation is not on it yet, a newer one is signed first.
        """
        with self._database.snapshot() as tx:
            put_off = issuers.crl_is_put_off(tx, issuer_id)
        if put_off:
            try:
                self._sign_crls()
            except PortalError as error:
                log.warning("a CRL that was asked for was not signed", extra={"problem": error.detail})
        with self._database.snapshot() as tx:
            head = issuers.get_crl_head(tx, issuer_id)
            if head is None:
                return None
            seen, record = self._crls.get(issuer_id, (None, None))
            if seen != head:
                record = issuers.get_crl(tx, issuer_id)
                if record is not None:
                    self._crls[issuer_id] = (head, record)
        return record


def _make_cursor(place: Place) -> str:
    text = json.dumps([place[0].isoformat(), place[1]])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> Place:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        created_at, device_id = json.loads(text)
        time = datetime.fromisoformat(created_at).astimezone(UTC)
        if not isinstance(device_id, str) or not is_device_id(device_id):
            raise ValueError("not of the form that a page gives")
    except (ValueError, TypeError, OverflowError, RecursionError):
        problem = FieldProblem("cursor", "must be the next_cursor of the page before")
        raise InputInvalid("The cursor is not one that a page gave; begin again without it.", [problem]) from None
    return time, device_id
