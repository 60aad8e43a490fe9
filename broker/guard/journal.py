"""The journal that the guard in the broker follows: an append-only file with a line for each change.

``mosquitto/guard/README.md`` describes the format. Each line ends with a CRC-32 that continues the one of the line
before, so that no line can be lost, swapped or taken from another file without being noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self
from urllib.parse import unquote

from cryptography import x509

from core.errors import BrokerUnavailable, ProjectionInvalid
from core.failpoints import failpoint
from core.files import fsync_directory, temporary_beside
from core.topics import Access

VERSION = 1
MAX_LINE_BYTES = 32_768  # with its LF
MAX_NUMBER = (1 << 63) - 1
_ACCESS = {Access.READ: "r", Access.WRITE: "w", Access.READWRITE: "rw"}
_TAIL_BYTES = (2048, 4 * MAX_LINE_BYTES)  # of which the last lines are read: a usual change is some hundred bytes
_BLOCK_BYTES = 1 << 20
_MAX_IN_MEMORY = 4 << 20  # bytes of lines to append
_LINE = re.compile(rb"(([0-9]{1,19}) (?:generation ([0-9]{1,19})|[a-z]+ [!-~][ -~]*)) ([0-9a-f]{8})\n")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a journal ends: ``size`` counts the bytes of complete lines, ``generation`` is the last that they state."""

    epoch: int
    seq: int
    generation: int
    checksum: int
    size: int
    inode: int


# --- Lines: what comes after the sequence number --------------------------------------------------------------------


def portal_line(password_hash: str) -> str:
    """Return the line that admits the portal itself, by the SHA-256 of its password in hex."""
    return f"portal {password_hash}"


def prefix_line(prefix: str) -> str:
    """Return the line that says below which topic the default topics are."""
    return f"prefix {prefix}"


def tenant_line(name: str, prefix: str) -> str:
    """Return the line that tells a tenant with the topic below which its default topics are, or ends its suspension."""
    return f"tenant {name} {encode(prefix)}"


def suspend_line(name: str) -> str:
    """Return the line that refuses every identity of a tenant everything, until the next ``tenant_line``."""
    return f"suspend {name}"


def _of(tenant: str | None) -> str:
    return "" if tenant is None else f" in:{tenant}"


def issuer_line(name_hash: str, tenant: str | None = None) -> str:
    """Return the line that makes a CA a tenant's, by the SHA-256 of its DER subject name in hex, or of its key.

    Here and below ``tenant`` is ``None`` for the first one, which has no line.
    """
    return f"issuer {name_hash}{_of(tenant)}"


