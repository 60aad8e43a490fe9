"""Creates the data folder, and says who works on it: several portals beside each other, or one command alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from broker.folder import FOLDER_MODE, broker_group
from config import Settings
from core.errors import PortalRunning, StartupError
from core.files import FileLock, private_folder
from operations.backup import restore_journal

# Shared by each process that has a portal open, held exclusively by a command that replaces its data.
PRESENCE_LOCK = ".portal.lock"
SERVING_LOCK = ".serving.lock"  # of the first of several portals that serve, until it ends


def own_folders(settings: Settings) -> tuple[Path, ...]:
    """Return the folders that only the portal's user may enter."""
    probe_folder = settings.data_dir / "canaries"
    return settings.secrets_dir, settings.ca_dir, settings.tls_dir, settings.ocsp_dir, probe_folder


def make_folders(settings: Settings) -> None:
    """Create the folders with their modes; raise ``StartupError`` if they cannot be written."""
    try:
        # The broker, often another user, must be able to pass through the data folder to its own; it can list nothing.
        private_folder(settings.data_dir, mode=0o711)
        for folder in own_folders(settings):
            private_folder(folder, mode=0o700)
        group = broker_group(settings)
        private_folder(settings.broker_dir, mode=0o700 if group is None else FOLDER_MODE, group=group)
        probe = settings.data_dir / ".writable"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # another process that starts has the same probe
    except OSError as error:
        raise StartupError(
            f"The data folder {settings.data_dir} cannot be written ({error.strerror});"
            " make it writable for this user or set PORTAL_DATA_DIR."
        ) from error


@contextmanager
def shared(settings: Settings) -> Iterator[None]:
    """Work on the data folder beside others; raise ``PortalRunning`` while a command holds it exclusively."""
    make_folders(settings)
    lock = FileLock(settings.data_dir / PRESENCE_LOCK)
    if restore_journal.is_unsettled(settings):
        with lock.try_hold() as free:
            if free:
                restore_journal.settle(settings)
    with lock.try_share() as present:
        if not present:
            raise PortalRunning(f"A backup is being restored to {settings.data_dir}; try again when that has ended.")
        yield


@contextmanager
def exclusive(settings: Settings) -> Iterator[None]:
    """Work on the data folder alone; raise ``PortalRunning`` while any process has a portal open on it."""
    with _without_new_folders(settings), FileLock(settings.data_dir / PRESENCE_LOCK).try_hold() as free:
        if not free:
            raise PortalRunning(f"A portal is running on {settings.data_dir}; stop it first.")
        restore_journal.settle(settings)
        yield


@contextmanager
def _without_new_folders(settings: Settings) -> Iterator[None]:
    """Create the folders; remove those that were missing if the body of the ``with`` fails and leaves them empty."""
    # But for the folder of secrets, into which who restores may be asked to put the passphrase.
    folders = {*own_folders(settings), settings.broker_dir} - {settings.secrets_dir}
    missing = [path for path in folders if not path.exists()]
    make_folders(settings)
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise
