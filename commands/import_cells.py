"""The text of an import's file, and the cells of CSV as spreadsheets write it."""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from commands.errors import Misused
from commands.files import reason

ENCODINGS = ("utf-8", "utf-16", "cp1252")
DELIMITERS = ",;\t"
SEP_LINE = re.compile(r'"?sep=(.)"?[;,\t]*[\r\n]*', re.IGNORECASE)  # how Excel is told the delimiter
WORKBOOK = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx and .ods, .xls


@contextlib.contextmanager
def open_text(path: Path, encoding: str | None) -> Iterator[TextIO]:
    """Open a file as UTF-8, as UTF-16 where it begins with its byte order mark, or else in the encoding given.

    Raises ``Misused`` for a workbook, and within the block where the text has another encoding.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(4)
        if begin.startswith(WORKBOOK):
            raise Misused(
                f"{path} is a workbook, not text.", hints=["Save the sheet as CSV UTF-8 in the spreadsheet program."]
            )
        if encoding is None:
            encoding = "utf-16" if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
        with path.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="") as text:
            yield text
    except UnicodeError:
        where = f" from line {_first_bad_line(path)} on" if encoding == "utf-8" else ""
        raise Misused(
            f"{path} is not {str(encoding).upper()} text{where}.",
            hints=["Save it as CSV UTF-8, or add --encoding cp1252 if a spreadsheet of Windows wrote it."],
        ) from None
    except OSError as error:
        raise Misused(f"{path} cannot be read: {reason(error)}.") from None


def _first_bad_line(path: Path) -> int:
    with path.open("rb") as file:
        return next((number for number, line in enumerate(file, 1) if not _is_utf8(line)), 1)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_cells(lines: Iterator[str], required: Collection[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with the line on which it begins, first the names of the columns; leave out empty ones.

    The delimiter is what a line ``sep=`` says, or else the one that gives the first row all ``required`` names, in any
    case. Empty cells after the last column are cut. Raises ``Misused`` where the file is not CSV (RFC 4180).
    """
    skipped, delimiter, first = 0, None, ""
    for first in lines:
        said = SEP_LINE.fullmatch(first)
        if said and delimiter is None:
            delimiter = said[1]
        elif first.strip():
            break
        skipped += 1
    if delimiter is not None and delimiter not in DELIMITERS:
        raise Misused(f"The line sep= names {delimiter!r}; cells may be separated by commas, semicolons or tabs.")
    delimiter = delimiter or _delimiter_of(first, required)
    reader = csv.reader(itertools.chain([first], lines), strict=True, delimiter=delimiter)
    line, width = skipped + 1, 0
    try:
        for cells in reader:
            began, line = line, skipped + reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            width = width or _width(cells)
            yield began, (cells[:width] if not any(cells[width:]) else cells)
    except csv.Error as error:
        raise Misused(f"The file is not valid CSV (RFC 4180) from line {line} on: {error}.") from None


def _delimiter_of(first: str, required: Collection[str]) -> str:
    for delimiter in DELIMITERS:
        with contextlib.suppress(csv.Error):
            names = next(csv.reader([first], delimiter=delimiter), [])
            if set(required) <= {name.strip().casefold() for name in names}:
                return delimiter
    return DELIMITERS[0]


def _width(cells: Sequence[str]) -> int:
    """Return the number of columns up to the last one that has a name."""
    return max(number for number, cell in enumerate(cells, 1) if cell.strip())
