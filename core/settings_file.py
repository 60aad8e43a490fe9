"""The settings' file: TOML (v1.0) with a key for each setting, read as the texts that the environment would have."""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_FILE = 256 * 1024  # bytes
MAX_DIGITS = 12  # of a number: no setting has more
_KEY = re.compile(r"""[ \t]*(["']?)([A-Za-z0-9_-]+)\1[ \t]*=""")


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """The values of a file by key, the line of each, and whether other users than owner and group can read it."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int]
    open_to_others: bool

    def place_of(self, key: str) -> str:
        """Return where a key stands, such as ``line 3 of /etc/portal/portal.toml``."""
        line = self.lines.get(key)
        return f"line {line} of {self.path}" if line else str(self.path)


def read_settings_file(path: Path) -> SettingsFile:
    """Read a file; raises ``ValueError`` with a sentence that names it if it cannot be used or is not TOML.

    It must be a regular file of root or of this user that nobody else can write to: settings name commands.
    """
    try:
        # Not blocking: a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            mode = _checked(path, os.fstat(descriptor))
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ValueError(f"The configuration file {path} cannot be read ({error.strerror}).") from None
    if len(content) > MAX_FILE:
        raise ValueError(f"The configuration file {path} is longer than {MAX_FILE} bytes.")
    text = _decoded(path, content)
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"The configuration file {path} is not TOML: it is nested too deeply.") from None
    except ValueError as error:  # a TOMLDecodeError says the line; of a huge number Python says something else
        said = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "a number is too long"
        raise ValueError(f"The configuration file {path} is not TOML: {said[:1].lower()}{said[1:]}.") from None
    return SettingsFile(path, values, _lines(text), bool(mode & 0o007))


def _checked(path: Path, status: os.stat_result) -> int:
    """Return the mode of a file that may be used; raises ``ValueError``."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"The configuration file {path} is not a regular file.")
    if status.st_mode & 0o022:
        raise ValueError(f"The configuration file {path} can be changed by other users; run: chmod go-w {path}")
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"The configuration file {path} belongs to a user who is neither root nor the portal's.")
    return status.st_mode


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"The configuration file {path} is not UTF-8 text (at line {line}).") from None


def _lines(text: str) -> dict[str, int]:
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _KEY.match(line):
            lines.setdefault(match[2], number)
    return lines


def text_of(value: object, *, separator: str = "", as_json: bool = False) -> str:
    """Return a value of a file as the environment would have it; a list is joined by the setting's ``separator``.

    With ``as_json`` a table, or a list of them, becomes JSON.

    Raises ``ValueError`` with the end of a sentence that begins with the name of the setting.
    """
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("must not have a NUL")
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = str(value)
        if len(text) > MAX_DIGITS + 1:
            raise ValueError("is a number that is too long")
        return text
    if isinstance(value, list) and separator:
        return separator.join(_element(each, separator) for each in value)
    if isinstance(value, dict | list) and as_json:
        try:
            return json.dumps(value)
        except TypeError:  # a date
            raise ValueError("must be a table of texts and lists of texts") from None
    raise ValueError("must be a text, a number or a list of texts" if separator else "must be a text or a number")


def _element(value: object, separator: str) -> str:
    if not isinstance(value, str) or not value.strip() or separator in value.strip():
        between = "a comma" if separator == "," else "a blank"
        raise ValueError(f"must be a list of texts, none of them empty or with {between}")
    return value.strip()
