"""Follows who is connected to the broker, writes it in batches, and says what is known of it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from broker.control import PresenceReport, PresenceReports
from broker_provisioning import BrokerProvisioning
from config import Settings
from core import metrics
from core.errors import BrokerUnavailable
from core.states import PresenceState
from store import tenants
from store.database import Database
from store.presences import Places, PresenceRecord, connected_page, record_presences

log = logging.getLogger("portal.presence")

CONTACT_FILE = ".presence"
# What was known when the broker was last heard counts for so long; it is asked every two seconds.
CONTACT_SECONDS = 15.0
OPEN_SECONDS, RECEIVE_SECONDS = 2.0, 10.0
WHOLE_SECONDS = 60.0  # until everybody has to be reported
# The broker keeps a thousand messages for who reads none, which is a minute's worth at worst, and drops what is more.
UNREAD_SECONDS = 30.0
# Rows in a transaction, and the pause after it: on SQLite others that write wait for one, and then have their turn.
BATCH, PAUSE_SECONDS = 250, 0.005
PAGE = 5000  # rows that are read at once, to compare them


@dataclass(frozen=True, slots=True)
class Contact:
    """When the broker was last heard of by who follows it, and whether that says who is connected now."""

    at: datetime | None
    is_current: bool


@dataclass(frozen=True, slots=True)
class DeviceConnection:
    """Whether a device is connected, ``None`` if that is not known; since when; and when it was last seen, if ever."""

    connected: bool | None
    since: datetime | None
    last_seen: datetime | None


def connection_of(record: PresenceRecord, contact: Contact) -> DeviceConnection | None:
    """Return what is known of a device's connection; ``None`` if the device was certainly never seen."""
    state, since = record.state, record.since
    if state is PresenceState.NEVER_SEEN:
        return None if contact.is_current else DeviceConnection(None, None, None)
    if state is PresenceState.CONNECTED:
        seen = since if contact.at is None else max(since, contact.at)
        return DeviceConnection(True, since, seen) if contact.is_current else DeviceConnection(None, None, seen)
    return DeviceConnection(False, since, since) if contact.is_current else DeviceConnection(None, None, since)


@dataclass(frozen=True, slots=True)
class ContactFile:
    """The last contact of the process that follows the broker, for all processes on the data folder.

    A file, and no row: it changes every two seconds, need not survive anything, and makes no work for the database.
    Its content has a fixed length, so that overwriting it needs no space on the disk.
    """

    _path: Path
    _clock: Callable[[], datetime]

    def read(self) -> Contact:
        """Return the last contact; not current if it is older than ``CONTACT_SECONDS``, or was lost."""
        _, follows, at = self._content()
        is_recent = at is not None and abs(self._clock() - at) <= timedelta(seconds=CONTACT_SECONDS)
        return Contact(at, follows and is_recent)

    def owner(self) -> str:
        """Return who wrote it last."""
        return self._content()[0]

    def made(self, owner: str) -> None:
        """Note that the broker was heard just now, and that the database says who is connected."""
        self._write(owner, "follows", self._clock())

    def lost(self, owner: str) -> None:
        """Note that nothing is known after the last contact."""
        self._write(owner, "lost", self._content()[2])

    def _content(self) -> tuple[str, bool, datetime | None]:
        with contextlib.suppress(OSError, ValueError, OverflowError):
            owner, state, seconds = self._path.read_text(encoding="ascii").split()
            at = datetime.fromtimestamp(float(seconds), UTC) if seconds != "never" else None
            return owner, state == "follows", at
        return "", False, None

    def _write(self, owner: str, state: str, at: datetime | None) -> None:
        seconds = "never" if at is None else f"{at.timestamp():.6f}"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, f"{owner or '-':16} {state:8} {seconds:>24}\n".encode(), 0)
        finally:
            os.close(descriptor)


@dataclass(eq=False)
class PresenceFollower:
    """Follows one broker; one process at a time does, and calls ``follow`` again and again."""

    _settings: Settings
    _database: Database
    _broker: BrokerProvisioning
    _clock: Callable[[], datetime]
    contact: ContactFile = field(init=False)
    _owner: str = field(init=False, default="")  # of the session with the broker
    _reports: PresenceReports | None = field(init=False, default=None)
    _asked_at: float = field(init=False, default=0.0)  # when the reports were asked for, by the monotonic clock
    _read_at: float = field(init=False, default=0.0)  # when they were read last
    _changed: dict[str, PresenceRecord] = field(init=False, default_factory=dict)  # to be written
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
            self._problem = None

    def close(self) -> None:
        """End the session with the broker."""
        reports, self._reports = self._reports, None
        if reports is not None:
            reports.close()

    # --- What the broker tells

    def _open(self) -> PresenceReports | None:
        self._reports = self._broker.follow_presence(time.monotonic() + OPEN_SECONDS)
        if self._reports is not None:
            self._asked_at, self._owner = time.monotonic(), secrets.token_hex(8)
            self.contact.lost(self._owner)  # until it has reported everybody
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
                identity: PresenceRecord(PresenceState.OFFLINE, record.since)
                for identity, record in self._changed.items()
                if identity not in report.connected
            }
            return
        for identity, since in report.connected.items():
            self._changed[identity] = PresenceRecord(PresenceState.CONNECTED, since)
        for identity, at in report.disconnected.items():
            self._changed[identity] = PresenceRecord(PresenceState.OFFLINE, at)
        metrics.counts.connects.inc(len(report.connected))
        metrics.counts.disconnects.inc(len(report.disconnected))

    def _lose(self, problem: str) -> None:
        self.close()
        if self.contact.read().is_current:
            self.contact.lost(self._owner)
        if self._problem is None:
            log.warning("it is not known which devices are connected", extra={"problem": problem})
        self._problem = problem

    # --- What is written

    def _write(self) -> None:
        """Write what has changed; a whole set first, since the changes came after it."""
        if self._whole is not None:
            self._write_whole(self._whole)
            self._whole = None
        self._record(self._changed)
        self._changed.clear()

    def _write_whole(self, connected: Mapping[str, datetime]) -> None:
        """Write who differs from the whole set: who is not in it was last seen when the broker was last heard."""
        heard, new = self.contact.read().at, dict(connected)
        for page in self._pages():
            gone: dict[str, PresenceRecord] = {}
            for since, identity in page:
                if identity not in connected:
                    gone[identity] = PresenceRecord(
                        PresenceState.OFFLINE, since if heard is None else max(since, heard)
                    )
                elif connected[identity] == since:
                    del new[identity]
            self._record(gone)
        self._record({who: PresenceRecord(PresenceState.CONNECTED, at) for who, at in new.items()})

    def _pages(self) -> Iterator[Places]:
        """Yield who is connected by the database, of all tenants: the broker's report does not tell them apart."""
        with self._database.snapshot() as tx:
            everybody = tenants.tenant_ids(tx)
        for tenant_id in everybody:
            after = None
            while True:
                with self._database.snapshot() as tx:
                    page = connected_page(tx, tenant_id, limit=PAGE, after=after)
                if not page:
                    break
                yield page
                after = page[-1]

    def _record(self, records: Mapping[str, PresenceRecord]) -> None:
        items = iter(records.items())
        while batch := dict(itertools.islice(items, BATCH)):
            # Need not survive a power cut: the next whole set repairs it.
            with self._database.transaction(durable=False) as tx:
                record_presences(tx, batch)
            time.sleep(PAUSE_SECONDS)
