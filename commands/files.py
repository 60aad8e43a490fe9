"""The command line's files: private, whole, never written over by accident."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from commands.errors import CheckFailed, Misused

SECRET_MOST = 4096  # bytes of a password or token in a file
INPUT_MOST = 1 << 20  # bytes of any other file that is read


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be written: its content with its mode."""

    content: bytes
    mode: int = 0o644


def reason(error: OSError) -> str:
    """Say why the system refused, in its own words, such as ``permission denied``."""
    return (error.strerror or type(error).__name__).lower()


def read_input(path: str, *, most: int = INPUT_MOST) -> bytes:
    """Read a file, or standard input for ``-``; raises ``Misused`` where that fails or is over ``most`` bytes."""
    try:
        if path == "-":
            content = sys.stdin.buffer.read(most + 1)
        else:
            with Path(path).expanduser().open("rb") as file:
                content = file.read(most + 1)
    except OSError as error:
        raise Misused(f"{path} cannot be read: {reason(error)}.") from None
    if len(content) > most:
        raise Misused(f"{'Standard input' if path == '-' else path} is longer than {most} bytes.")
    return content


def read_secret(path: str, what: str) -> str:
    """The first line of a file (``-`` for standard input), which holds ``what``; raises ``Misused``."""
    try:
        secret = read_input(path, most=SECRET_MOST).decode().split("\n", 1)[0].rstrip("\r")
    except UnicodeDecodeError:
        raise Misused(f"The {what} in {path} is not UTF-8 text.") from None
    if not secret:
        raise Misused(f"There is no {what} in {'standard input' if path == '-' else path}.")
    return secret


class ReservedFile:
    """A new 0600 file that is made before the secret it will hold, so that the secret always finds its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            raise Misused(f"{path} is there already; name a new file.") from None
        except OSError as error:
            raise Misused(f"{path} cannot be written: {reason(error)}.") from None

    def write(self, secret: str) -> None:
        """Write the secret with a newline, durably; raises ``CheckFailed``."""
        descriptor, self._descriptor = self._descriptor, -1
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret.encode() + b"\n")
                file.flush()
                os.fsync(descriptor)
        except OSError as error:
            raise CheckFailed(f"{self.path} cannot be written: {reason(error)}.") from None

    def discard(self) -> None:
        """Remove the file where nothing was written into it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.path.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes, *, mode: int) -> None:
    """Put ``content`` at ``path`` whole: temporary file, fsync, rename. Raises ``OSError``."""
    os.replace(_temporary(path, NewFile(content, mode)), path)
    _sync(path.parent)


def write_new(path: Path, file: NewFile, *, force: bool) -> None:
    """Write one file whole; raises ``CheckFailed`` where it exists (without ``force``) or cannot be written."""
    if not force and os.path.lexists(path):
        raise CheckFailed(f"{path} is there already; --force replaces it.")
    try:
        replace_file(path, file.content, mode=file.mode)
    except OSError as error:
        raise CheckFailed(f"{path} cannot be written: {reason(error)}.") from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file (0600) bit by bit that is there under its name only when the block has ended well.

    Raises ``CheckFailed`` where it cannot be written.
    """
    try:
        with _new_beside(path, mode=0o600) as (temporary, writer):
            yield writer
        try:
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise CheckFailed(f"{path} cannot be written: {reason(error)}.") from None


class Folder:
    """Where a device's files go: 0700 where it is new or empty, else one that others cannot write to."""

    def __init__(self, path: Path, names: tuple[str, ...], *, force: bool) -> None:
        """Make ready, before anything is asked of the portal.

        Raises ``CheckFailed`` where one of ``names`` is there already (without ``force``) or nothing can be written.
        """
        self.path = path
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
            raise CheckFailed(f"Others may write to {path}; make it private with chmod 700, or choose another folder.")
        there = [name for name in names if os.path.lexists(path / name)]
        if there and not force:
            raise CheckFailed(
                f"{path} holds {', '.join(there)} already; choose another folder with --out, or --force to replace."
            )

    def write(self, files: Mapping[str, NewFile]) -> None:
        """Write all of the files or none: every one is on the disk before the first gets its name."""
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
        """Remove the folder again where it was made here and nothing came of it."""
        if self._made and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()


def _temporary(path: Path, file: NewFile) -> Path:
    with _new_beside(path, mode=file.mode) as (temporary, writer):
        writer.write(file.content)
    return temporary


@contextlib.contextmanager
def _new_beside(path: Path, *, mode: int) -> Iterator[tuple[Path, BinaryIO]]:
    """Make a file beside ``path``, on the disk at the end of the block; gone again where that raises."""
    # The mode is set before the content is written, so a secret is never readable to others.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
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
    """Raise ``CheckFailed`` where no file can be made in a folder."""
    try:
        _temporary(path / "test", NewFile(b"")).unlink()
    except OSError as error:
        raise CheckFailed(f"{path.absolute()} cannot be written to: {reason(error)}.") from None
