"""Prints results, messages and progress: coloured and aligned for people, plain or JSON for programs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

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

from commands.errors import CliError, Refused

# The name of a field, which is shown as text, or a function of the row.
Column = str | Callable[[Mapping[str, Any]], "Cell"]

# Control and format characters (terminal sequences, newlines, bidirectional overrides), lone surrogates, separators.
_UNSAFE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"))
_STATUS_STYLES = {
    "active": "green",
    "enforced": "green",
    "done": "green",
    "pending": "yellow",
    "suspended": "yellow",
    "held": "yellow",
    "replaced": "dim",
    "closed": "red",
    "revoked": "red",
    "refused": "red",
}
_ABBREVIATIONS = ("ca", "crl", "dns", "est", "ip", "url")
EXPIRES_SOON_DAYS = 30
_SUGGESTED = re.compile(r"(?:^|(?<=: ))portal (?=[a-z-])")  # the program's name, where a command is suggested
MAX_WHOLE = 36  # characters of the first column, an id for example, up to which it is not cut
MIN_COLUMN = 8  # characters that remain of a column that is cut
PROGRESS_SECONDS = 10.0  # between two lines of progress if standard error is not a terminal


def clean(value: object) -> str:
    """Return text that is safe to print on a terminal, with control characters as escapes such as ``\\x1b``."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode() if unicodedata.category(char) in _UNSAFE else char
        for char in text
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """A value for programs (``plain``) and for people (``shown``); both are cleaned when they are printed."""

    plain: str
    shown: str = ""
    style: str = ""


def text(value: object) -> Cell:
    """Return a cell for any value of an answer; ``None`` is empty for programs, ``-`` for people."""
    if value is None or value == "":
        return Cell("", "-", "dim")
    if isinstance(value, str | int | float):
        return Cell(str(value))
    return Cell(json.dumps(value, ensure_ascii=False, sort_keys=True))


def state(value: object) -> Cell:
    """Return a cell for a status, in its colour."""
    return Cell(str(value or ""), style=_STATUS_STYLES.get(str(value), ""))


def moment(value: object, *, expiry: bool = False, short: bool = False) -> Cell:
    """Return a cell for a time (RFC 3339): as it is for programs, date and distance (``short``: date) for people.

    An ``expiry`` is coloured if it is near or past.
    """
    try:
        at = datetime.fromisoformat(str(value))
    except ValueError:
        return text(value)
    at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
    seconds = (at - datetime.now(UTC)).total_seconds()
    style = ""
    if expiry and seconds < EXPIRES_SOON_DAYS * 86400:
        style = "yellow" if seconds > 0 else "red"
    shown = f"{at:%Y-%m-%d}" if short else f"{at:%Y-%m-%d %H:%M:%S} UTC ({_distance(seconds)})"
    return Cell(str(value), shown, style)


def ago(value: object) -> Cell:
    """Return a cell for a time that has passed (RFC 3339): for people, how long ago it was."""
    cell = moment(value)
    return Cell(cell.plain, cell.shown.partition("(")[2].rstrip(")") or cell.shown, cell.style)


def status_of(row: Mapping[str, Any]) -> Cell:
    """Return a cell for the status of a row; for people, also that the broker denies a client in use everything."""
    status = state(row.get("status"))
    return Cell(status.plain, f"{status.plain}, closed", "red") if row.get("broker_problem") else status


def date_of(name: str, *, expiry: bool = False) -> Callable[[Mapping[str, Any]], Cell]:
    """Return a column with the date in a field; an ``expiry`` is coloured if it is near or past."""
    return lambda row: moment(row.get(name), expiry=expiry, short=True)


def time_of(name: str) -> Callable[[Mapping[str, Any]], Cell]:
    """Return a column with date and time in a field, for people without fractions of seconds."""

    def column(row: Mapping[str, Any]) -> Cell:
        cell = moment(row.get(name))
        return Cell(cell.plain, cell.shown.partition(" (")[0], cell.style)

    return column


