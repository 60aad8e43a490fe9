"""Splits an upload into rows, NDJSON or CSV, as it arrives."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from core.errors import FieldProblem, InputInvalid, PortalError, RowMalformed, RowTooLong

MAX_ROW_BYTES = 128 * 1024  # the longest valid row is shorter

_BOM = b"\xef\xbb\xbf"
_QUOTE_OR_NEWLINE = re.compile(rb'["\n]')
_TOO_LONG = f"The row is longer than {MAX_ROW_BYTES} bytes."


@dataclass(frozen=True, slots=True)
class Row:
    """A row of an upload, numbered from 1: a line of NDJSON as it came, the cells of CSV by column, or a problem."""

    number: int
    content: bytes | Mapping[str, str] = field(default=b"", repr=False)
    problem: PortalError | None = None


class Rows:
    """A format of rows: a row ends with a line feed, and white space alone is not a row."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._begun = False
        self._searched = 0  # bytes of the buffer in which no row ends
        self._skipping = False  # whether the rest of a row that is too long is still to come
        self._rows: list[Row] = []
        self._number = 0

    def feed(self, data: bytes) -> list[Row]:
        """Return the rows that ``data`` completes; a malformed one has a ``problem``."""
        buffer = self._buffer
        buffer += data
        if not self._begun:
            if len(buffer) < len(_BOM) and _BOM.startswith(buffer):
                return []
            self._begin()
        start = 0
        while (end := self._find_end()) >= 0:
            if self._skipping:
                self._skipping = False
            elif end - start > MAX_ROW_BYTES:
                self._add_problem(RowTooLong(_TOO_LONG))
            else:
                self._take(bytes(buffer[start:end]))
            start = self._searched = end + 1
        del buffer[:start]
        self._move(start)
        if self._skipping or len(buffer) > MAX_ROW_BYTES:
            if not self._skipping:
                self._add_problem(RowTooLong(_TOO_LONG))
            self._skip()
        return self._taken()

    def end(self) -> list[Row]:
        """Return the last row, if no line feed ended it."""
        if not self._begun:
            self._begin()
        if not self._skipping:
            self._take(bytes(self._buffer))
        self._buffer.clear()
        self._searched = 0
        return self._taken()

    def _begin(self) -> None:
        self._begun = True
        if self._buffer.startswith(_BOM):
            del self._buffer[: len(_BOM)]

    def _find_end(self) -> int:
        """Return where the next line feed is that ends a row, or -1; then ``_searched`` is the end of the buffer."""
        end = self._buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._buffer)
        return end

    def _move(self, count: int) -> None:
        """Note that ``count`` bytes were removed from the front of the buffer."""
        self._searched -= count

    def _skip(self) -> None:
        """Discard the beginning of a row that is too long; the row ends with the next line feed."""
        self._skipping = True
        self._buffer.clear()
        self._searched = 0

    def _take(self, record: bytes) -> None:
        raise NotImplementedError

    def _add(self, content: bytes | Mapping[str, str]) -> None:
        self._number += 1
        self._rows.append(Row(self._number, content))

    def _add_problem(self, problem: PortalError) -> None:
        self._number += 1
        self._rows.append(Row(self._number, problem=problem))

    def _taken(self) -> list[Row]:
        rows, self._rows = self._rows, []
        return rows


class NdjsonRows(Rows):
    """NDJSON: one JSON value a line, in UTF-8; the values are parsed elsewhere."""

    def _take(self, record: bytes) -> None:
        record = record.strip(b" \t\r")
        if record:
            self._add(record)


class CsvRows(Rows):
    """CSV as of RFC 4180, in UTF-8, with a first row that names the columns; line feeds alone may end rows.

    ``feed`` raises ``InputInvalid`` for a first row that names no columns. A cell that is empty is left out, and
    so is a row of such cells, and such cells after the last column. The names of columns may be in any case. A quote
    that is never closed swallows the rows after it, up to the next quote or to ``MAX_ROW_BYTES``.
    """

    def __init__(self, columns: frozenset[str], required: frozenset[str]) -> None:
        """``columns`` are the allowed ones, ``required`` the ones that must be present."""
        super().__init__()
        self._columns = columns
        self._required = required
        self._header: list[str] | None = None
        self._quoted = False
        self._closed = -1  # where the last quoted part ended: a quote that follows at once is a quote in it

    @property
    def has_header(self) -> bool:
        """Return whether the first row has arrived."""
        return self._header is not None

    def _find_end(self) -> int:
        if self._skipping:
            return super()._find_end()
        buffer = self._buffer
        for found in _QUOTE_OR_NEWLINE.finditer(buffer, self._searched):
            at = found.start()
            if buffer[at] == 10:
                if not self._quoted:
                    return at
            elif self._quoted:
                self._quoted, self._closed = False, at
            else:
                before = buffer[at - 1] if at else 10
                self._quoted = before in b",\n" or self._closed == at - 1 >= 0
        self._searched = len(buffer)
        return -1

    def _move(self, count: int) -> None:
        super()._move(count)
        self._closed -= count

    def _skip(self) -> None:
        super()._skip()
        self._quoted, self._closed = False, -1

    def _take(self, record: bytes) -> None:
        try:
            text = record.decode()
        except UnicodeDecodeError:
            return self._refuse("The row is not UTF-8.")
        try:
            cells = next(csv.reader([text.removesuffix("\r")], strict=True), [])
        except csv.Error as error:
            why = "carriage returns alone end no rows" if "\r" in text.removesuffix("\r") else error
            return self._refuse(f"The row is not CSV as of RFC 4180: {why}.")
        if not any(cells):
            return None  # spreadsheets write rows of nothing but commas
        if self._header is None:
            return self._read_header(cells)
        if not any(cells[len(self._header) :]):
            cells = cells[: len(self._header)]
        if len(cells) != len(self._header):
            return self._refuse(
                f"The row has {len(cells)} cells where the first row names {len(self._header)} columns."
            )
        return self._add({name: cell for name, cell in zip(self._header, cells, strict=True) if cell})

    def _refuse(self, sentence: str) -> None:
        if self._header is None:
            raise _bad_header(sentence.removesuffix("."))
        self._add_problem(RowMalformed(sentence))

    def _read_header(self, cells: list[str]) -> None:
        names = [cell.strip() for cell in cells]
        names = [name.lower() if name.lower() in self._columns else name for name in names]
        while not names[-1]:
            names.pop()
        unknown = [name for name in names if name not in self._columns]
        missing = sorted(self._required - set(names))
        if unknown:
            shown = unknown[0] if unknown[0].isprintable() else ascii(unknown[0])
            raise _bad_header(f"{shown[:64]!r} is not a column; there may be {', '.join(sorted(self._columns))}")
        if missing:
            raise _bad_header(f"The column {missing[0]} is missing")
        if len(set(names)) != len(names):
            raise _bad_header("A column is named twice")
        self._header = names


def _bad_header(why: str) -> InputInvalid:
    return InputInvalid(
        f"The first row must name the columns. {why}.", [FieldProblem("columns", f"{why[:1].lower()}{why[1:]}")]
    )
