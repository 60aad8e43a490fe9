"""Durable files: atomic replacement, private modes, locks between processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from core.errors import LockUnavailable, StartupError

LOCK_SECONDS = 60.0
LOOK_SECONDS = 1.0  # a worker that serves from a file looks for a newer one if its last look is older than this
# Who waits for less time polls: a lock that is not there in time should be nobody's then, and not that of a thread that
# has to release it.
PATIENT_SECONDS = 1.0
_FIRST_PAUSE, _MAX_PAUSE = 0.00005, 0.005


def fsync_directory(folder: Path) -> None:
    """Sync a directory: without that a rename in it is not durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """Return a temporary path beside ``path`` that contains the process id, which ``remove_leftovers`` looks at."""
    return path.with_name(f".{path.name[-100:]}.{os.getpid()}.{secrets.token_hex(6)}.tmp")


def remove_leftovers(folder: Path, *, alone: bool = False) -> list[Path]:
    """Remove and return the temporary files of processes that were killed; they may contain keys.

    ``alone`` if no process writes there now: in a container the next one has the same number as the one before.
    """
    removed = []
    for path in folder.glob(".*.tmp"):
        name = re.fullmatch(r"\..+\.([0-9]+)\.[0-9a-f]{12}\.tmp", path.name)
        if name is not None and (alone or not _is_alive(int(name[1]))):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"  # a zombie has ended


def access_problem(path: Path, mode: int, group: int | None, *, folder: bool = False) -> str | None:
    """Return what is wrong with a file's presence, kind, mode or group (``None``: any), as a sentence, or ``None``.

    A link is not followed: it is no regular file, and no folder.
    """
    try:
        status = path.lstat()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    if (
        stat.S_IFMT(status.st_mode) != (stat.S_IFDIR if folder else stat.S_IFREG)
        or stat.S_IMODE(status.st_mode) != mode
    ):
        return f"{path} is not a {'folder' if folder else 'regular file'} with mode 0{mode:o}."
    if group is not None and status.st_gid != group:
        return f"{path} is not in the broker's group."
    return None


def replace_file(path: Path, content: bytes, *, mode: int = 0o600, group: int | None = None) -> None:
    """Replace a file atomically and durably: temporary file, fsync, rename, fsync of the folder.

    Readers see the old file or the new one, never a part. The mode and the group are set before any content is
    written, so a secret is never readable to others. On ``OSError`` the old file is unchanged.
    """
    temporary = temporary_beside(path)
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
    """Create a folder if it is missing, and set its mode, and its group if given, if they differ."""
    path.mkdir(mode=mode & 0o777, parents=True, exist_ok=True)
    if group is not None and path.stat().st_gid != group:
        os.chown(path, -1, group)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)  # only if it differs: a confined service may not set some bits even to their present value
    return path


def folder_number(folder: Path) -> int:
    """Return a number of 31 bits that tells a folder from any other, and from a copy of it.

    It is made of a file in the folder, ``.folder-id``, which the first call writes: of what is in it, at random, and of
    its inode number. Raises ``StartupError`` if the file can neither be read nor written.
    """
    path = folder / ".folder-id"
    try:
        if not path.exists():
            _write_once(path, secrets.token_hex(16).encode("ascii"))
        text = f"{path.read_text(encoding='ascii')} {path.stat().st_ino}"
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} cannot be read or written; make it accessible, or remove it.") from error
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:4], "big") >> 1


def _write_once(path: Path, content: bytes) -> None:
    """Write a file unless there is one, also where another process does so at the same time."""
    temporary = temporary_beside(path)
    temporary.touch(mode=0o600, exist_ok=False)
    try:
        temporary.write_bytes(content)
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def secret_file(path: Path, make: Callable[[], str]) -> str:
    """Return the secret in the file ``path`` (mode 0600); if there is no file, write the result of ``make`` to it.

    Raises ``StartupError`` if others may read the file, or if it is empty or unreadable.
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


_HELD_ELSEWHERE = "Timed out waiting for {}: another process of the portal holds it, or is stopped."


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LockUnavailable(f"{path} cannot be opened ({error.strerror}); check its disk.") from error


class _Waiter:
    """Waits in the kernel for the lock on a file, by a thread of its own, since flock(2) has no timeout.

    The kernel wakes it at once, while one who polls has to wake again and again, and takes the interpreter from others
    each time. A lock that comes too late is released as soon as it is there; until then nobody else can wait here.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._wanted = threading.Semaphore(0)
        self._taken = threading.Semaphore(0)
        self._descriptor: int | None = None  # of the open file whose lock is waited for
        self._too_late = False
        threading.Thread(target=self._run, name="lock", daemon=True).start()

    def wait(self, descriptor: int, timeout: float) -> bool:
        """Return whether the lock was taken in time; ``False`` at once while one is waited for that comes too late."""
        with self._lock:
            if self._descriptor is not None:
                return False
            self._descriptor = os.dup(descriptor)  # whoever waits may close the other one
        self._wanted.release()
        if self._taken.acquire(timeout=timeout):
            return True
        with self._lock:
            self._too_late = self._descriptor is not None
            if self._too_late:
                return False
        return self._taken.acquire()  # it has come just now

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            descriptor = self._descriptor
            if descriptor is None:
                raise RuntimeError("a lock is waited for, and no file is there")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with self._lock:
                os.close(descriptor)
                self._descriptor, is_wanted, self._too_late = None, not self._too_late, False
            if is_wanted:
                self._taken.release()