def _distance(seconds: float) -> str:
    away = seconds + 60 if seconds > 0 else -seconds  # a year from a moment ago is 365 days still
    for size, unit in _UNITS:
        count = int(away // size)
        if count:
            words = f"{count} {unit}{'' if count == 1 else 's'}"
            return f"in {words}" if seconds > 0 else f"{words} ago"
    return "just now"


class Output:
    """Results go to standard output, messages to standard error; colours and tables only to a terminal."""

    def __init__(self, *, as_json: bool = False, chosen: Mapping[str, str | None] | None = None) -> None:
        """Begin; what is suggested has the ``chosen`` options, else it would be done at another portal or tenant."""
        self.as_json = as_json
        self.for_people = sys.stdout.isatty() and not as_json
        self._program = shlex.quote(os.environ.get("PORTAL_COMMAND") or "portal")
        for option, value in (chosen or {}).items():
            if value is not None:
                self._program += f" {option} {shlex.quote(value)}"
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)

    def json(self, data: object) -> None:
        """Print one JSON document; ASCII only, so it cannot control a terminal."""
        self.raw(json.dumps(data, indent=2).replace("\x7f", "\\u007f"))

    def raw(self, content: str, *, as_it_is: bool = False) -> None:
        """Print text that is known to be safe, such as PEM, unchanged but for the end of its last line."""
        sys.stdout.write(content if content.endswith("\n") or as_it_is else content + "\n")
        sys.stdout.flush()

    def result(self, answer: object, fields: Mapping[str, Cell] | None = None, *, done: str = "") -> None:
        """Print an answer as JSON, or report what was ``done`` and print the fields."""
        if self.as_json:
            self.json(answer)
            return
        if done:
            self.done(done)
        if fields:
            self.fields(fields)

    def table(
        self,
        answer: Mapping[str, Any],
        key: str,
        columns: Mapping[str, Column],
        *,
        empty: str,
        spare: Sequence[str] = (),
        whole: Sequence[str] = (),
        wide: bool = False,
    ) -> None:
        """Print the rows under ``key``: the answer as JSON, a table for people, or tab-separated lines for programs.

        Without rows, says ``empty`` on standard error; if the answer has a cursor for more, says how to list all. On a
        narrow terminal the ``spare`` columns are left out, the last one first, which is told, and long values are cut
        (``…``), except in those of ``whole``, and in the first one if it is no longer than an id. With ``wide`` nothing
        is left out, and nothing is cut.
        """
        if self.as_json:
            self.json(answer)
            return
        rows = [
            [text(row.get(column)) if isinstance(column, str) else column(row) for column in columns.values()]
            for row in answer.get(key) or ()
            if isinstance(row, dict)
        ]
        if not rows:
            self.note(empty)
        elif self.for_people:
            self._print_table(list(columns), rows, spare, whole, wide=wide)
        else:
            for row in rows:
                self.raw("\t".join(clean(cell.plain) for cell in row))
        if rows and answer.get("next_cursor"):
            self.note("There are more; use --all to list all.")

    def _print_table(
        self,
        titles: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        spare: Sequence[str],
        whole: Sequence[str],
        *,
        wide: bool,
    ) -> None:
        texts = [[Text(clean(cell.shown or cell.plain), style=cell.style) for cell in row] for row in rows]
        widths = [max(len(title), *(line[i].cell_len for line in texts)) for i, title in enumerate(titles)]
        kept = list(range(len(titles))) if wide else self._fit(titles, widths, spare, whole)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i in kept:
            table.add_column(titles[i].upper(), no_wrap=True, overflow="ellipsis", width=widths[i])
        for line in texts:
            table.add_row(*(line[i] for i in kept))
        if wide:
            width = max(self._out.width, sum(widths) + 2 * len(widths))
            self._out.size = ConsoleDimensions(width, self._out.height)
        self._out.print(table)
        if left_out := [title for i, title in enumerate(titles) if i not in kept]:
            self.note(f"Not shown for want of width: {', '.join(left_out)}. A wider terminal or --json shows all.")

    def _fit(self, titles: Sequence[str], widths: list[int], spare: Sequence[str], whole: Sequence[str]) -> list[int]:
        """Return which columns fit side by side, and make the ``widths`` of some of them smaller.

        rich would cut off the columns on the right, whatever their minimum width is.
        """
        room = self._out.width + 2  # each column has two spaces behind it, but for the last
        kept = list(range(len(titles)))
        for title in reversed(spare):
            if sum(widths[i] + 2 for i in kept) > room:
                kept.remove(titles.index(title))
        flexible = [i for i in kept if (i != 0 or widths[i] > MAX_WHOLE) and titles[i] not in whole]
        least = [min(width, MIN_COLUMN) if i in flexible else width for i, width in enumerate(widths)]
        while flexible and sum(least[i] + 2 for i in kept) > room:
            kept.remove(flexible.pop())
        while flexible and sum(widths[i] + 2 for i in kept) > room:
            widest = max(flexible, key=lambda i: widths[i])
            widths[widest] -= 1
        return kept

    def fields(self, fields: Mapping[str, Cell]) -> None:
        """Print one object, a field a line: aligned for people; name, tab and value for programs."""
        shown = {clean(name): cell for name, cell in fields.items()}
        width = max((len(name) for name in shown), default=0)
        for name, cell in shown.items():
            if self.for_people:
                label = (f"{_label(name):<{width + 2}}", "bold")
                self._out.print(Text.assemble(label, (clean(cell.shown or cell.plain), cell.style)), soft_wrap=True)
            else:
                self.raw(f"{name}\t{clean(cell.plain)}")

    def question(self, fields: Mapping[str, Cell]) -> None:
        """Show on standard error the object that a question is about."""
        width = max(len(name) for name in fields)
        for name, cell in fields.items():
            line = Text.assemble((f"{name:<{width + 2}}", "bold"), clean(cell.shown or cell.plain))
            self._err.print(line, soft_wrap=True)

    def done(self, sentence: str) -> None:
        """Report success on standard error; silent with ``--json``."""
        self._say(Text.assemble(("✓ ", "green"), clean(sentence)), wraps=False)

    def note(self, sentence: str) -> None:
        """Print a remark on standard error; silent with ``--json``."""
        self._say(Text(self._suggesting(sentence), style="dim"))

    def next_step(self, command: str) -> None:
        """Suggest the next command; silent with ``--json``."""
        self._say(Text.assemble(("Next: ", "bold"), self._suggesting(command)), wraps=False)

    def _say(self, line: Text, *, wraps: bool = True) -> None:
        if not self.as_json:
            self._print(line, wraps=wraps)

    def _suggesting(self, sentence: str) -> str:
        """Return a sentence, clean, whose commands have the program's name as it was typed."""
        return clean(_SUGGESTED.sub(lambda _: f"{self._program} ", sentence))

    def _print(self, line: Text, *, wraps: bool = True) -> None:
        """Print a line on standard error; it is broken between words, but for a command, which has to be copied whole.

        So has a word that is longer than a line.
        """
        words = line.plain.split(" ")
        whole = f": {self._program} " in line.plain or ": . " in line.plain or max(map(len, words)) >= self._err.width
        self._err.print(line, soft_wrap=whole or not wraps or not self._err.is_terminal)

    def warning(self, sentence: str) -> None:
        """Print a warning on standard error, also with ``--json``."""
        self._print(Text.assemble(("Warning: ", "bold yellow"), self._suggesting(sentence)))

    @contextlib.contextmanager
    def progress(self, words: str, total: int) -> Iterator[Callable[[], None]]:
        """Show progress, rate and time left; yields a function to be called after each step.

        A bar if standard error is a terminal, else a line every ten seconds; nothing with ``--json``.
        """
        if self.as_json or self._err.color_system is None:
            yield _PlainProgress(self, words, total).advance
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task(clean(words), total=total)
            yield lambda: bar.advance(task)

    @contextlib.contextmanager
    def working(self, words: str) -> Iterator[None]:
        """Show a spinner if standard error is a terminal."""
        if self.as_json or self._err.color_system is None:
            yield
            return
        with self._err.status(Text(clean(words))):
            yield

    def error(self, error: CliError, *, options: Mapping[str, str]) -> None:
        """Print an error as a sentence with hints, or as JSON; ``options`` are the options that set a field."""
        if self.as_json:
            sys.stderr.write(json.dumps(error.as_json()) + "\n")
            return
        fields = error.fields if isinstance(error, Refused) else ()
        repeated = bool(fields) and all(message in error.sentence for _, message in fields)
        sentence = "The portal does not accept these values:" if repeated else error.sentence
        self._print(Text.assemble(("Error: ", "bold red"), self._suggesting(sentence)))
        for field, message in fields:
            root, _, inner = field.partition(".")
            option = options.get(root.lower().replace("-", "_"))
            label = field if option is None else f"{option} ({field})" if inner else option
            self._print(Text.assemble((f"  {clean(label)}: ", "bold"), clean(message)))
        for hint in error.hints:
            self._print(Text(self._suggesting(hint)))
        if isinstance(error, Refused) and error.request_id:
            self._err.print(Text(f"Request id: {clean(error.request_id)}", style="dim"), soft_wrap=True)


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        """Return the rate, if it is known."""
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


