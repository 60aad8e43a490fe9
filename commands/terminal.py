"""Prints on a terminal with rich: lines with colours, tables that fit, progress. Only imported where there is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from rich.console import Console, ConsoleDimensions
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

Part = tuple[str, str]  # text that is clean, and its style
RATE_AFTER = 1.0  # seconds; the rate of the first steps says nothing of the others
MIN_COLUMN = 8  # characters that remain of a column that is cut
UNCUT = 12  # characters of a column, such as a date or a status, that is left out rather than cut
MAX_HEAD = 24  # characters of a column that stands in the first line of a record


class Terminal:
    """A terminal of the person at the command line."""

    def __init__(self, file: TextIO) -> None:
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._console = Console(
            file=file,
            force_terminal=True,
            color_system=None if plain else "auto",
            markup=False,
            emoji=False,
            highlight=False,
        )

    @property
    def width(self) -> int:
        """Characters of a line."""
        return self._console.width

    @property
    def shows_motion(self) -> bool:
        """Whether a line can be written again: a progress bar needs that."""
        return self._console.color_system is not None

    def line(self, parts: Sequence[Part], *, whole: bool = True) -> None:
        """Print a line; if it is longer than the terminal is wide, it is broken between words unless ``whole``."""
        self._console.print(Text.assemble(*parts), soft_wrap=whole)

    def table(
        self,
        titles: Sequence[str],
        rows: Sequence[Sequence[Part]],
        spare: Sequence[str],
        whole: Sequence[str],
        *,
        wide: bool,
    ) -> list[str]:
        """Print a table and return the titles of the columns that were left out, as ``Output.table`` says."""
        texts = [[Text(content, style=style) for content, style in row] for row in rows]
        widths = [max(len(title), *(line[i].cell_len for line in texts)) for i, title in enumerate(titles)]
        kept = list(range(len(titles))) if wide else self._fit(titles, widths, spare, whole)
        is_alone = len(kept) == 1 < len([title for title in titles if title not in spare])
        if not wide and (is_alone or sum(widths[i] + 2 for i in kept) > self._console.width + 2):
            return self._records(titles, texts, widths, spare)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i in kept:
            table.add_column(titles[i].upper(), no_wrap=True, overflow="ellipsis", width=widths[i])
        for line in texts:
            table.add_row(*(line[i] for i in kept))
        if wide:
            width = max(self._console.width, sum(widths) + 2 * len(widths))
            self._console.size = ConsoleDimensions(width, self._console.height)
        self._console.print(table)
        return [title for i, title in enumerate(titles) if i not in kept]

    def _records(
        self, titles: Sequence[str], texts: Sequence[Sequence[Text]], widths: Sequence[int], spare: Sequence[str]
    ) -> list[str]:
        """Print a row as a line with its short values, and an indented one for each long value, whole.

        Return the titles of the columns that were left out.
        """
        kept = [i for i, title in enumerate(titles) if title not in spare]
        head = [i for i in kept if i == 0 or widths[i] <= MAX_HEAD]
        while len(head) > 1 and sum(widths[i] + 2 for i in head) > self._console.width + 2:
            head.pop()
        below = [i for i in kept if i not in head]
        label = max((len(titles[i]) for i in below), default=0) + 4
        for line in texts:
            first = Text()
            for i in head:
                first.append_text(line[i]).append(" " * (widths[i] + 2 - line[i].cell_len))
            first.rstrip()
            self._console.print(first, overflow="fold")
            record = Table.grid()
            record.add_column(width=label)
            record.add_column(overflow="fold")
            for i in below:
                record.add_row(Text(f"  {titles[i].upper()}", style="bold"), line[i])
            if below:
                self._console.print(record)
        return [title for i, title in enumerate(titles) if i not in kept]

    def _fit(self, titles: Sequence[str], widths: list[int], spare: Sequence[str], whole: Sequence[str]) -> list[int]:
        """Return which columns fit side by side, and make the ``widths`` of some of them smaller.

        rich would cut off the columns on the right, whatever their minimum width is.
        """
        room = self._console.width + 2  # each column has two spaces behind it, but for the last
        kept = list(range(len(titles)))
        for title in reversed(spare):
            if sum(widths[i] + 2 for i in kept) > room:
                kept.remove(titles.index(title))
        flexible = [i for i in kept if i != 0 and titles[i] not in whole]
        least = [MIN_COLUMN if i in flexible and width > UNCUT else width for i, width in enumerate(widths)]
        while flexible and sum(least[i] + 2 for i in kept) > room:
            kept.remove(flexible.pop())
        while flexible and sum(widths[i] + 2 for i in kept) > room:
            widest = max((i for i in flexible if widths[i] > least[i]), key=lambda i: widths[i])
            widths[widest] -= 1
        return kept

    @contextlib.contextmanager
    def progress(self, words: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar with rate and time left; yields a function to be called after each step."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(words, total=total)
            yield lambda: bar.advance(task)

    def working(self, words: str) -> contextlib.AbstractContextManager[object]:
        """Return a context in which a spinner is shown."""
        return self._console.status(Text(words))


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        """Return the rate, once it says something."""
        known = task.speed and (task.elapsed or 0) >= RATE_AFTER
        return Text(f"{task.speed:,.0f}/s" if known else "")
