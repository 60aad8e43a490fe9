"""What a shell completes: the ids and names that the portal has, asked for with a short time limit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import click
from click.shell_completion import CompletionItem

from commands.client import Client
from commands.connection import STDIN, ConnectionOptions, resolve
from commands.errors import CliError
from onboarding_portal import VERSION

PATIENCE = 2.0  # seconds: somebody waits with a finger on the key
_PLAIN = re.compile(r"[\w.@-]{1,128}")


@dataclass(frozen=True, slots=True)
class Listed:
    """Where the portal lists what a parameter takes: the path with its query, the key of the rows, their fields."""

    path: str
    key: str
    value: str
    about: str
    query: Mapping[str, int] = field(default_factory=dict)

    def starting_with(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return what begins so, with what it is; nothing if the portal does not say, for whatever reason."""
        given = _given(ctx)
        if STDIN in (given.token, given.token_file):
            return []
        try:
            client = Client(resolve(given, os.environ), version=VERSION, patience=PATIENCE)
            rows = client.call("GET", self.path, params=self.query, repeatable=False).json().get(self.key)
        except CliError:
            return []
        found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return [
            CompletionItem(value, help=_one_line(str(row.get(self.about) or "")))
            for row in found
            if isinstance(value := row.get(self.value), str)
            and value.startswith(incomplete)
            and _PLAIN.fullmatch(value)
        ]


def _given(ctx: click.Context) -> ConnectionOptions:
    """Return the connection options typed so far; those after the command's name override those before it."""
    values: dict[str, str] = {}
    for context in (ctx.find_root(), ctx):
        typed = {each.name: context.params.get(each.name) for each in fields(ConnectionOptions)}
        values |= {name: value for name, value in typed.items() if value is not None}
    return ConnectionOptions(**values)


def _one_line(text: str) -> str:
    """Return a text that a completion script can take: it reads lines."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())[:80]
