"""Says which files of a backup go where, and what becomes of those that are there."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from config import Settings
from core.errors import BackupRefused, CaKeyUnavailable
from core.failpoints import failpoint
from core.files import fsync_directory
from operations.backup.backup import LEFT_OUT, passphrase_here
from operations.backup.file import Backup
from pki.algorithms import PrivateKey

ROOT_KEY = "root.key.pem"


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


def files_to_place(
    backup: Backup, settings: Settings, *, same: bool
) -> tuple[dict[Path, bytes], list[tuple[Path, Path]]]:
    """The files to write, and those to move aside, with the names under which they are kept.

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
    moves += [path for path in puts if path.exists()]
    return puts, [(path, free_name(path.with_name(f"{path.name}.before-restore"))) for path in moves]


def free_name(path: Path) -> Path:
    """The path, with a number behind it where it is taken."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def replace_database(staged: Path, current: Path, kept: Path | None) -> None:
    """Put a SQLite file, closed, in the place of another, closed, in one step; ``kept`` is a second name for that."""
    _sync(staged)
    if kept is not None:
        os.link(current, kept)
    fsync_directory(current.parent)
    failpoint("restore.linked")
    staged.rename(current)
    fsync_directory(current.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
