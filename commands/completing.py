"""What a shell completes: the ids and names that the portal has, asked for with a short time limit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import click
from click.shell_completion import CompletionItem

from commands.connection import STDIN, ConnectionOptions, chosen_profile, resolve
from commands.errors import CliError
from commands.logins import login_path, read_logins, saved_profiles
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
        return self._items(self._rows(ctx), self.value, self.about, incomplete)

    def starting_with_either(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return as ``starting_with`` the ids that begin so, and the names once something is typed."""
        rows = self._rows(ctx)
        named = self._items(rows, self.about, self.value, incomplete) if incomplete else []
        return [*self._items(rows, self.value, self.about, incomplete.lower()), *named]

    def _rows(self, ctx: click.Context) -> list[Mapping[str, object]]:
        from commands.client import Client

        given = _given(ctx)
        if STDIN in (given.token, given.token_file):
            return []
        try:
            client = Client(resolve(given, os.environ), version=VERSION, patience=PATIENCE)
            rows = client.call("GET", self.path, params=self.query, repeatable=False).json().get(self.key)
        except CliError:
            return []
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    @staticmethod
    def _items(rows: Sequence[Mapping[str, object]], field: str, about: str, incomplete: str) -> list[CompletionItem]:
        found = {
            value: CompletionItem(value, help=_one_line(str(row.get(about) or "")))
            for row in rows
            if isinstance(value := row.get(field), str) and value.startswith(incomplete) and _PLAIN.fullmatch(value)
        }
        return list(found.values())


def saved_names(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the login profiles that begin so."""
    return [CompletionItem(name) for name in saved_profiles(os.environ) if name.startswith(incomplete)]


def saved_tenants(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the tenants of saved logins that begin so; nothing if those cannot be read."""
    try:
        logins = read_logins(login_path(os.environ, chosen_profile(_given(ctx), os.environ)))
    except CliError:
        return []
    return [CompletionItem(one.tenant) for one in logins if one.tenant.startswith(incomplete)]


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
