"""Follows who is connected to the broker beside this node, and writes it in batches."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy.engine import Connection

from broker.control import PresenceReport, PresenceReports
from broker_provisioning import BrokerProvisioning
from config import Settings
from core import metrics
from core.errors import BrokerUnavailable, PortalError
from core.states import PresenceState
from store import brokers
from store.database import Database
from store.presences import Place, Sighting, connected_at, record_presences
from store.scope import ALL_TENANTS
from workflows.connections import CONTACT_FILE, ContactFile

log = logging.getLogger("portal.presence")

NOTE_SECONDS = 5.0  # between two notes for other nodes
OPEN_SECONDS, RECEIVE_SECONDS = 2.0, 10.0
WHOLE_SECONDS = 60.0  # until everybody has to be reported
# The broker keeps a thousand messages for who reads none, which is a minute's worth at worst, and drops what is more.
UNREAD_SECONDS = 30.0
# Rows in a transaction, and the pause after it: on SQLite others that write wait for one, and then have their turn.
BATCH, PAUSE_SECONDS = 250, 0.005
PAGE = 5000  # rows that are read at once, to compare them


@dataclass(eq=False)
class PresenceFollower:
    """Follows one broker; one process at a time does, and calls ``follow`` again and again."""

    _settings: Settings
    _database: Database
    _broker: BrokerProvisioning
    _broker_id: int
    _clock: Callable[[], datetime]
    contact: ContactFile = field(init=False)
    _owner: str = field(init=False, default="")  # of the session with the broker
    _reports: PresenceReports | None = field(init=False, default=None)
    _asked_at: float = field(init=False, default=0.0)  # when the reports were asked for, by the monotonic clock
    _read_at: float = field(init=False, default=0.0)  # when they were read last
    _noted_at: float = field(init=False, default=-math.inf)  # when other nodes were told of the contact
    _changed: dict[str, Sighting] = field(init=False, default_factory=dict)  # to be written
    _whole: Mapping[str, datetime] | None = field(init=False, default=None)  # a whole set, to be compared and written
    _problem: str | None = field(init=False, default=None)  # logged already

    def __post_init__(self) -> None:
        self.contact = ContactFile(self._settings.data_dir / CONTACT_FILE, self._clock)

    def follow(self) -> None:
        """Take in what the broker has reported since the last call, and write it.

        What could not be written stays for the next call. If the broker does not answer, or another process has begun
        to follow it, nothing is known until it has reported everybody again.
        """
        unread = time.monotonic() - self._read_at > UNREAD_SECONDS
        if self._reports is not None and (unread or self.contact.owner() != self._owner):
            self.close()  # reports may be missing, because they were too many or went to another process
        try:
            reports = self._reports or self._open()
            if reports is None:
                return
            self._receive(reports)
        except (BrokerUnavailable, OSError) as error:
            self._lose(str(error))
            return
        self._write()
        if self._whole is None and not reports.is_incomplete:
            self.contact.made(self._owner)
            self._note(self._clock())
            self._problem = None

    def close(self) -> None:
        """End the session with the broker."""
        reports, self._reports = self._reports, None
        if reports is not None:
            reports.close()

    def _note(self, at: datetime | None) -> None:
        """Tell other nodes, which do not read this one's file, that it is known who is connected, or not any more."""
        if self._database.is_sqlite or (at is not None and time.monotonic() - self._noted_at < NOTE_SECONDS):
            return
        try:
            with self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
                brokers.note_presence(tx, self._broker_id, at=at)
            self._noted_at = time.monotonic() if at is not None else -math.inf
        except PortalError:
            log.warning("other nodes are not told whether it is known who is connected")

    # --- What the broker tells

    def _open(self) -> PresenceReports | None:
        self._reports = self._broker.follow_presence(time.monotonic() + OPEN_SECONDS)
        if self._reports is not None:
            self._asked_at, self._owner = time.monotonic(), secrets.token_hex(8)
            self.contact.lost(self._owner)  # until it has reported everybody
            self._note(None)
        return self._reports

    def _receive(self, reports: PresenceReports) -> None:
        deadline = time.monotonic() + RECEIVE_SECONDS
        for report in reports.receive(deadline):
            self._take(report)
        while reports.is_incomplete and time.monotonic() < deadline:
            for report in reports.receive(deadline):
                self._take(report)
        self._read_at = time.monotonic()
        if reports.is_incomplete and self._read_at - self._asked_at > WHOLE_SECONDS:
            raise BrokerUnavailable("The broker does not report everybody: see its log, and max_queued_bytes.")

    def _take(self, report: PresenceReport) -> None:
        if report.is_whole:
            self._whole = report.connected
            # Not written yet, and older: who is not connected any more was seen then, at least.
            self._changed = {
                identity: Sighting(PresenceState.OFFLINE, record.since)
                for identity, record in self._changed.items()
                if identity not in report.connected
            }
            return
        for identity, since in report.connected.items():
            self._changed[identity] = Sighting(PresenceState.CONNECTED, since)
        for identity, at in report.disconnected.items():
            self._changed[identity] = Sighting(PresenceState.OFFLINE, at)
        metrics.counts.connects.inc(len(report.connected))
        metrics.counts.disconnects.inc(len(report.disconnected))

    def _lose(self, problem: str) -> None:
        self.close()
        if self.contact.read().is_current:
            self.contact.lost(self._owner)
            self._note(None)
        if self._problem is None:
            log.warning("it is not known which devices are connected", extra={"problem": problem})
        self._problem = problem

    # --- What is written

    def _write(self) -> None:
        """Write what has changed; a whole set first, since the changes came after it."""
        if self._whole is not None:
            self._write_whole(self._whole)
            self._whole = None
        record_in_batches(self._database, self._broker_id, self._changed)
        self._changed.clear()

    def _write_whole(self, connected: Mapping[str, datetime]) -> None:
        """Write who differs from the whole set: who is not in it was last seen when the broker was last heard."""
        heard, new = self.contact.read().at, dict(connected)
        for page in pages(self._database, self._broker_id):
            record_in_batches(self._database, self._broker_id, gone(page, connected, heard))
            for identity, since, is_removed in page:
                if not is_removed and connected.get(identity) == since is not None:
                    del new[identity]
        told = {who: Sighting(PresenceState.CONNECTED, at) for who, at in new.items()}
        record_in_batches(self._database, self._broker_id, told)


