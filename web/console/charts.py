"""Charts as values, which a template draws as SVG: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, GAP = 720, 180, 8
_BASE, _TOP, _LEFT = 24, 22, 0  # room for labels, in the units of the drawing


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar in the units of the drawing; ``text`` is its count as it is shown."""

    label: str
    count: int
    text: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bars side by side in a drawing of ``width`` by ``height``, standing on the line at ``base``."""

    bars: Sequence[Bar]
    width: int
    height: int
    base: int

    @property
    def is_empty(self) -> bool:
        """Whether all counts are zero."""
        return not any(bar.count for bar in self.bars)


def histogram(counts: Sequence[tuple[str, int]], *, limit: int) -> Histogram:
    """Return a histogram of counts with their labels; a count of ``limit`` or more is shown as that with a plus."""
    base = HEIGHT - _BASE
    highest = max((count for _, count in counts), default=0) or 1
    step = (WIDTH - _LEFT + GAP) / max(1, len(counts))
    bars = []
    for number, (label, count) in enumerate(counts):
        height = 0.0 if count <= 0 else max(3.0, round((base - _TOP) * count / highest, 1))
        x = round(_LEFT + number * step, 1)
        bars.append(Bar(label, count, at_most(count, limit), x, round(base - height, 1), round(step - GAP, 1), height))
    return Histogram(bars, WIDTH, HEIGHT, base)


def at_most(count: int, limit: int) -> str:
    """Return a count with separators, with a plus if it was counted no further."""
    return f"{limit:,}+" if count >= limit else f"{count:,}"
