"""Counts failed logins by address, so that a client with too many of them has to wait.

The counts are in pages of fixed size and not in rows of their own, where each failed login would be a durable commit:
``docs/dependencies.md`` has the measurement.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from core.errors import Unavailable
from core.pages import Layout, OpenPages, Pages

WINDOW_SECONDS = 60.0
RECORDED_OF_AN_ADDRESS = 5  # refusals a minute that are recorded one by one
RECORDED_IN_ALL = 60
MAX_NETWORKS_SHOWN = 10

# Page 0 is a header, each of the others a set of slots. A keyed hash maps a network to one set, in which a new network
# replaces the one whose minute began first. The key is a random salt in the header: an attacker who knew it could
# choose addresses that replace the entry of the address from which passwords are guessed.
SETS, WAYS = 512, 8
_HEAD = struct.Struct("<8s16sdII")  # format, salt, start of the minute, refusals recorded in it, not recorded
_SLOT = struct.Struct("<16sdIII")  # network, start of the minute, failures and recorded in it, not recorded
LAYOUT = Layout(b"attempt1", _HEAD.size, WAYS * _SLOT.size, SETS)


@dataclass(frozen=True, slots=True)
class FailedLogin:
    """The consequence of a failed login: ``wait`` in seconds, 0 if allowed; ``recorded`` if the audit gets an entry."""

    wait: int
    recorded: bool


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """Refusals without an audit entry: their number, and the networks with the most of them."""

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
    """Counts in pages of the form ``LAYOUT`` that all processes of all nodes share.

    Only failures read or write it, so a valid token never waits. An IPv4 address counts by itself, an IPv6 address by
    its /64, which is what one client has. Times are seconds since the epoch; if the clock is set back, counts restart.
    """

    def __init__(self, pages: Pages, limit: int) -> None:
        """Allow each address ``limit`` failures a minute."""
        self._pages = pages
        self._limit = limit

    def failed(self, address: str, now: float, *, counts: bool = True) -> FailedLogin:
        """Record a refusal; without ``counts`` it does not bring the address nearer to its limit.

        Raises ``Unavailable`` if the pages cannot be written.
        """
        network = network_of(address)
        with self._table(now) as table:
            now = table.now
            form, salt, since, recorded_in_all, unrecorded = _head_of(table)
            if _has_expired(since, now):
                since, recorded_in_all = now, 0
            page = 1 + _set_of(network, salt)
            content = table.read(page)
            slots = [_Slot(*values) for values in _SLOT.iter_unpack(content)]
            way = _way_of(slots, network)
            slot = slots[way] if slots[way].network == network else _Slot.of(network, now)
            if _has_expired(slot.since, now):
                slot.since, slot.failures, slot.recorded = now, 0, 0
            slot.failures = min(slot.failures + counts, 1 << 31)
            recorded = slot.recorded < RECORDED_OF_AN_ADDRESS and recorded_in_all < RECORDED_IN_ALL
            slot.recorded += recorded
            recorded_in_all += recorded
            slot.unrecorded = min(slot.unrecorded + (not recorded), 1 << 31)
            unrecorded = min(unrecorded + (not recorded), 1 << 31)
            table.write(page, _with_slot(content, way, slot))
            table.write(0, _HEAD.pack(form, salt, since, recorded_in_all, unrecorded))
        too_many = counts and slot.failures > self._limit
        return FailedLogin(max(1, math.ceil(slot.since + WINDOW_SECONDS - now)) if too_many else 0, recorded)

    def take_unrecorded(self) -> Unrecorded:
        """Return the refusals since the last call that have no audit entry."""
        with self._table(0.0) as table:
            form, salt, since, recorded, count = _head_of(table)
            if not count:
                return Unrecorded(0, ())
            networks: list[tuple[str, int]] = []
            for page in range(1, SETS + 1):
                content = before = table.read(page)
                for way, values in enumerate(_SLOT.iter_unpack(before)):
                    slot = _Slot(*values)
                    if slot.unrecorded:
                        networks.append((shown(slot.network), slot.unrecorded))
                        slot.unrecorded = 0
                        content = _with_slot(content, way, slot)
                if content != before:
                    table.write(page, content)
            table.write(0, _HEAD.pack(form, salt, since, recorded, 0))
        most = sorted(networks, key=lambda item: -item[1])[:MAX_NETWORKS_SHOWN]
        return Unrecorded(count, tuple(most))

    @contextmanager
    def _table(self, now: float) -> Iterator[OpenPages]:
        try:
            with self._pages.open(0, now) as table:
                yield table
        except OSError as error:
            raise Unavailable("Failed logins cannot be counted; check the disk of the data folder.") from error


def _head_of(table: OpenPages) -> tuple[bytes, bytes, float, int, int]:
    """Return form, salt, start of the minute, and the refusals recorded in it and not recorded; the salt once made."""
    form, salt, since, recorded, unrecorded = _HEAD.unpack(table.read(0))
    return form, salt if any(salt) else secrets.token_bytes(16), since, recorded, unrecorded


def _with_slot(page: bytes, way: int, slot: _Slot) -> bytes:
    packed = _SLOT.pack(slot.network, slot.since, slot.failures, slot.recorded, slot.unrecorded)
    start = way * _SLOT.size
    return page[:start] + packed + page[start + _SLOT.size :]


def network_of(address: str) -> bytes:
    """Return the 16 bytes that an address is counted under; text that is not an address counts as one network."""
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
    """Return a network from ``network_of`` as text."""
    parsed = ipaddress.IPv6Address(network)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{parsed}/64"


def _has_expired(since: float, now: float) -> bool:
    return not since <= now < since + WINDOW_SECONDS


def _set_of(network: bytes, salt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(network, key=salt, digest_size=8).digest()) % SETS


def _way_of(slots: list[_Slot], network: bytes) -> int:
    for way, slot in enumerate(slots):
        if slot.network == network and slot.since:
            return way
    return min(range(WAYS), key=lambda way: slots[way].since)  # unused slots have the time 0