class _PlainProgress:
    """A line every ten seconds."""

    def __init__(self, out: Output, words: str, total: int) -> None:
        self._out = out
        self._words = words
        self._total = total
        self._done = 0
        self._started = self._said = time.monotonic()

    def advance(self) -> None:
        """Count a step."""
        self._done += 1
        now = time.monotonic()
        if now - self._said < PROGRESS_SECONDS:
            return
        self._said = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate
        self._out.note(f"{self._words}: {self._done} of {self._total}, {rate:.0f}/s, {left:.0f} s left")


def _label(name: str) -> str:
    group, _, number = name.rpartition(".")
    if number.isdigit():
        name = f"{group.removesuffix('s')} {int(number) + 1}"  # topics.0 is the first topic
    first, *more = (
        word.upper() if word in _ABBREVIATIONS else word for word in name.replace("_", " ").replace(".", " ").split(" ")
    )
    return " ".join((first[:1].upper() + first[1:], *more))


def _console(file: TextIO) -> Console:
    # Decided here, so that FORCE_COLOR and the like cannot put escape sequences into a pipe.
    terminal = file.isatty()
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return Console(
        file=file,
        force_terminal=terminal,
        color_system=None if plain or not terminal else "auto",
        markup=False,
        emoji=False,
        highlight=False,
    )
