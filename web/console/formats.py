"""How templates write values: filters of Jinja, pure functions of the value and, for what is relative, of the time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

# How a cell begins that is a formula, also behind what is left out before it, as older versions stored it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
# A unit counts from nearly one of it on, so that no smaller one is rounded up to it.
_UNITS = (("year", 365 * 86400), ("month", 30 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60))
_NEARLY = 0.97
_BROWSERS = (("Edg/", "Edge"), ("OPR/", "Opera"), ("Firefox/", "Firefox"), ("Chrome/", "Chrome"), ("Safari/", "Safari"))
_SYSTEMS = (
    ("iPhone", "iPhone"), ("iPad", "iPad"), ("Android", "Android"), ("Windows", "Windows"), ("Mac OS X", "macOS"),
    ("CrOS", "ChromeOS"), ("Linux", "Linux"),
)  # fmt: skip


def rfc_3339(value: datetime) -> str:
    """Return a time for the attribute ``datetime`` of an HTML time, in UTC and to the second."""
    return value.strftime("%Y-%m-%dT%H:%M:%SZ")


def utc(value: datetime) -> str:
    """Return a time in UTC, to the minute, as a page shows it until the browser writes it in the reader's zone."""
    return value.strftime("%Y-%m-%d %H:%M UTC")


def relative(value: datetime, now: datetime) -> str:
    """Return how long ago or ahead a time is, in its largest unit: ``3 hours ago``, ``in 2 days``, ``just now``."""
    seconds = (value - now) / timedelta(seconds=1)
    for unit, length in _UNITS:
        if abs(seconds) >= length * _NEARLY:
            count = round(abs(seconds) / length)
            amount = f"{count:,} {unit}{'' if count == 1 else 's'}"
            return f"in {amount}" if seconds > 0 else f"{amount} ago"
    return "in less than a minute" if seconds > 0 else "just now"


def duration(seconds: float) -> str:
    """Return a span of time to three digits: ``4.2 ms``, ``1.24 s``, or in whole minutes, hours or days."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms" if seconds * 1000 < 99.5 else f"{seconds * 1000:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    for unit, length in (("min", 60), ("h", 3600), ("d", 86400)):
        if seconds < length * 100 or unit == "d":
            return f"{round(seconds / length)} {unit}"
    raise AssertionError("days have no end")


def browser(user_agent: str) -> str:
    """Return browser and system of a user agent in a few words, as ``Firefox on Linux``, as far as it says them."""
    of = next((name for mark, name in _BROWSERS if mark in user_agent), "")
    on = next((name for mark, name in _SYSTEMS if mark in user_agent), "")
    if of and on:
        return f"{of} on {on}"
    return of or on or "Unknown browser"


def words(code: str) -> str:
    """Return a code such as ``key_compromise`` as words: ``key compromise``."""
    return code.replace("_", " ").replace(":", ": ")


def value_text(value: Any) -> str:
    """Return a value of a device's metadata as text: a string as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def csv_line(cells: Iterable[str]) -> bytes:
    """Return a line of CSV, in which no cell is one that a spreadsheet takes for a formula."""
    line = io.StringIO()
    csv.writer(line).writerow([f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in cells])
    return line.getvalue().encode()


FILTERS: Mapping[str, Callable[..., str]] = {
    "rfc_3339": rfc_3339,
    "utc": utc,
    "relative": relative,
    "duration": duration,
    "browser": browser,
    "words": words,
    "value_text": value_text,
}
