"""The commands of ``portal``, imported when they are used: each alone takes longer to import than its help to print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module

import click


@dataclass(frozen=True, slots=True)
class Lazy:
    """Where a command is, ``module:attribute`` below ``commands``, and its summary, the first sentence of its help."""

    place: str
    summary: str

    def load(self) -> click.Command:
        """Import the command."""
        module, _, attribute = self.place.partition(":")
        found = getattr(import_module(f"commands.{module}"), attribute)
        if not isinstance(found, click.Command):
            raise TypeError(f"{self.place} is not a command")
        return found


class LazyCommands(MutableMapping[str, click.Command]):
    """Commands by their names; looking one up imports it, listing the names does not."""

    def __init__(self, known: Mapping[str, Lazy]) -> None:
        self._known = dict(known)
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._loaded:
            self._loaded[name] = self._known[name].load()
        return self._loaded[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        self._known.pop(name, None)
        self._loaded.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._loaded

    def __iter__(self) -> Iterator[str]:
        return iter({**self._known, **self._loaded})

    def __len__(self) -> int:
        return len({**self._known, **self._loaded})
