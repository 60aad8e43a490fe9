"""Reads and writes files: private, atomically, never replaced by accident."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from commands.errors import CheckFailed, Misused

MAX_SECRET = 4096  # bytes of a password or token in a file
MAX_INPUT = 1 << 20  # bytes of any other file that is read


@dataclass(frozen=True, slots=True)
class NewFile:
    """The content and mode of a file to be written."""

    content: bytes
    mode: int = 0o644


def reason(error: OSError) -> str:
    """Return the system's reason, such as ``permission denied``."""
    return (error.strerror or type(error).__name__).lower()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ``CheckFailed`` if the block cannot write the file."""
    try:
        yield
    except OSError as error:
        raise CheckFailed(f"{path} cannot be written: {reason(error)}.") from None


def read_input(path: str, *, limit: int = MAX_INPUT) -> bytes:
    """Read a file, or standard input for ``-``; raises ``Misused`` if that fails or it exceeds ``limit`` bytes."""
    try:
        if path == "-":
            content = sys.stdin.buffer.read(limit + 1)
        else:
            with Path(path).expanduser().open("rb") as file:
                content = file.read(limit + 1)
    except OSError as error:
        raise Misused(f"{path} cannot be read: {reason(error)}.") from None
    if len(content) > limit:
        raise Misused(f"{'Standard input' if path == '-' else path} is longer than {limit} bytes.")
    return content


def read_pem(path: str) -> str:
    """Read a file, or standard input for ``-``, that must be PEM without a private key; raises ``Misused``."""
    content = read_input(path)
    if not content.isascii() or b"-----BEGIN " not in content:
        raise Misused(f"{path} is not PEM; convert it with: openssl x509 -inform DER -in FILE")
    if b"PRIVATE KEY-----" in content:
        raise Misused(f"{path} has a private key, which is sent to nobody; give the certificate or the public key.")
    return content.decode("ascii")


def read_secret(path: str, what: str) -> str:
    """Return the first line of a file (``-`` for standard input) as a secret; raises ``Misused``."""
    try:
        secret = read_input(path, limit=MAX_SECRET).decode().split("\n", 1)[0].rstrip("\r")
    except UnicodeDecodeError:
        raise Misused(f"The {what} in {path} is not UTF-8 text.") from None
    if not secret:
        raise Misused(f"{'Standard input' if path == '-' else path} contains no {what}.")
    return secret


class ReservedFile:
    """A new 0600 file, created before the secret exists so that the secret can always be saved."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            raise Misused(f"{path} already exists; choose a new file.") from None
        except OSError as error:
            raise Misused(f"{path} cannot be written: {reason(error)}.") from None

    def write(self, secret: str) -> None:
        """Write the secret with a newline, durably; raises ``CheckFailed``."""
        descriptor, self._descriptor = self._descriptor, -1
        with writing(self.path), os.fdopen(descriptor, "wb") as file:
            file.write(secret.encode() + b"\n")
            file.flush()
            os.fsync(descriptor)

    def discard(self) -> None:
        """Remove the file if nothing was written to it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.path.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file atomically: temporary file, fsync, rename. Raises ``OSError``."""
    os.replace(_temporary(path, NewFile(content, mode)), path)
    _sync(path.parent)


def write_new(path: Path, file: NewFile, *, force: bool) -> None:
    """Write a file atomically; raises ``CheckFailed`` if it exists (without ``force``) or cannot be written."""
    if not force and os.path.lexists(path):
        raise CheckFailed(f"{path} already exists; use --force to replace it.")
    with writing(path):
        replace_file(path, file.content, mode=file.mode)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file (0600) in parts; it gets its name only if the block succeeds.

    Raises ``CheckFailed`` if it cannot be written.
    """
    with writing(path):
        with _new_beside(path, mode=0o600) as (temporary, writer):
            yield writer
        try:
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


class Folder:
    """A folder for a device's files: 0700 if it is new or empty, otherwise not writable by others."""

    def __init__(self, path: Path, names: tuple[str, ...], *, force: bool) -> None:
        """Prepare the folder, before a request is sent to the portal.

        Raises ``CheckFailed`` if one of ``names`` exists (without ``force``) or files cannot be written.
        """
        self.path = path
        if os.path.lexists(path) and not path.is_dir():
            raise CheckFailed(f"{path} is not a folder; choose another name.")
        try:
            self._made = not path.exists()
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not any(path.iterdir()):
                path.chmod(0o700)
            mode = path.stat().st_mode
            _temporary(path / "test", NewFile(b"")).unlink()
        except OSError as error:
            raise CheckFailed(f"{path} cannot be written to: {reason(error)}.") from None
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CheckFailed(f"Others can write to {path}; make it private with chmod 700, or choose another folder.")
        there = [name for name in names if os.path.lexists(path / name)]
        if there and not force:
            raise CheckFailed(
                f"{path} already contains {', '.join(there)}; choose another folder with --out, or use --force."
            )

    def write(self, files: Mapping[str, NewFile]) -> None:
        """Write all of the files or none: all are on disk before the first gets its name."""
        ready: list[tuple[Path, Path]] = []
        try:
            for name, file in files.items():
                ready.append((_temporary(self.path / name, file), self.path / name))
            for temporary, path in ready:
                os.replace(temporary, path)
            _sync(self.path)
        except OSError as error:
            raise CheckFailed(f"The files cannot be written to {self.path}: {reason(error)}.") from None
        finally:
            for temporary, _ in ready:
                temporary.unlink(missing_ok=True)

    def leave(self) -> None:
        """Remove the folder if it was created here and is still empty."""
        if self._made and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()


def _temporary(path: Path, file: NewFile) -> Path:
    with _new_beside(path, mode=file.mode) as (temporary, writer):
        writer.write(file.content)
    return temporary


@contextlib.contextmanager
def _new_beside(path: Path, *, mode: int) -> Iterator[tuple[Path, BinaryIO]]:
    """Create a temporary file next to ``path``, synced at the end of the block, removed if the block fails."""
    # The mode is set before the content is written, so a secret is never readable by others.
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as writer:
            os.fchmod(descriptor, mode)
            yield temporary, writer
            writer.flush()
            os.fsync(descriptor)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(path: Path) -> None:
    """Raise ``CheckFailed`` if no file can be created in a folder."""
    try:
        _temporary(path / "test", NewFile(b"")).unlink()
    except OSError as error:
        raise CheckFailed(f"{path.absolute()} cannot be written to: {reason(error)}.") from None


# --- Cells of CSV files -------------------------------------------------------------------------------------------

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "'")


def defused(cell: object) -> object:
    """Return a cell that no spreadsheet takes for a formula: after an apostrophe, if it begins like one."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def undefused(cell: str) -> str:
    """Return the text that ``defused`` was given."""
    return cell.removeprefix("'")
