"""Counts what each tenant has taken of a minute, in all processes together, so that none takes what others need.

The counts are in a file of fixed size: in the database each would be a commit of its own.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from core.errors import Unavailable
from core.files import FileLock

MINUTE = 60.0
_SETS, _WAYS = 512, 8
_SLOT = struct.Struct("<16sdQ")  # what is counted, start of its minute, number
_SET_BYTES = _WAYS * _SLOT.size
_FORM = b"rates001"
_TABLE_BYTES = len(_FORM) + _SETS * _SET_BYTES


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

    def __init__(self, path: Path) -> None:
        """Use a file that all processes of a data folder share."""
        self._path = path
        self._lock = FileLock(path)

    def take(self, name: str, wanted: int, limit: int | None, now: float) -> Taken:
        """Take up to ``wanted`` of the ``limit`` a minute that ``name`` has; ``None`` is no limit, and counts nothing.

        ``now`` is in seconds since the epoch. Raises ``Unavailable`` if the file cannot be written.
        """
        if limit is None:
            return Taken(wanted, 0)
        key = hashlib.blake2b(name.encode(), digest_size=16).digest()
        offset = len(_FORM) + int.from_bytes(key[:8]) % _SETS * _SET_BYTES
        try:
            with self._lock.hold(), self._path.open("r+b", buffering=0) as file:
                if self._path.stat().st_size != _TABLE_BYTES or file.read(len(_FORM)) != _FORM:
                    file.seek(0)
                    file.truncate()
                    file.write(_FORM + bytes(_TABLE_BYTES - len(_FORM)))  # in full, so that later writes need no space
                file.seek(offset)
                slots = list(_SLOT.iter_unpack(file.read(_SET_BYTES)))
                way = _way_of(slots, key)
                _, since, count = slots[way]
                if slots[way][0] != key or not since <= now < since + MINUTE:
                    since, count = now, 0
                number = max(0, min(wanted, limit - count))
                file.seek(offset + way * _SLOT.size)
                file.write(_SLOT.pack(key, since, count + number))
        except OSError as error:
            raise Unavailable("What tenants take cannot be counted; check the disk of the data folder.") from error
        return Taken(number, 0 if number == wanted else max(1, math.ceil(since + MINUTE - now)))


def _way_of(slots: list[tuple[bytes, float, int]], key: bytes) -> int:
    for way, (held, *_) in enumerate(slots):
        if held == key:
            return way
    return min(range(_WAYS), key=lambda way: slots[way][1])  # unused slots have the time 0