def issuer_hashes(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return what ``issuer_line`` is given for a CA, in this order: its name, its key, and the mark that keys are told.

    A CA without a key identifier (RFC 5280 section 4.2.1.2) is known by its name alone.
    """
    name = hashlib.sha256(certificate.subject.public_bytes())
    try:
        key = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        return (name.hexdigest(),)
    of_key = hashlib.sha256(name.digest() + hashlib.sha256(key).digest())
    return name.hexdigest(), of_key.hexdigest(), hashlib.sha256(name.digest()).hexdigest()


def allow_line(identity: str, filters: Sequence[tuple[str, Access]] | None = None, *, tenant: str | None = None) -> str:
    """Return the line that grants an identity the default topics, or only those of ``filters``, already expanded.

    Raise ``ProjectionInvalid`` if they do not fit into a line.
    """
    line = f"allow {identity}{_of(tenant)}"
    if filters is None:
        return line
    line += " " + " ".join(f"{_ACCESS[access]}:{encode(text)}" for text, access in filters)
    if not filters or len(filters) > 64 or len(line) > MAX_LINE_BYTES - 40:
        raise ProjectionInvalid(f"The topics of {identity} do not fit into a line of the journal.")
    return line


def deny_line(identity: str, *, tenant: str | None = None) -> str:
    """Return the line that refuses an identity everything."""
    return f"deny {identity}{_of(tenant)}"


def forget_line(identity: str) -> str:
    """Return the line that makes an identity unknown."""
    return f"forget {identity}"


def serial_line(issuer_hash: str, serial_number: str, identity: str) -> str:
    """Return the line that refuses a certificate, by its issuer's hash and its serial number in lower-case hex."""
    return f"serial {issuer_hash} {serial_number} {identity}"


def encode(text: str) -> str:
    """Return a topic filter with space, ``%`` and all bytes but printable ASCII as ``%XX``."""
    return "".join(chr(byte) if 0x20 < byte < 0x7F and byte != 0x25 else f"%{byte:02X}" for byte in text.encode())


def decode(text: str) -> str:
    """Return what ``encode`` was given."""
    return unquote(text)


def _ended(text: str, previous: int) -> tuple[bytes, int]:
    """Return a line with its checksum, and that checksum."""
    line = text.encode("ascii")
    checksum = zlib.crc32(line, previous)
    return b"%s %08x\n" % (line, checksum), checksum


class _Renderer:
    """Renders lines that follow a position."""

    def __init__(self, seq: int, checksum: int) -> None:
        self.seq = seq
        self.checksum = checksum

    def line(self, text: str) -> bytes:
        self.seq += 1
        line, self.checksum = _ended(f"{self.seq} {text}", self.checksum)
        return line


# --- Writing --------------------------------------------------------------------------------------------------------


def make_durable(path: Path) -> None:
    """Make a journal durable, whoever has written to it; raise ``BrokerUnavailable`` if that fails.

    It costs little if it is already. Its lines can be proven to be in force meanwhile.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BrokerUnavailable.unwritable(path, error) from error


class JournalAppend:
    """Lines to append to a journal at a position; nothing is written before ``commit``. The caller holds the lock.

    Very many are kept in a file without a name beside the journal until then.
    """

    def __init__(self, path: Path, position: Position) -> None:
        self.position = position
        self._path = path
        self._renderer = _Renderer(position.seq, position.checksum)
        self._lines: list[bytes] = []
        self._size = 0  # of those
        self._spilled: BinaryIO | None = None  # the lines before those

    def add(self, text: str) -> None:
        """Add a line; raise ``BrokerUnavailable`` if it cannot be kept."""
        line = self._renderer.line(text)
        self._lines.append(line)
        self._size += len(line)
        if self._size >= _MAX_IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        try:
            if self._spilled is None:
                self._spilled = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 - until it is discarded
            self._spilled.writelines(self._lines)
        except OSError as error:
            self.discard()
            raise BrokerUnavailable.unwritable(self._path, error) from error
        self._lines.clear()
        self._size = 0

    def commit(self, generation: int) -> Position:
        """Append the lines and one that states ``generation``, durably; return where the journal ends then.

        See ``write``.
        """
        return self._append(generation, durably=True)

    def write(self, generation: int) -> Position:
        """Append as ``commit`` does, so that the guard can read it, but not durably yet: see ``make_durable``.

        What a writer that died has left of a line is cut off before. Raise ``BrokerUnavailable`` if the journal cannot
        be written or is not the one of the position: then no part of a line is left, but complete lines may be, which
        the guard may have read. They are true, and the next append continues behind them.
        """
        return self._append(generation, durably=False)

    def _append(self, generation: int, *, durably: bool) -> Position:
        self.add(f"generation {generation}")
        before = self.position
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                self._cut_torn_line(descriptor)
                size = _write_lines(descriptor, self._blocks(), before.size)
                failpoint("journal.written")
                if durably:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BrokerUnavailable.unwritable(self._path, error) from error
        finally:
            self.discard()
        seq, checksum = self._renderer.seq, self._renderer.checksum
        return Position(before.epoch, seq, generation, checksum, before.size + size, before.inode)

    def _blocks(self) -> Iterator[bytes]:
        if self._spilled is not None:
            self._spilled.seek(0)
            yield from iter(lambda: self._spilled.read(_BLOCK_BYTES) if self._spilled else b"", b"")
        yield b"".join(self._lines)

    def discard(self) -> None:
        """Drop the lines."""
        self._lines.clear()
        spilled, self._spilled = self._spilled, None
        if spilled is not None:
            with contextlib.suppress(OSError):
                spilled.close()

    def _cut_torn_line(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if (status.st_ino, status.st_size) == (self.position.inode, self.position.size):
            return
        rest = os.pread(descriptor, MAX_LINE_BYTES, self.position.size)
        if status.st_ino != self.position.inode or status.st_size < self.position.size or b"\n" in rest:
            raise BrokerUnavailable(f"{self._path} was changed by somebody else; the portal writes it again.")
        os.ftruncate(descriptor, self.position.size)


def _write_lines(descriptor: int, blocks: Iterable[bytes], start: int) -> int:
    """Write at ``start``; return how many bytes. If that fails, cut off an incomplete line, and raise ``OSError``."""
    end = whole = start  # of what is written, and of its last complete line
    try:
        for block in blocks:
            done = 0
            while done < len(block):
                count = os.pwrite(descriptor, block[done : done + _BLOCK_BYTES], end)
                if (last := block.rfind(b"\n", done, done + count)) >= 0:
                    whole = end + last + 1 - done
                done, end = done + count, end + count
    except OSError:
        os.ftruncate(descriptor, whole)
        raise
    return end - start


class NewJournal:
    """A journal of a new epoch: written beside the old one in bounded memory, and renamed over it by ``commit``."""

    def __init__(self, path: Path, epoch: int, *, mode: int, group: int | None) -> None:
        """Begin it; raise ``BrokerUnavailable``."""
        self._path = path
        self._epoch = epoch
        self._temporary = temporary_beside(path)
        header, checksum = _ended(f"portal-guard {VERSION} {epoch} 0", 0)
        self._renderer = _Renderer(0, checksum)
        try:
            descriptor = os.open(
                self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            raise BrokerUnavailable.unwritable(path, error) from error
        self._file: BinaryIO = os.fdopen(descriptor, "wb", buffering=_BLOCK_BYTES)
        try:
            if group is not None:
                os.fchown(descriptor, -1, group)
            os.fchmod(descriptor, mode)
            self._file.write(header)
        except OSError as error:
            self.discard()
            raise BrokerUnavailable.unwritable(path, error) from error

    @property
    def is_closed(self) -> bool:
        """Whether it was committed or discarded."""
        return self._file.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def add(self, text: str) -> None:
        """Add a line; raise ``BrokerUnavailable`` if it cannot be written."""
        try:
            self._file.write(self._renderer.line(text))
        except OSError as error:
            self.discard()
            raise BrokerUnavailable.unwritable(self._path, error) from error

    def commit(self, generation: int) -> Position:
        """Add the line that states ``generation``, and replace the journal durably; return where it ends."""
        self.add(f"generation {generation}")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            status = os.fstat(self._file.fileno())
            failpoint("journal.staged")
            self._temporary.rename(self._path)
            failpoint("journal.renamed")
            fsync_directory(self._path.parent)
        except OSError as error:
            raise BrokerUnavailable.unwritable(self._path, error) from error
        finally:
            self.discard()
        renderer = self._renderer
        return Position(self._epoch, renderer.seq, generation, renderer.checksum, status.st_size, status.st_ino)

    def discard(self) -> None:
        """Remove what was written, unless it has replaced the journal."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


# --- Reading --------------------------------------------------------------------------------------------------------


def read_position(path: Path, *, whole: bool = False) -> Position:
    """Return where the journal ends, from its header and its last lines, or with ``whole`` from all of it.

    Raise ``ProjectionInvalid`` if it is missing or damaged. What follows the last LF is ignored.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            header = file.readline(MAX_LINE_BYTES)
            epoch, base, checksum = _read_header(path, header)
            start = len(header)
            for size in () if whole else _TAIL_BYTES:
                if status.st_size <= start + size:
                    break
                file.seek(status.st_size - size)
                if (tail := _tail(path, file)) is not None:
                    return tail.position(epoch, status.st_ino)
            file.seek(start)
            found = _follow(path, _lines(file, start), known=(base, checksum))
    except OSError as error:
        raise ProjectionInvalid(f"{path} cannot be read: {error.strerror}.") from error
    if found.generation is None:
        raise ProjectionInvalid(f"{path} is damaged: it states no generation.")
    return found.position(epoch, status.st_ino)


def _read_header(path: Path, line: bytes) -> tuple[int, int, int]:
    fields = line.split(b" ")
    text, _, stated = line.rstrip(b"\n").rpartition(b" ")
    checksum = zlib.crc32(text)
    try:
        if line.endswith(b"\n") and fields[:2] == [b"portal-guard", b"%d" % VERSION] and stated == b"%08x" % checksum:
            epoch, base = int(fields[2]), int(fields[3])
            if len(fields) == 5 and 0 < epoch <= MAX_NUMBER and 0 <= base <= MAX_NUMBER:
                return epoch, base, checksum
    except (ValueError, IndexError):
        pass
    raise ProjectionInvalid(f"{path} is damaged: its first line is not a header.")


@dataclass(slots=True)
class _Found:
    """What lines say: the last sequence number, its checksum, the last generation, where the last line ends."""

    seq: int
    checksum: int
    generation: int | None
    end: int

    def position(self, epoch: int, inode: int) -> Position:
        return Position(epoch, self.seq, self.generation or 0, self.checksum, self.end, inode)


def _lines(file: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the complete lines with the offset of each one's end."""
    end = start
    for line in iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""):
        end += len(line)
        if line.endswith(b"\n") or len(line) > MAX_LINE_BYTES:
            yield end, line


