"""Whose sessions were ended already, so that a pass for many goes on where the one before had no more time."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from broker.guard.journal import read_position
from core.errors import ProjectionInvalid


class EndedSessions:
    """Clients whose sessions were seen to be ended after a change, until the journal says something of them again."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._identities: set[str] = set()
        self._read: tuple[int, int] = (0, 0)  # inode and epoch of the journal
        self._end = 0  # how much of it was read
        self._lock = threading.Lock()

    def left(self, identities: Iterable[str]) -> list[str]:
        """Return those of the clients whose sessions are still to be ended, and forget all others."""
        self._follow()
        wanted = [*identities]
        self._identities.intersection_update(wanted)
        return [identity for identity in wanted if identity not in self._identities]

    def add(self, identity: str) -> None:
        """Take in that a client's sessions are ended, which it was told of before ``left`` was called."""
        with self._lock:
            self._identities.add(identity)

    def _follow(self) -> None:
        try:
            position = read_position(self._journal)
            if self._read != (position.inode, position.epoch) or position.size < self._end:
                self._identities.clear()
            elif self._identities:
                with self._journal.open("rb") as file:
                    file.seek(self._end)
                    while file.tell() < position.size and (line := file.readline()):
                        self._identities.difference_update(line.decode("ascii", "replace").split())
        except (OSError, ProjectionInvalid):
            self._identities.clear()
            self._read = (0, 0)
        else:
            self._read, self._end = (position.inode, position.epoch), position.size