def _poll(descriptor: int, deadline: float, path: Path) -> None:
    pause = _FIRST_PAUSE
    while not _taken(descriptor):
        if time.monotonic() >= deadline:
            raise LockUnavailable(_HELD_ELSEWHERE.format(path))
        time.sleep(pause)
        pause = min(pause * 1.05, _MAX_PAUSE)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class FileLock:
    """An advisory lock on a file, held by one thread of one process; the kernel releases it when the process ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread_lock = threading.Lock()
        self._held = False  # whether the holder of the thread lock also holds the lock on the file
        self._waiter: _Waiter | None = None  # made at need

    def hold(self, timeout: float = LOCK_SECONDS) -> AbstractContextManager[bool]:
        """Wait for the lock and hold it for the body of the ``with``.

        Raises ``LockUnavailable`` if it is not free within ``timeout`` seconds (its holder may be stopped), or if its
        file cannot be opened.
        """
        return self.hold_unless(lambda: False, timeout)

    @contextmanager
    def hold_unless(self, done: Callable[[], bool], timeout: float) -> Iterator[bool]:
        """Hold the lock as ``hold`` does; yield whether it is held, and not ``done`` once the threads before have.

        Those then need not wait for other processes.
        """
        deadline = time.monotonic() + timeout
        if not self._thread_lock.acquire(timeout=timeout):
            if not self._held:  # the thread in front of this one waits for another process
                raise LockUnavailable(_HELD_ELSEWHERE.format(self._path))
            raise LockUnavailable(f"Timed out waiting for {self._path}: the portal is busy; try again shortly.")
        try:
            if done():
                yield False
                return
            with self._descriptor() as descriptor:
                self._take(descriptor, deadline)
                self._held = True
                try:
                    yield True
                finally:
                    self._held = False
        finally:
            self._thread_lock.release()

    def _take(self, descriptor: int, deadline: float) -> None:
        if _taken(descriptor):
            return
        if (timeout := deadline - time.monotonic()) >= PATIENT_SECONDS:
            if self._waiter is None or self._waiter.process != os.getpid():  # a forked process has no such thread
                self._waiter = _Waiter()
            if self._waiter.wait(descriptor, timeout):
                return
        _poll(descriptor, deadline, self._path)

    @contextmanager
    def try_hold(self) -> Iterator[bool]:
        """Take the lock if it is free; yields whether it was. Raises ``LockUnavailable`` if its file is unusable."""
        if not self._thread_lock.acquire(blocking=False):
            yield False
            return
        try:
            with self._try(fcntl.LOCK_EX) as free:
                yield free
        finally:
            self._thread_lock.release()

    def try_share(self) -> AbstractContextManager[bool]:
        """Share the lock with other holders, unless one holds it exclusively; yields whether that was possible."""
        return self._try(fcntl.LOCK_SH)

    @contextmanager
    def _try(self, kind: int) -> Iterator[bool]:
        with self._descriptor() as descriptor:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        # Opened at each use, so that a forked process never inherits the open file description and with it the lock.
        descriptor = _open(self._path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def is_owned(path: Path) -> bool:
    """Return whether another process has locked a file by ``own_until_exit``."""
    descriptor = _open(path)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    finally:
        os.close(descriptor)  # and with it the lock
    return False


def own_until_exit(path: Path) -> bool:
    """Lock a file for this process until it ends, in whatever way; returns whether it was free.

    Forked processes do not inherit the lock. Raises ``LockUnavailable`` if the file cannot be opened.
    """
    descriptor = _open(path)  # stays open
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return False
    return True