def _tail(path: Path, file: BinaryIO) -> _Found | None:
    """Read the last lines, but for the first, which may begin in the middle; ``None`` if they state no generation."""
    file.readline(MAX_LINE_BYTES)
    lines = [*_lines(file, file.tell())]
    found = _follow(path, lines, known=None) if lines else None
    return None if found is None or found.generation is None else found


def _follow(path: Path, lines: Iterable[tuple[int, bytes]], known: tuple[int, int] | None) -> _Found:
    """Check numbers and checksums of lines that follow ``known`` (sequence number, checksum), or else the first one."""
    found = None if known is None else _Found(known[0], known[1], None, 0)
    for end, line in lines:
        match = _LINE.fullmatch(line)
        if match is None or len(line) > MAX_LINE_BYTES:
            raise ProjectionInvalid(f"{path} is damaged: the line that ends at byte {end} is malformed.")
        text, number, generation, stated = match.groups()
        if found is None:
            found = _Found(int(number), int(stated, 16), None, end)
        else:
            checksum = zlib.crc32(text, found.checksum)
            if stated != b"%08x" % checksum or int(number) != found.seq + 1:
                raise ProjectionInvalid(f"{path} is damaged: the line that ends at byte {end} is not the next one.")
            found.seq, found.checksum, found.end = found.seq + 1, checksum, end
        if generation is not None:
            found.generation = int(generation)
    if found is None or found.end == 0:
        raise ProjectionInvalid(f"{path} is damaged: it has no complete line.")
    return found


