"""Puts the files of a backup in place, in a way that can be taken back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from backup import LEFT_OUT, passphrase_here
from backup_file import Backup
from ca_algorithms import PrivateKey
from config import Settings
from errors import BackupRefused, CaKeyUnavailable
from files import fsync_directory, replace_file

ROOT_KEY = "root.key.pem"
_SQLITE_FILES = ("", "-wal", "-shm")


def key_of(backup: Backup, settings: Settings) -> tuple[PrivateKey, bool]:
    """The CA key that sealed a backup, opened with the passphrase here, and whether it is this data folder's own.

    Raises ``CaKeyUnavailable`` where the passphrase opens neither the key here nor the one in the backup,
    ``BackupRefused`` where the backup was changed after it was made.
    """
    passphrase = passphrase_here(settings)
    name = f"{backup.manifest.sealed_by}.key.pem"
    here = settings.ca_dir / name
    copied = backup.small_files("ca").get(name)
    opened = False
    for content, same in ((here.read_bytes() if here.is_file() else None, True), (copied, False)):
        key = None if content is None else _opened(content, passphrase)
        if key is None:
            continue
        if backup.is_sealed_with(key):
            return key, same
        opened = opened or not same
    if opened:
        raise BackupRefused(f"{backup.path} was changed after it was made; use another backup.")
    raise CaKeyUnavailable(
        "The passphrase here does not open the CA key in the backup: put the passphrase of the backup into"
        f" PORTAL_CA_PASSPHRASE or {settings.secrets_dir / 'ca-passphrase'}."
    )


def _opened(content: bytes, passphrase: bytes) -> PrivateKey | None:
    try:
        key = load_pem_private_key(content, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) else None


def files_to_place(backup: Backup, settings: Settings, *, same: bool) -> tuple[dict[Path, bytes], list[Path]]:
    """The files to write, and those to move aside.

    In a data folder of the same CA (``same``) what is there stays, for it is as new as the copy or newer, and a root
    key that was moved away stays away. In another's everything is the copy's.
    """
    puts: dict[Path, bytes] = {}
    for name, content in backup.small_files("secrets").items():
        path = settings.secrets_dir / name
        if name not in LEFT_OUT and not (same and path.exists()):
            puts[path] = content
    # The keys come last: once they are there, the folder counts as the copy's own.
    for name, content in backup.small_files("ca").items():
        path = settings.ca_dir / name
        if not (same and (path.exists() or name == ROOT_KEY)):
            puts[path] = content
    moves = [] if same else [path for path in settings.ca_dir.glob("*.key.pem") if path not in puts]
    return puts, moves


@contextlib.contextmanager
def placed(puts: Mapping[Path, bytes], moves: Sequence[Path]) -> Iterator[None]:
    """Write files for the body of the ``with``, which makes them stay by ending well; old ones are kept beside."""
    aside: list[tuple[Path, Path]] = []
    written: list[Path] = []
    try:
        for path in [*moves, *(path for path in puts if path.exists())]:
            kept = free_name(path.with_name(f"{path.name}.before-restore"))
            path.rename(kept)
            aside.append((kept, path))
        for path, content in puts.items():
            replace_file(path, content)
            written.append(path)
        yield
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        for kept, path in aside:
            kept.rename(path)
        if isinstance(error, OSError):
            raise BackupRefused(f"The data folder cannot be written: {error.strerror}.") from error
        raise


def free_name(path: Path) -> Path:
    """The path, with a number behind it where it is taken."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def replace_database(staged: Path, current: Path) -> Path | None:
    """Put a SQLite file, closed, in the place of another, closed, in one step; returns where that one is kept."""
    _sync(staged)
    kept = None
    if current.exists():
        kept = free_name(current.with_name(f"{current.name}.before-restore"))
        os.link(current, kept)
        for suffix in _SQLITE_FILES[1:]:  # there only where the old file could not be read and closed
            journal = current.with_name(current.name + suffix)
            if journal.exists():
                journal.rename(kept.with_name(kept.name + suffix))
    fsync_directory(current.parent)
    staged.rename(current)
    fsync_directory(current.parent)
    return kept


def remove_database(path: Path) -> None:
    """Remove a SQLite file with what belongs to it."""
    for suffix in _SQLITE_FILES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
