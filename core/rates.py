"""Counts what each tenant has taken of a minute, in all processes together, so that none takes what others need.

The counts are in pages of fixed size: as rows each would be a durable commit of its own.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

from core.errors import Unavailable
from core.pages import Layout, Pages

MINUTE = 60.0
_SETS, _WAYS = 512, 8
_SLOT = struct.Struct("<16sdQ")  # what is counted, start of its minute, number
_FORM = b"rates001"
LAYOUT = Layout(_FORM, len(_FORM), _WAYS * _SLOT.size, _SETS)


@dataclass(frozen=True, slots=True)
class Taken:
    """How many were taken, at most as many as wanted; ``wait``: seconds until there are more."""

    number: int
    wait: int


class Rates:
    """The counts; a minute begins with the first thing that is taken in it.

    If the clock is set back, counts restart. Of several thousand names at once those whose minute began first may be
    forgotten, which lets them take more.
    """

    def __init__(self, pages: Pages) -> None:
        """Use pages of the form ``LAYOUT`` that all processes of all nodes share."""
        self._pages = pages

    def take(self, name: str, wanted: int, limit: int | None, now: float) -> Taken:
        """Take up to ``wanted`` of the ``limit`` a minute that ``name`` has; ``None`` is no limit, and counts nothing.

        ``now`` is in seconds since the epoch. Raises ``Unavailable`` if the pages cannot be written.
        """
        if limit is None:
            return Taken(wanted, 0)
        key = hashlib.blake2b(name.encode(), digest_size=16).digest()
        page = 1 + int.from_bytes(key[:8]) % _SETS
        try:
            with self._pages.open(page, now) as table:
                now, content = table.now, table.read(page)
                slots = list(_SLOT.iter_unpack(content))
                way = _way_of(slots, key)
                _, since, count = slots[way]
                if slots[way][0] != key or not since <= now < since + MINUTE:
                    since, count = now, 0
                number = max(0, min(wanted, limit - count))
                start = way * _SLOT.size
                packed = _SLOT.pack(key, since, count + number)
                table.write(page, content[:start] + packed + content[start + _SLOT.size :])
        except OSError as error:
            raise Unavailable("What tenants take cannot be counted; check the disk of the data folder.") from error
        return Taken(number, 0 if number == wanted else max(1, math.ceil(since + MINUTE - now)))


def _way_of(slots: list[tuple[bytes, float, int]], key: bytes) -> int:
    for way, (held, *_) in enumerate(slots):
        if held == key:
            return way
    return min(range(_WAYS), key=lambda way: slots[way][1])  # unused slots have the time 0
