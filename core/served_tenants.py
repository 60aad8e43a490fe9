"""What the workers of a portal tell each other: whose requests they serve, and whose are to be worked on first."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import struct
from collections.abc import Iterator

# Process, place; two tenants, when each was served; one goes first, until when; one works beside another, until when.
_SEAT = struct.Struct("<Q8s8sd8sd8sdd")
_SEATS = 256
_PROCESS = struct.Struct("<Q8s")
_SERVED = struct.Struct("<8sd8sd")
_FIRST = struct.Struct("<8sd")
_BESIDE = struct.Struct("<d")
_NOBODY = bytes(8)


class ServedTenants:
    """Memory that a process shares with those that are forked from it; each writes in a place of its own.

    Times are those of the monotonic clock, which is one for all processes.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SEATS * _SEAT.size)

    def place(self) -> ServedPlace:
        """Return a place for one process, which takes it when it first writes."""
        return ServedPlace(self._memory)


class ServedPlace:
    """What one process tells, and all that the processes tell."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._mark = os.urandom(8)
        self._offset: int | None = None

    def serves(self, one: tuple[str, float], other: tuple[str, float]) -> None:
        """Tell the two tenants that this process has served last, and when; an empty name is none."""
        if (offset := self._taken()) is not None:
            _SERVED.pack_into(self._memory, offset + _PROCESS.size, _key(one[0]), one[1], _key(other[0]), other[1])

    def puts_first(self, tenant_id: str, until: float) -> None:
        """Tell that requests of other tenants should begin after those of this one, until then at the most."""
        if (offset := self._taken()) is not None:
            _FIRST.pack_into(self._memory, offset + _PROCESS.size + _SERVED.size, _key(tenant_id), until)

    def works_beside(self, until: float) -> None:
        """Tell that a request is worked on though those of another tenant go first, until then at the most."""
        if (offset := self._taken()) is not None:
            _BESIDE.pack_into(self._memory, offset + _PROCESS.size + _SERVED.size + _FIRST.size, until)

    def work_beside(self, now: float) -> bool:
        """Return whether any process works on such a request."""
        return any(until > now for *_, until in self._all())

    def serve_others(self, tenant_id: str, since: float) -> bool:
        """Return whether any process has served another tenant since then."""
        own = _key(tenant_id)
        return any(
            (at >= since and one not in (own, _NOBODY)) or (then >= since and other not in (own, _NOBODY))
            for _, _, one, at, other, then, *_ in self._all()
        )

    def put_another_first(self, tenant_id: str, now: float) -> bool:
        """Return whether any process has put another tenant first."""
        own = _key(tenant_id)
        return any(until > now and first not in (own, _NOBODY) for *_, first, until, _ in self._all())

    def _all(self) -> Iterator[tuple[int, bytes, bytes, float, bytes, float, bytes, float, float]]:
        for offset in range(0, len(self._memory), _SEAT.size):
            told = _SEAT.unpack_from(self._memory, offset)
            if not told[0]:  # places are taken in order
                return
            yield told

    def _taken(self) -> int | None:
        """Return where this process writes; ``None`` if there are too many processes.

        Two that begin together may take one place. One of them finds the other's mark in it then, and takes another.
        """
        own = os.getpid(), self._mark
        if self._offset is None or _PROCESS.unpack_from(self._memory, self._offset) != own:
            self._offset = self._free()
            if self._offset is not None:
                self._memory[self._offset : self._offset + _SEAT.size] = _SEAT.pack(
                    *own, _NOBODY, 0.0, _NOBODY, 0.0, _NOBODY, 0.0, 0.0
                )
        return self._offset

    def _free(self) -> int | None:
        for offset in range(0, len(self._memory), _SEAT.size):
            if not _is_there(_PROCESS.unpack_from(self._memory, offset)[0]):
                return offset
        return None


def _is_there(process: int) -> bool:
    if not process:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@functools.lru_cache(maxsize=4096)
def _key(tenant_id: str) -> bytes:
    return hashlib.blake2b(tenant_id.encode(), digest_size=8).digest() if tenant_id else _NOBODY