def read_texts(path: Path) -> Iterator[str]:
    """Yield what the lines after the header say, without number and checksum, once all of them were checked.

    Raise ``ProjectionInvalid`` if it is missing or damaged.
    """
    size = read_position(path, whole=True).size
    with path.open("rb") as file:
        file.readline()
        while file.tell() < size:
            yield file.readline().decode("ascii").partition(" ")[2].rpartition(" ")[0]


def read_access(path: Path) -> dict[str, str]:
    """Return what the journal says of each identity at its end: the line ``allow …`` or ``deny …``.

    Raise ``ProjectionInvalid`` if it is missing or damaged.
    """
    access: dict[str, str] = {}
    for text in read_texts(path):
        verb, identity = text.split(" ", 2)[:2]
        if verb in ("allow", "deny"):
            access[identity] = text
        elif verb == "forget":
            access.pop(identity, None)
    return access


def read_certificates(path: Path) -> set[tuple[str, str]]:
    """Return the certificates that are refused at the journal's end: issuer's hash and serial number, as in its lines.

    Raise ``ProjectionInvalid`` if it is missing or damaged.
    """
    refused: set[tuple[str, str]] = set()
    for text in read_texts(path):
        match text.split(" "):
            case ["serial", issuer_hash, serial_number, _]:
                refused.add((issuer_hash, serial_number))
            case ["unserial", issuer_hash, serial_number]:
                refused.discard((issuer_hash, serial_number))
    return refused
