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
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from commands.errors import CliError, Refused

if TYPE_CHECKING:
    from commands.terminal import Part, Terminal

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
_NAMES_LOGIN = "login --profile "  # a command that says by itself which saved login is meant
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
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return Cell(json.dumps(value, ensure_ascii=False), ", ".join(value) or "-", "" if value else "dim")
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
        self._program = self._bare = shlex.quote(os.environ.get("PORTAL_COMMAND") or "portal")
        for option, value in (chosen or {}).items():
            if value is not None:
                self._program += f" {option} {shlex.quote(value)}"
        self._stdout, self._stderr = sys.stdout, sys.stderr

    # Decided by isatty alone, so that FORCE_COLOR and the like cannot put escape sequences into a pipe.
    @cached_property
    def _out(self) -> Terminal | None:
        return _terminal(self._stdout)

    @cached_property
    def _err(self) -> Terminal | None:
        return _terminal(self._stderr)

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
        (``…``), except in the first one and those of ``whole``, which further commands are given: if these do not fit
        side by side, or nothing fits beside the first one, a row is a record of several lines. With ``wide`` nothing is
        left out, and nothing is cut.
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
        elif self.for_people and self._out is not None:
            shown = [[(clean(cell.shown or cell.plain), cell.style) for cell in row] for row in rows]
            if left_out := self._out.table(list(columns), shown, spare, whole, wide=wide):
                self.note(f"Not shown for want of width: {', '.join(left_out)}. A wider terminal or --json shows all.")
        else:
            for row in rows:
                self.raw("\t".join(clean(cell.plain) for cell in row))
        if rows and answer.get("next_cursor"):
            self.note("There are more; use --all to list all.")

    def fields(self, fields: Mapping[str, Cell]) -> None:
        """Print one object, a field a line: aligned for people; name, tab and value for programs."""
        shown = {clean(name): cell for name, cell in fields.items()}
        width = max((len(name) for name in shown), default=0)
        for name, cell in shown.items():
            if self.for_people and self._out is not None:
                label = (f"{_label(name):<{width + 2}}", "bold")
                self._out.line([label, (clean(cell.shown or cell.plain), cell.style)])
            else:
                self.raw(f"{name}\t{clean(cell.plain)}")

    def question(self, fields: Mapping[str, Cell]) -> None:
        """Show on standard error the object that a question is about."""
        width = max(len(name) for name in fields)
        for name, cell in fields.items():
            self._print((f"{name:<{width + 2}}", "bold"), (clean(cell.shown or cell.plain), ""), wraps=False)

    def done(self, sentence: str) -> None:
        """Report success on standard error; silent with ``--json``."""
        self._say(("✓ ", "green"), (clean(sentence), ""), wraps=False)

    def note(self, sentence: str) -> None:
        """Print a remark on standard error; silent with ``--json``."""
        self._say((self._suggesting(sentence), "dim"))

    def next_step(self, command: str) -> None:
        """Suggest the next command; silent with ``--json``."""
        self._say(("Next: ", "bold"), (self._suggesting(command), ""), wraps=False)

    def block(self, title: str, lines: Sequence[str]) -> None:
        """Print lines that are to be passed on as they are, on standard error; silent with ``--json``."""
        self._say(("", ""))
        self._say((clean(title), "bold"))
        for line in ("", *lines, ""):
            self._say((f"  {clean(line)}" if line else "", ""), wraps=False)

    def _say(self, *parts: Part, wraps: bool = True) -> None:
        if not self.as_json:
            self._print(*parts, wraps=wraps)

    def _suggesting(self, sentence: str) -> str:
        """Return a sentence, clean, whose commands have the program's name as it was typed."""

        def program(found: re.Match[str]) -> str:
            names_login = sentence.startswith(_NAMES_LOGIN, found.end())
            return f"{self._bare if names_login else self._program} "

        return clean(_SUGGESTED.sub(program, sentence))

    def _print(self, *parts: Part, wraps: bool = True) -> None:
        """Print a line on standard error; it is broken between words, but for a command, which has to be copied whole.

        So has a word that is longer than a line.
        """
        line = "".join(text for text, _ in parts)
        if self._err is None:
            self._stderr.write(line + "\n")
            self._stderr.flush()
            return
        suggests = f": {self._program} " in line or ": . " in line
        self._err.line(parts, whole=not wraps or suggests or max(map(len, line.split(" "))) >= self._err.width)

    def warning(self, sentence: str) -> None:
        """Print a warning on standard error, also with ``--json``."""
        self._print(("Warning: ", "bold yellow"), (self._suggesting(sentence), ""))

    @contextlib.contextmanager
    def progress(self, words: str, total: int) -> Iterator[Callable[[], None]]:
        """Show progress, rate and time left; yields a function to be called after each step.

        A bar if standard error is a terminal, else a line every ten seconds; nothing with ``--json`` or without steps.
        """
        if self.as_json or self._err is None or not self._err.shows_motion or not total:
            yield _PlainProgress(self, words, total).advance
            return
        with self._err.progress(clean(words), total) as advance:
            yield advance

    @contextlib.contextmanager
    def working(self, words: str) -> Iterator[None]:
        """Show a spinner if standard error is a terminal."""
        if self.as_json or self._err is None or not self._err.shows_motion:
            yield
            return
        with self._err.working(clean(words)):
            yield

    def error(self, error: CliError, *, options: Mapping[str, str]) -> None:
        """Print an error as a sentence with hints, or as JSON; ``options`` are the options that set a field."""
        if self.as_json:
            sys.stderr.write(json.dumps(error.as_json()) + "\n")
            return
        fields = error.fields if isinstance(error, Refused) else ()
        repeated = bool(fields) and all(message in error.sentence for _, message in fields)
        sentence = "The portal does not accept these values:" if repeated else error.sentence
        self._print(("Error: ", "bold red"), (self._suggesting(sentence), ""))
        for field, message in fields:
            root, _, inner = field.partition(".")
            option = options.get(root.lower().replace("-", "_"))
            label = field if option is None else f"{option} ({field})" if inner else option
            self._print((f"  {clean(label)}: ", "bold"), (clean(message), ""))
        for hint in error.hints:
            self._print((self._suggesting(hint), ""))
        if isinstance(error, Refused) and error.request_id:
            self._print((f"Request id: {clean(error.request_id)}", "dim"), wraps=False)


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


def _terminal(file: TextIO) -> Terminal | None:
    if not file.isatty():
        return None
    from commands.terminal import Terminal  # as long as all else that a command imports takes to be imported

    return Terminal(file)
