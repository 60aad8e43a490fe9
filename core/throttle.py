"""Counts failed logins by address, so that whoever has too many is told to wait."""

from __future__ import annotations

import hashlib
import ipaddress
import math
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from core.errors import Unavailable
from core.files import FileLock

WINDOW_SECONDS = 60.0
RECORDED_OF_AN_ADDRESS = 5  # refusals a minute that are recorded one by one
RECORDED_IN_ALL = 60
MOST_SHOWN = 10

# The table: a head, then sets of slots. An address belongs into one set, which the head's salt decides, so that nobody
# can choose addresses that push each other out; in it the slot that began first is given up for a new address.
SETS, WAYS = 512, 8
_HEAD = struct.Struct("<8s16sdII")  # form of the table, salt, begin of the minute, recorded in it, not recorded
_SLOT = struct.Struct("<16sdIII")  # network, begin of the minute, failures and recorded in it, not recorded
_FORM = b"attempt1"
_TABLE_BYTES = _HEAD.size + SETS * WAYS * _SLOT.size


@dataclass(frozen=True, slots=True)
class Failure:
    """What follows from a failed login: ``wait`` in seconds, 0 where there were not too many; whether to record it."""

    wait: int
    recorded: bool


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """Refusals that were counted only: all of them, with those of the networks that had most."""

    count: int
    networks: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class _Slot:
    network: bytes
    since: float
    failures: int
    recorded: int
    unrecorded: int

    @classmethod
    def of(cls, network: bytes, now: float) -> _Slot:
        return cls(network, now, 0, 0, 0)


class Throttle:
    """A table in a file, which all processes on a data folder share; of fixed size, so that no flood fills anything.

    Only failures touch it. An IPv4 address counts by itself, IPv6 by its /64, which is what one client has. Times are
    seconds since the epoch; where a clock is set back, counts begin anew.
    """

    def __init__(self, path: Path, limit: int) -> None:
        """``limit`` is how many failures an address may have in a minute."""
        self._path = path
        self._limit = limit
        self._lock = FileLock(path)

    def failed(self, address: str, now: float, *, counts: bool = True) -> Failure:
        """Take note of a refusal; without ``counts`` it is none of those after which an address must wait.

        Raises ``Unavailable`` where the table cannot be written.
        """
        network = network_of(address)
        with self._table() as file:
            form, salt, since, recorded_in_all, unrecorded = _HEAD.unpack(file.read(_HEAD.size))
            if _is_over(since, now):
                since, recorded_in_all = now, 0
            offset = _HEAD.size + _set_of(network, salt) * WAYS * _SLOT.size
            file.seek(offset)
            slots = [_Slot(*values) for values in _SLOT.iter_unpack(file.read(WAYS * _SLOT.size))]
            way = _way_of(slots, network)
            slot = slots[way] if slots[way].network == network else _Slot.of(network, now)
            if _is_over(slot.since, now):
                slot.since, slot.failures, slot.recorded = now, 0, 0
            slot.failures = min(slot.failures + counts, 1 << 31)
            recorded = slot.recorded < RECORDED_OF_AN_ADDRESS and recorded_in_all < RECORDED_IN_ALL
            slot.recorded += recorded
            recorded_in_all += recorded
            slot.unrecorded = min(slot.unrecorded + (not recorded), 1 << 31)
            unrecorded = min(unrecorded + (not recorded), 1 << 31)
            file.seek(offset + way * _SLOT.size)
            file.write(_SLOT.pack(slot.network, slot.since, slot.failures, slot.recorded, slot.unrecorded))
            file.seek(0)
            file.write(_HEAD.pack(form, salt, since, recorded_in_all, unrecorded))
        too_many = counts and slot.failures > self._limit
        return Failure(max(1, math.ceil(slot.since + WINDOW_SECONDS - now)) if too_many else 0, recorded)

    def take_unrecorded(self) -> Unrecorded:
        """What was counted but not recorded since the last call."""
        with self._table() as file:
            form, salt, since, recorded, count = _HEAD.unpack(file.read(_HEAD.size))
            if not count:
                return Unrecorded(0, ())
            networks: list[tuple[str, int]] = []
            slots = file.read(SETS * WAYS * _SLOT.size)
            for number, values in enumerate(_SLOT.iter_unpack(slots)):
                slot = _Slot(*values)
                if slot.unrecorded:
                    networks.append((shown(slot.network), slot.unrecorded))
                    file.seek(_HEAD.size + number * _SLOT.size)
                    file.write(_SLOT.pack(slot.network, slot.since, slot.failures, slot.recorded, 0))
            file.seek(0)
            file.write(_HEAD.pack(form, salt, since, recorded, 0))
        most = sorted(networks, key=lambda item: -item[1])[:MOST_SHOWN]
        return Unrecorded(count, tuple(most))

    @contextmanager
    def _table(self) -> Iterator[FileIO]:
        try:
            with self._lock.hold(), self._path.open("r+b", buffering=0) as file:
                if self._path.stat().st_size != _TABLE_BYTES or file.read(len(_FORM)) != _FORM:
                    # Written in full, so that there is room for it later, when the disk may have none.
                    file.seek(0)
                    file.truncate()
                    head = _HEAD.pack(_FORM, secrets.token_bytes(16), 0.0, 0, 0)
                    file.write(head + bytes(_TABLE_BYTES - len(head)))
                file.seek(0)
                yield file
        except OSError as error:
            raise Unavailable("The portal cannot keep count of failed logins; see to the disk of its data.") from error


def network_of(address: str) -> bytes:
    """The 16 bytes that an address counts under; all that is no address counts as one."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return bytes(16)
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return parsed.packed[:8] + bytes(8)
        parsed = parsed.ipv4_mapped
    return bytes(10) + b"\xff\xff" + parsed.packed


def shown(network: bytes) -> str:
    """What ``network_of`` made of an address, as text."""
    parsed = ipaddress.IPv6Address(network)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{parsed}/64"


def _is_over(since: float, now: float) -> bool:
    return not since <= now < since + WINDOW_SECONDS


def _set_of(network: bytes, salt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(network, key=salt, digest_size=8).digest()) % SETS


def _way_of(slots: list[_Slot], network: bytes) -> int:
    for way, slot in enumerate(slots):
        if slot.network == network and slot.since:
            return way
    return min(range(WAYS), key=lambda way: slots[way].since)  # free ones have never begun
