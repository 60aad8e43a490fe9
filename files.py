"""Durable files: whole replacement, private modes, locks between processes."""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import StartupError


def fsync_directory(folder: Path) -> None:
    """Make the names in ``folder`` durable (a rename is not until its directory is synced)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, *, mode: int = 0o600, group: int | None = None) -> None:
    """Put ``content`` at ``path`` whole and durably: temporary file, fsync, rename, fsync of the folder.

    Readers see the old file or the new one, never a part. The mode and the group are set before any content is
    written, so a secret is never readable to others. Raises ``OSError`` and leaves the old file where it fails.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            if group is not None:
                os.fchown(descriptor, -1, group)
            os.fchmod(descriptor, mode)
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def private_folder(path: Path, *, mode: int = 0o700, group: int | None = None) -> Path:
    """Create ``path`` where it is missing; its mode, and its group if given, are set in any case."""
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    if group is not None:
        os.chown(path, -1, group)
    path.chmod(mode)
    return path


def secret_file(path: Path, make: Callable[[], str]) -> str:
    """The secret kept at ``path`` (0600), made by ``make`` and written durably where there is none yet.

    Raises ``StartupError`` where others may read the file, or where it is empty or unreadable.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise StartupError(f"{path} can be read by others; run: chmod 600 {path}")
        secret = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        secret = make()
        replace_file(path, secret.encode("ascii") + b"\n")
        return secret
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} cannot be read; restore it from a backup.") from error
    if not secret:
        raise StartupError(f"{path} is empty; restore it from a backup.")
    return secret


class FileLock:
    """An advisory lock on a file: one holder among all threads of all processes; the kernel frees it at death."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread_lock = threading.Lock()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for the lock, hold it for the body of the ``with``."""
        with self._thread_lock, self._descriptor() as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield

    @contextmanager
    def try_hold(self) -> Iterator[bool]:
        """Take the lock if it is free; yields whether it was."""
        if not self._thread_lock.acquire(blocking=False):
            yield False
            return
        try:
            with self._descriptor() as descriptor:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                else:
                    yield True
        finally:
            self._thread_lock.release()

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        # Opened at each use, so that a fork never shares the open file description, and with it the lock.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
