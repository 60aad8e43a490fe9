"""How times and spans of time are written at the command line: ``2027-01-31``, ``2027-01-31T12:00:00Z``, ``90d``."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import click

UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_SPAN = re.compile("([0-9]{1,6})([mhdw])")


def span_of(text: str) -> timedelta | None:
    """Return the span of time that a text such as ``90d``, ``12h``, ``30m`` or ``2w`` says, ``None`` if it is none."""
    match = _SPAN.fullmatch(text)
    return None if match is None else int(match[1]) * UNITS[match[2]]


class Time(click.ParamType[str]):
    """A date, an RFC 3339 time, or a span of time from now on such as ``30d``; with ``past`` until now."""

    name = "time"

    def __init__(self, *, past: bool = False) -> None:
        self._past = past

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the time as RFC 3339 in UTC."""
        span = span_of(value)
        try:
            if span is not None:
                at = datetime.now(UTC) + (-span if self._past else span)
            else:
                at = datetime.fromisoformat(value)
            at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
        except (ValueError, OverflowError):
            ago = "ago" if self._past else "from now"
            self.fail(f"use a date (2027-01-31), a time (2027-01-31T12:00:00Z), or 30d or 12h {ago}.", param, ctx)
        return f"{at:%Y-%m-%dT%H:%M:%SZ}"


class Span(click.ParamType[int]):
    """A span of time, such as ``90d`` or ``12h``, as a whole number of ``unit`` (``h`` or ``d``).

    A number alone is one of these, too, as the options once were.
    """

    name = "duration"

    def __init__(self, unit: str, most: int, *, least: int = 1) -> None:
        self._unit = unit
        self._limits = least, most

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of units."""
        text = str(value)
        span = span_of(text + self._unit if text.isascii() and text.isdigit() else text)
        least, most = self._limits
        if span is None:
            self.fail("use a number with m, h, d or w, such as 90d or 12h.", param, ctx)
        number, rest = divmod(span, UNITS[self._unit])
        if rest or not least <= number <= most:
            unit = {"h": "hours", "d": "days"}[self._unit]
            self.fail(f"use whole {unit}, from {least}{self._unit} to {most}{self._unit}.", param, ctx)
        return number


VALIDITY = click.option(
    "--validity", "--days", "validity_days", type=Span("d", 36500), metavar="DURATION", help="Validity, such as 90d."
)
OVERLAP = click.option(
    "--overlap",
    "--overlap-hours",
    "overlap_hours",
    type=Span("h", 8760, least=0),
    metavar="DURATION",
    help="How long the old certificate stays valid, such as 12h; 0 for not at all.",
)
