"""Pages of fixed size that all processes share, for counts which as rows would each cost a durable commit.

They are in a file of the data folder; ``store.pages`` has the same for several nodes.

    with pages.open(7, clock()) as table:
        table.write(7, changed(table.read(7), table.now))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

from core.files import FileLock


@dataclass(frozen=True, slots=True)
class Layout:
    """The pages of a table: page 0 has ``head_bytes`` and begins with ``form``, each of the ``pages`` ``page_bytes``.

    A page that was never written is of zero bytes, but for the ``form``.
    """

    form: bytes
    head_bytes: int
    page_bytes: int
    pages: int

    def empty(self, number: int) -> bytes:
        """Return a page that was never written."""
        return bytes(self.page_bytes) if number else self.form.ljust(self.head_bytes, b"\0")


class OpenPages(Protocol):
    """Pages that nobody else changes meanwhile."""

    @property
    def now(self) -> float:
        """The time, in seconds since the epoch, that all who use the pages agree on."""

    def read(self, number: int) -> bytes:
        """Return a page."""

    def write(self, number: int, content: bytes) -> None:
        """Replace a page."""


class Pages(Protocol):
    """Where the pages of a layout are."""

    def open(self, number: int, now: float) -> AbstractContextManager[OpenPages]:
        """Open the pages to read and write page ``number``, and with 0 any; ``now`` by the clock of this machine.

        Raises ``OSError`` or ``PortalError`` if they cannot be written.
        """


@dataclass(frozen=True, slots=True)
class _OpenFile:
    file: FileIO
    layout: Layout
    now: float

    def read(self, number: int) -> bytes:
        self._seek(number)
        return self.file.read(self.layout.page_bytes if number else self.layout.head_bytes)

    def write(self, number: int, content: bytes) -> None:
        self._seek(number)
        self.file.write(content)

    def _seek(self, number: int) -> None:
        self.file.seek(self.layout.head_bytes + (number - 1) * self.layout.page_bytes if number else 0)


class PageFile:
    """Pages in a file of a fixed size, so that no flood fills the disk."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Use a file that all processes of a data folder share; one of another form is begun again."""
        self._path = path
        self._layout = layout
        self._lock = FileLock(path)

    @contextmanager
    def open(self, number: int, now: float) -> Iterator[OpenPages]:
        """Open the pages under a lock on the file; see ``Pages.open``."""
        layout = self._layout
        size = layout.head_bytes + layout.pages * layout.page_bytes
        with self._lock.hold(), self._path.open("r+b", buffering=0) as file:
            if self._path.stat().st_size != size or file.read(len(layout.form)) != layout.form:
                # Written in full, so that later writes succeed on a full disk.
                file.seek(0)
                file.truncate()
                file.write(layout.empty(0).ljust(size, b"\0"))
            yield _OpenFile(file, layout, now)
