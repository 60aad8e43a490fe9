"""The broker's folder with the guard's journal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from broker.capath import FILE_MODE
from broker.crl import Trust
from broker.folder import CA_FILE, CRL_FILE, BrokerFolder, signature_of
from broker.guard.journal import NewJournal, Position, read_position
from config import Settings
from core.broker_control import JOURNAL_FILE
from core.errors import BrokerUnavailable, ProjectionInvalid


class GuardFiles(BrokerFolder):
    """The broker's folder with the journal, and with CRLs and CAs that the running broker reads by itself."""

    _RECORDED = (CA_FILE, CRL_FILE)

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        super().__init__(settings, clock)
        self.journal = settings.broker_file(JOURNAL_FILE)
        self._ended: tuple[tuple[int, ...], Position | None] = ((), None)  # the journal as it was when last read

    def install(self, generation: int, trust: Trust, stated: Mapping[str, Any]) -> None:
        """Write CRLs, CAs and the record, which says ``stated`` besides."""
        self._write(generation, {CA_FILE: trust.ca, CRL_FILE: trust.crl}, stated)

    def check(self, generation: int, trust: Trust) -> None:
        """Raise ``ProjectionInvalid`` if the broker must not get ``trust``, or has a newer generation already."""
        self._check(generation, trust)
        self._check_order(generation)

    def check_trust(self, generation: int, trust: Trust) -> None:
        """Raise ``ProjectionInvalid`` if the broker must not get ``trust``."""
        self._check(generation, trust)

    def check_follows(self, generation: int) -> None:
        """Raise ``ProjectionInvalid`` if the journal or the record is of a newer generation."""
        self._check_order(generation)

    def installed_generation(self) -> int | None:
        """Return the generation of the record, or of the journal, of which the record may lag behind."""
        recorded, position = super().installed_generation(), self.position()
        return recorded if recorded is None or position is None else max(recorded, position.generation)

    def position(self) -> Position | None:
        """Return where the journal ends, ``None`` if it is missing or damaged."""
        try:
            return self._position()
        except (OSError, ProjectionInvalid):
            return None

    def _position(self) -> Position:
        """Return where the journal ends, which is read again if it has changed."""
        signature, (seen, position) = signature_of(self.journal.stat()), self._ended
        if position is None or signature != seen:
            position = read_position(self.journal)
            self._ended = signature, position
        return position

    def ends_at(self, position: Position) -> None:
        """Take in that the journal ends there, so that it need not be read; who calls has just written it."""
        with contextlib.suppress(OSError):
            status = self.journal.stat()
            if (status.st_ino, status.st_size) == (position.inode, position.size):
                self._ended = signature_of(status), position

    def crl_size(self) -> int:
        """Return the size in bytes of the CRLs for the broker's next start, 0 if there are none."""
        try:
            return self.journal.with_name(CRL_FILE).stat().st_size
        except OSError:
            return 0

    def is_readable(self) -> bool:
        """Return whether the broker may read the journal, by its mode and group."""
        return self._file_problem(JOURNAL_FILE) is None

    def begin(self, epoch: int) -> NewJournal:
        """Begin a journal of a new epoch."""
        try:
            self._make_folder()
        except OSError as error:
            raise BrokerUnavailable(f"{self.journal.parent} cannot be made: {error.strerror}.") from error
        return NewJournal(self.journal, epoch, mode=FILE_MODE, group=self._group)

    def verify(self) -> str | None:
        """Check all of the journal; return what is wrong with it."""
        try:
            read_position(self.journal, whole=True)
        except ProjectionInvalid as error:
            return error.detail
        return None

    def _other_damage(self) -> str | None:
        return self._file_problem(JOURNAL_FILE) or self._journal_problem()

    def _journal_problem(self) -> str | None:
        try:
            position, stated = self._position(), self.stated()
        except OSError as error:
            return f"{self.journal} cannot be read: {error.strerror}."
        except ProjectionInvalid as error:
            return error.detail
        older = position.epoch == stated.get("epoch") and position.seq < stated.get("seq", 0)
        return f"{self.journal} is an older one." if older else None
