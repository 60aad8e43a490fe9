"""What has changed for a broker elsewhere, as text: lines of the guard's journal without number and checksum.

A page of it has the changes of several generations, in the order of these::

    changes SINCE NONCE
    tenant NAME PREFIX | suspend NAME | allow … | deny … | forget … | serial …    as in the journal
    cut ID | clear ID PREFIX | narrow ID
    end GENERATION PART NEWEST CAS CRLS DIGEST

``cut`` names a client whose session must end, ``clear`` one that was revoked for good, whose retained messages below
PREFIX are dropped, too, ``narrow`` one that has lost topics only. PART is ``more`` if further pages follow up to the
generation NEWEST, else ``all``. CAS and CRLS name the newest CA certificates and CRLs. DIGEST is the SHA-256 of all
lines before, in hex: without the last line, which alone has it, a page is not whole. NONCE is random, so that no two
pages have one digest. Who has nothing to give answers the line ``none GENERATION CAS CRLS``.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import IO

from broker.control import Changes
from broker.crl import NO_TENANTS, Trust
from broker.guard import journal
from broker.guard.access import GuardAccess
from broker.guard.draft import UNKNOWN_IDENTITY
from core.errors import ProjectionInvalid
from core.tenants import TenantOnBroker

MAX_LINE = journal.MAX_LINE_BYTES
MAX_IN_MEMORY = 8 << 20  # bytes of a page
_BLOCK_LINES, _BLOCK_BYTES = 1000, 64 << 10
NO_DIGEST = "0" * 64  # of who has nothing
_HEADER = re.compile(rb"changes ([0-9]{1,19}) [0-9a-f]{32}\n")
_END = re.compile(rb"end ([0-9]{1,19}) (more|all) ([0-9]{1,19}) ([0-9a-f]{64}) ([0-9a-f]{64}) ([0-9a-f]{64})\n")
_NONE = re.compile(rb"none ([0-9]{1,19}) ([0-9a-f]{64}) ([0-9a-f]{64})\n")
_ID, _NAME, _TEXT = r"[A-Za-z0-9._-]{1,64}", r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", r"[!-~]+"
_IN = rf"(?: in:{_NAME})?"
_LINE = re.compile(
    rf"tenant {_NAME} {_TEXT}|suspend {_NAME}|allow {_ID}{_IN}(?: (?:r|w|rw):{_TEXT}){{0,64}}|deny {_ID}{_IN}"
    rf"|forget {_ID}|serial [0-9a-f]{{64}} [0-9a-f]{{1,40}} {_ID}|cut {_ID}|clear {_ID} {_TEXT}|narrow {_ID}"
)


@dataclass(frozen=True, slots=True)
class Mark:
    """How far somebody has come: a generation, and the digest of the page by which it was reached."""

    generation: int
    digest: str


NOTHING = Mark(0, NO_DIGEST)


@dataclass(frozen=True, slots=True)
class TrustNames:
    """What names the newest CA certificates, with all that goes with them, and the newest CRLs: each a SHA-256."""

    cas: str
    crls: str


# --- Writing ---------------------------------------------------------------------------------------------------------


class Lines:
    """Collects lines, and their digest: in memory, or in a temporary file once they are many."""

    def __init__(self) -> None:
        self.size = 0
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(MAX_IN_MEMORY)  # noqa: SIM115 - closed with the page
        self._digest = hashlib.sha256()
        self._block: list[str] = []

    def add(self, text: str) -> None:
        """Add a line."""
        self._block.append(text)
        if len(self._block) >= _BLOCK_LINES:
            self._write()

    def discard(self) -> None:
        """Drop all of them."""
        self._file.close()

    def _write(self) -> None:
        content = "".join(f"{text}\n" for text in self._block).encode("ascii")
        self._block.clear()
        self.size += len(content)
        self._digest.update(content)
        self._file.write(content)

    def page(self, since: int, generation: int, newest: int) -> Page:
        """Return the page that they make."""
        self._write()
        digest = self._digest.hexdigest()
        if self.size > MAX_IN_MEMORY:
            return Page(since, generation, newest, self.size, digest, file=self._file)
        with self._file as file:
            file.seek(0)
            return Page(since, generation, newest, self.size, digest, file.read())


@dataclass(frozen=True, slots=True)
class Page:
    """The lines of a page but for the last one, from ``since`` to ``generation``; ``newest`` is the database's.

    ``size`` is that of its lines in bytes. Several may read a page that is in memory, one a page that is in a file.
    """

    since: int
    generation: int
    newest: int
    size: int
    digest: str
    content: bytes = field(default=b"", repr=False)
    file: IO[bytes] | None = field(default=None, repr=False)

    def blocks(self) -> Iterator[bytes]:
        """Yield the lines in blocks."""
        if self.file is None:
            yield self.content
            return
        self.file.seek(0)
        while block := self.file.read(_BLOCK_BYTES):
            yield block

    def close(self) -> None:
        """Remove the file of a long page, which has been read."""
        if self.file is not None:
            self.file.close()

    @property
    def is_last(self) -> bool:
        """Whether no further page follows."""
        return self.generation >= self.newest

    @property
    def mark(self) -> Mark:
        """How far one has come who has it."""
        return Mark(self.generation, self.digest)

    def end(self, names: TrustNames) -> bytes:
        """Return the last line, which is sent once it is recorded that the page was given."""
        part = "all" if self.is_last else "more"
        numbers = f"{self.generation} {part} {self.newest}"
        return f"end {numbers} {names.cas} {names.crls} {self.digest}\n".encode("ascii")


def none_line(generation: int, names: TrustNames) -> bytes:
    """Return the line of who has nothing to give."""
    return f"none {generation} {names.cas} {names.crls}\n".encode("ascii")


class FeedDraft(GuardAccess):
    """What has changed since a generation, for ``workflows.access.complete_draft``; nothing is installed."""

    lists_every_device = True
    lists_certificates = True
    lists_tenants = True

    def __init__(self, prefixes: Sequence[str], since: int, lines: Lines) -> None:
        super().__init__(prefixes, lines, whole=since == 0)
        self.since = since
        self._told: dict[str, TenantOnBroker] = {}
        lines.add(f"changes {since} {secrets.token_hex(16)}")

    def tell_tenant(self, tenant: TenantOnBroker) -> None:
        """Add the lines that say how a tenant stands, unless this page has."""
        if self._told.get(tenant.name) != tenant:
            self._told[tenant.name] = tenant
            self._writer.add(journal.tenant_line(tenant.name, tenant.prefix))
            if tenant.suspended:
                self._writer.add(journal.suspend_line(tenant.name))

    def unknown_tenants(self, names: Iterable[str]) -> Set[str]:
        """Return which tenants are not told yet: later pages have those that have changed since."""
        return {*names} - self._told.keys() if self.since == 0 else set()

    def _add(self, text: str, tenant: TenantOnBroker | None) -> None:
        if tenant is not None:
            self.tell_tenant(tenant)
        super()._add(text, tenant)

    def revoke_certificate(self, issuer: bytes, serial_number: str, identity: str | None, *, is_probe: bool) -> None:
        """Refuse a certificate; see ``broker.control.Draft``."""
        issuer_hash = hashlib.sha256(issuer).hexdigest()
        self._writer.add(journal.serial_line(issuer_hash, serial_number, identity or UNKNOWN_IDENTITY))

    def end_session(self, device_id: str, revoked: str | None = None) -> None:
        """Add a client whose session must end; ``revoked`` is the prefix of its topics if it was revoked for good."""
        self._writer.add(f"cut {device_id}" if revoked is None else f"clear {device_id} {journal.encode(revoked)}")

    def narrow(self, device_id: str) -> None:
        """Add a client that has lost topics only."""
        self._writer.add(f"narrow {device_id}")

    def puts_off_crls(self, ca: bytes, tenants: Mapping[str, str] = NO_TENANTS) -> bool:
        """Return that it has no CRLs to put off: an agent fetches them by their names."""
        return True

    def grants_ahead(self, ca: bytes, tenants: Mapping[str, str] = NO_TENANTS) -> bool:
        """Return ``False``: it is not installed here."""
        return False

    def install(self, generation: int, trust: Trust | None) -> bool:
        """Raise ``TypeError``: whoever reads the page installs it."""
        raise TypeError("a page is given, and not installed")

    def discard(self) -> None:
        """Drop the lines."""
        self._writer.discard()


# --- Reading ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ReadPage:
    """A page as it was received, or that there was nothing to give; ``lines`` may be read once it is whole.

    ``names`` and ``newest`` are there once its last line was.
    """

    since: int = 0
    mark: Mark = NOTHING
    newest: int = 0
    is_last: bool = True
    names: TrustNames = TrustNames(NO_DIGEST, NO_DIGEST)
    has_changes: bool = False


class PageReader:
    """Takes in the bytes of a page, line by line; each line is checked before it is handed on."""

    def __init__(self) -> None:
        self.page: ReadPage | None = None  # once it is whole
        self._digest = hashlib.sha256()
        self._since: int | None = None

    @property
    def since(self) -> int:
        """After which generation the page begins, 0 before its first line."""
        return self._since or 0

    def read(self, line: bytes) -> str | None:
        """Take in a line with its LF; return it if it is one for the journal, or about a session.

        Raise ``ProjectionInvalid`` if it is none that a page can have there.
        """
        if self.page is not None or not line.endswith(b"\n") or len(line) > MAX_LINE:
            raise _malformed()
        if self._since is None:
            self._begin(line)
            return None
        if (end := _END.fullmatch(line)) is not None:
            self._end(end)
            return None
        self._digest.update(line)
        text = line[:-1].decode("ascii", "replace")
        if _LINE.fullmatch(text) is None:
            raise _malformed()
        return text

    def _begin(self, line: bytes) -> None:
        if (none := _NONE.fullmatch(line)) is not None:
            names = TrustNames(none[2].decode(), none[3].decode())
            self.page = ReadPage(newest=int(none[1]), names=names)
        elif (header := _HEADER.fullmatch(line)) is not None:
            self._since = int(header[1])
            self._digest.update(line)
        else:
            raise _malformed()

    def _end(self, end: re.Match[bytes]) -> None:
        generation, part, newest, cas, crls, digest = (value.decode() for value in end.groups())
        since = self._since or 0
        if digest != self._digest.hexdigest() or not since <= int(generation) <= int(newest):
            raise _malformed()
        names = TrustNames(cas, crls)
        mark = Mark(int(generation), digest)
        self.page = ReadPage(since, mark, int(newest), part == "all", names, has_changes=True)


def _malformed() -> ProjectionInvalid:
    return ProjectionInvalid("The portal's list of changes was cut or is malformed; it is asked for again.")


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream with their LF; what follows the last one as it is. Raise ``ProjectionInvalid``."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"
        if len(rest) > MAX_LINE:
            raise _malformed()
    if rest:
        yield rest


class Sessions:
    """Whose sessions must end, as the lines of pages say: in a temporary file once they are many."""

    def __init__(self) -> None:
        self.left = 0
        self._file: IO[bytes] = io.BytesIO()
        self._done = 0  # bytes of lines about those that have ended

    def take(self, text: str) -> bool:
        """Take in a line; return whether it was about a session."""
        if not text.startswith(("cut ", "clear ", "narrow ")):
            return False
        self._write(f"{text}\n".encode("ascii"))
        self.left += 1
        return True

    def _write(self, content: bytes) -> None:
        if self._file.seek(0, os.SEEK_END) > MAX_IN_MEMORY and isinstance(self._file, io.BytesIO):
            before, self._file = self._file, tempfile.TemporaryFile()  # noqa: SIM115 - until ``close``
            self._file.write(before.getbuffer())
        self._file.write(content)

    def add(self, others: Sessions) -> None:
        """Add those of others, and close those."""
        try:
            others._file.seek(others._done)
            while block := others._file.read(_BLOCK_BYTES):
                self._write(block)
            self.left += others.left
        finally:
            others.close()

    def first(self, most: int) -> ToEnd:
        """Return the first of those that are left."""
        found = ToEnd()
        self._file.seek(self._done)
        for _ in range(min(most, self.left)):
            line = self._file.readline()
            found.take(line.decode("ascii").rstrip("\n"))
            found.lines, found.size = found.lines + 1, found.size + len(line)
        return found

    def ended(self, those: ToEnd) -> None:
        """Take in that the first of those that were left have ended."""
        self._done += those.size
        self.left -= those.lines

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


@dataclass(slots=True)
class ToEnd:
    """Some whose sessions must end; ``lines`` of ``size`` bytes said so."""

    lines: int = 0
    size: int = 0
    disconnected: dict[str, None] = field(default_factory=dict)
    revoked: dict[str, str] = field(default_factory=dict)
    narrowed: dict[str, None] = field(default_factory=dict)

    def take(self, text: str) -> None:
        """Take in a line."""
        match text.split(" "):
            case ["cut", device_id]:
                self.disconnected[device_id] = None
            case ["clear", device_id, prefix]:
                self.disconnected[device_id] = None
                self.revoked[device_id] = journal.decode(prefix)
            case ["narrow", device_id]:
                self.narrowed[device_id] = None

    def changes(self, generation: int, *, in_doubt: bool) -> Changes:
        """Return what the broker must be seen to obey."""
        narrowed = [one for one in self.narrowed if one not in self.disconnected]
        return Changes(generation, [*self.disconnected], dict(self.revoked), narrowed, in_doubt)
