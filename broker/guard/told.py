"""What a journal has told the guard of tenants and their issuing CAs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

from broker.guard.journal import Position, decode, read_texts
from core.errors import ProjectionInvalid
from core.tenants import TenantOnBroker

_BLOCK_BYTES = 1 << 20
_LINE = re.compile(rb"^[0-9]+ ((?:tenant|suspend|issuer) [^\n]*) [0-9a-f]{8}$", re.MULTILINE)


@dataclass(slots=True)
class Prefixes:
    """Topic prefixes of which none is below another one."""

    own: set[str] = field(default_factory=set)
    above: set[str] = field(default_factory=set)  # what they begin with: a and a/b of a/b/c

    def overlaps(self, prefix: str) -> bool:
        """Return whether one of them is ``prefix``, or below it, or above it."""
        return prefix in self.above or not self.own.isdisjoint((prefix, *_above(prefix)))

    def add(self, prefix: str) -> None:
        """Add one that does not overlap."""
        self.own.add(prefix)
        self.above.update(_above(prefix))


def _above(prefix: str) -> Iterator[str]:
    levels = prefix.split("/")
    return ("/".join(levels[:count]) for count in range(1, len(levels)))


# The hashes that name issuing CAs to the guard, each with the name of its tenant, None for the first one.
NamedIssuers: TypeAlias = tuple[tuple[str, str | None], ...]


@dataclass(slots=True)
class Told:
    """What the lines of a journal say of tenants, by name, and of issuers: whose each hash is, ``None`` the first's."""

    tenants: dict[str, TenantOnBroker] = field(default_factory=dict)
    issuers: dict[str, str | None] = field(default_factory=dict)
    prefixes: Prefixes = field(default_factory=Prefixes)
    found: NamedIssuers = ()  # those of other tenants than the first were all there when last asked about

    def copy(self) -> Told:
        """Return a copy that can be changed."""
        prefixes = Prefixes(set(self.prefixes.own), set(self.prefixes.above))
        return Told(dict(self.tenants), dict(self.issuers), prefixes, self.found)

    def has(self, issuers: NamedIssuers) -> bool:
        """Return whether all CAs were told that are of other tenants than the first."""
        if self.found is not issuers:
            if any(tenant is not None and self.issuers.get(issuer) != tenant for issuer, tenant in issuers):
                return False
            self.found = issuers
        return True

    def take(self, text: str) -> None:
        """Take in a line, without its number and checksum; one of another kind changes nothing."""
        match text.split(" "):
            case ["tenant", name, prefix]:
                self.tenants[name] = TenantOnBroker(name, decode(prefix), suspended=False)
                self.prefixes.add(decode(prefix))
            case ["suspend", name] if name in self.tenants:
                self.tenants[name] = TenantOnBroker(name, self.tenants[name].prefix, suspended=True)
            case ["issuer", issuer_hash, *owner]:
                self.issuers[issuer_hash] = owner[0].removeprefix("in:") if owner else None

    def take_all(self, texts: Iterable[str]) -> None:
        """Take in several lines."""
        for text in texts:
            self.take(text)


class ToldByJournal:
    """What a journal on the disk has told: read once, then followed as it grows, whichever process appends to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] = (0, 0)  # inode and epoch
        self._end = 0
        self._told = Told()

    def at(self, position: Position) -> Told:
        """Return what the lines up to a position have told; copy it to change it. Raise ``ProjectionInvalid``."""
        if self._file != (position.inode, position.epoch) or position.size < self._end:
            self._file, self._end, self._told = (position.inode, position.epoch), 0, Told()
        if self._end < position.size:
            try:
                with self._path.open("rb") as file:
                    if os.fstat(file.fileno()).st_ino != position.inode:
                        raise ProjectionInvalid(f"{self._path} was replaced while it was read.")
                    file.seek(self._end)
                    for block in _blocks(file, position.size - self._end):
                        self._told.take_all(found[1].decode("ascii") for found in _LINE.finditer(block))
            except OSError as error:
                raise ProjectionInvalid(f"{self._path} cannot be read: {error.strerror}.") from error
            self._end = position.size
        return self._told


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the next ``size`` bytes in blocks of whole lines."""
    rest = b""
    while size > 0 and (read := file.read(min(size, _BLOCK_BYTES))):
        size -= len(read)
        lines, newline, rest = (rest + read).rpartition(b"\n")
        yield lines + newline


def read_told(path: Path) -> Told:
    """Return what a whole journal has told; raise ``ProjectionInvalid`` if it is missing or damaged."""
    told = Told()
    told.take_all(read_texts(path))
    return told
