"""What is known of who is connected: by what each broker has told, and by when it was heard last."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from core.states import BrokerKind, PresenceState
from store import brokers
from store.brokers import BrokerRecord
from store.database import Database
from store.presences import PresenceRecord
from store.scope import ALL_TENANTS

CONTACT_FILE = ".presence"
# What was known when the broker was last heard counts for so long; it is asked every two seconds.
CONTACT_SECONDS = 15.0
AGENT_SECONDS = 35.0  # of an agent's broker, which gives a sign of life every ten seconds
OTHERS_SECONDS = 1.0  # how long it is remembered when the other brokers were heard


@dataclass(frozen=True, slots=True)
class Contact:
    """When a broker was last heard of by who follows it, and whether that says who is connected now."""

    at: datetime | None
    is_current: bool


NEVER_HEARD = Contact(None, is_current=False)


@dataclass(frozen=True, slots=True)
class Contacts:
    """The last contacts of all brokers, by their ids; ``are_current`` if that is so of each one that counts."""

    of_brokers: Mapping[int, Contact]
    are_current: bool

    def of(self, broker_id: int | None) -> Contact:
        """Return the contact of a broker, of one that there is not: none."""
        return NEVER_HEARD if broker_id is None else self.of_brokers.get(broker_id, NEVER_HEARD)

    @property
    def heard(self) -> frozenset[int]:
        """The brokers of which it is known now who is connected to them."""
        return frozenset(broker for broker, contact in self.of_brokers.items() if contact.is_current)

    @property
    def narrowed(self) -> frozenset[int] | None:
        """The brokers to which a list of connections is narrowed; ``None`` if it has those of all."""
        return None if self.are_current else self.heard


@dataclass(frozen=True, slots=True)
class DeviceConnection:
    """Whether a device is connected, ``None`` if that is not known; since when; and when it was last seen, if ever."""

    connected: bool | None
    since: datetime | None
    last_seen: datetime | None


def connection_of(record: PresenceRecord, contacts: Contacts) -> DeviceConnection | None:
    """Return what is known of a device's connection; ``None`` if the device was certainly never seen.

    What counts is the broker at which it was seen last: one that is not heard makes nothing unknown of the others'.
    """
    state, since, contact = record.state, record.since, contacts.of(record.broker_id)
    if state is PresenceState.NEVER_SEEN:
        return None if contacts.are_current else DeviceConnection(None, None, None)
    if state is PresenceState.CONNECTED:
        seen = max(at for at in (since, contact.at, record.left_at) if at is not None)
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
        return Contact(at, follows and _is_recent(at, self._clock(), CONTACT_SECONDS))

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


def _is_recent(at: datetime | None, now: datetime, seconds: float) -> bool:
    return at is not None and abs(now - at) <= timedelta(seconds=seconds)


@dataclass(eq=False)
class KnownContacts:
    """Reads the contacts of all brokers: of the one beside this node from its file, of the others in the database."""

    _database: Database
    _own: ContactFile
    _own_id: int
    _clock: Callable[[], datetime]
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _read_at: float = field(init=False, default=-OTHERS_SECONDS)
    _brokers: tuple[BrokerRecord, ...] = field(init=False, default=())

    def read(self) -> Contacts:
        """Return the contacts; before the rows that they say more about, which are at least as new then."""
        now, found, are_current = self._clock(), dict[int, Contact](), True
        for broker in self._all():
            if broker.id == self._own_id:
                found[broker.id] = self._own.read()
            else:
                seconds = AGENT_SECONDS if broker.kind is BrokerKind.AGENT else CONTACT_SECONDS
                is_recent = _is_recent(broker.presence_at, now, seconds)
                found[broker.id] = Contact(broker.presence_at, broker.presence_known and is_recent)
            are_current &= found[broker.id].is_current or not broker.counts
        return Contacts(found, are_current)

    def _all(self) -> tuple[BrokerRecord, ...]:
        """Return the brokers as they were a second ago at most: what they told since may wait for so long."""
        with self._lock:
            if time.monotonic() - self._read_at >= OTHERS_SECONDS:
                with self._database.snapshot(sees=ALL_TENANTS) as tx:
                    self._brokers = tuple(brokers.list_brokers(tx))
                self._read_at = time.monotonic()
            return self._brokers