def pages(database: Database, broker_id: int) -> Iterator[Sequence[Place]]:
    """Yield who may be connected to a broker by the database; what follows a page may be changed meanwhile."""
    after = ""
    while True:
        with database.snapshot(sees=ALL_TENANTS) as tx:
            page = connected_at(tx, broker_id, limit=PAGE, after=after)
        if not page:
            return
        yield page
        after = page[-1].identity


def gone(page: Sequence[Place], connected: Container[str], heard: datetime | None) -> dict[str, Sighting]:
    """Return who is not connected any more: seen last when the broker was ``heard`` last."""
    return {
        identity: Sighting(PresenceState.OFFLINE, since if heard is None else max(since, heard))
        for identity, since, _ in page
        if since is not None and identity not in connected
    }


def record_in_batches(
    database: Database,
    broker_id: int,
    seen: Mapping[str, Sighting],
    allowed: Callable[[Connection, Mapping[str, Sighting]], Mapping[str, Sighting]] = lambda _tx, batch: batch,
) -> None:
    """Write what a broker has told, of each batch what is ``allowed`` in its transaction."""
    items = iter(seen.items())
    while batch := dict(itertools.islice(items, BATCH)):
        # Need not survive a power cut: the next whole set repairs it.
        with database.transaction(durable=False, sees=ALL_TENANTS) as tx:
            record_presences(tx, broker_id, allowed(tx, batch))
        time.sleep(PAUSE_SECONDS)
