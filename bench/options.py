"""The options of the benchmarks: a wrong value is refused in one sentence, and the help shows the defaults."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser whose help says the default of each option that has one."""

    def add_argument(self, *names: str, **given: Any) -> argparse.Action:
        """Add an option, with its default in its help."""
        action = super().add_argument(*names, **given)
        shown = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        if action.nargs != 0 and any(one not in (None, "") for one in shown):  # a flag takes no value
            default = f"(default: {' '.join(map(str, shown))})"
            action.help = f"{action.help} {default}" if action.help else default
        return action


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an option that takes whole numbers from ``least`` on."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return number

    return read


count = at_least(1)


def seconds(text: str) -> float:
    """Read how long something takes: a number above 0."""
    number = not_negative(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too short; give a number above 0")
    return number


def not_negative(text: str) -> float:
    """Read a number from 0 on."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return number


def folder(text: str) -> Path:
    """Read the name of a folder that there is; return its whole path, since programs that are started are elsewhere."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return path.resolve()


def writable_folder(text: str) -> Path:
    """Read the name of a folder in which others can be made."""
    path = folder(text)
    if not os.access(path, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"nothing can be written to {text}")
    return path
