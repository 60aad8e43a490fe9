"""Checks of the data folder: who may read what, how much room there is."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from broker.files import FILE_MODE, FOLDER_MODE
from operations.doctor.findings import Verdict, problem, together, warning, well
from operations.doctor.subject import Subject

LOW_BYTES, TOO_LOW_BYTES = 1 << 30, 100 << 20


def data_folder(subject: Subject) -> Verdict:
    """The folders' modes and owners, and whether this is the user who should look."""
    settings = subject.settings
    if not settings.data_dir.is_dir():
        return problem(
            f"There is no {settings.data_dir}.", "Set PORTAL_DATA_DIR to the portal's folder, or run: flask init."
        )
    owner = settings.data_dir.stat().st_uid
    folders = {
        settings.data_dir: {0o711, 0o700},
        settings.secrets_dir: {0o700},
        settings.ca_dir: {0o700},
        settings.tls_dir: {0o700},
        settings.ocsp_dir: {0o700},
        settings.data_dir / "canaries": {0o700},
        settings.broker_dir: {FOLDER_MODE, 0o700},
    }
    found = []
    if os.geteuid() != owner:
        name = _user(owner)
        found.append(warning(f"The data folder belongs to {name}.", f"Run this as {name}: other checks depend on it."))
    for path, modes in folders.items():
        if not path.is_dir():
            found.append(problem(f"{path} is missing.", "Start the portal, which makes it."))
            continue
        status = path.lstat()
        if stat.S_IMODE(status.st_mode) not in modes:
            wanted = f"{min(modes, key=lambda mode: mode != 0o700) if len(modes) == 1 else max(modes):o}"
            found.append(
                problem(f"{path} has mode {stat.S_IMODE(status.st_mode):o}, not {wanted}.", f"chmod {wanted} {path}")
            )
        if status.st_uid != owner and path != settings.broker_dir:
            found.append(problem(f"{path} belongs to {_user(status.st_uid)}.", f"chown {_user(owner)} {path}"))
    return together(found, f"{settings.data_dir} with its folders is as it should be.")


def secret_files(subject: Subject) -> Verdict:
    """The files that nobody else may read."""
    settings = subject.settings
    owner = settings.data_dir.stat().st_uid
    found, count = [], 0
    for path in _secret_paths(subject):
        count += 1
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            found.append(problem(f"{path} is not a plain file.", "See who put it there."))
        elif status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            found.append(
                problem(f"{path} has mode {mode:o}, not 600.", f"Treat it as seen by others, then: chmod 600 {path}")
            )
        elif status.st_uid != owner:
            found.append(problem(f"{path} belongs to {_user(status.st_uid)}.", f"chown {_user(owner)} {path}"))
    key = settings.broker_file("server.key")
    if key.exists() and stat.S_IMODE(key.lstat().st_mode) & ~FILE_MODE:
        found.append(problem(f"{key} can be read by others.", f"Treat it as seen by others, then: chmod 640 {key}"))
    return together(found, f"{count} files of keys and secrets can be read by their owner alone.")


def _secret_paths(subject: Subject) -> Iterator[Path]:
    settings = subject.settings
    probes = settings.data_dir / "canaries"
    for folder in (settings.secrets_dir, settings.ca_dir, settings.tls_dir, settings.ocsp_dir, probes):
        if folder.is_dir():
            yield from sorted(folder.iterdir())
    yield from sorted(settings.data_dir.glob("before-restore.backup*"))
    environment = settings.data_dir / "operator.env"
    if environment.exists():
        yield environment
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite":
        database = Path(url.database or "")
        yield from sorted(database.parent.glob(f"{database.name}*"))


def disk_space(subject: Subject) -> Verdict:
    """Room where the portal and the broker write."""
    folders = {subject.settings.data_dir, subject.settings.broker_dir}
    free = {folder: shutil.disk_usage(folder).free for folder in folders if folder.is_dir()}
    if not free:
        return problem("There is no data folder.", "See above.")
    folder, least = min(free.items(), key=lambda item: item[1])
    said = f"{least // (1 << 20)} MiB are free in {folder}."
    advice = "Make room: without it neither a registration nor a revocation can be recorded."
    if least < TOO_LOW_BYTES:
        return problem(said, advice)
    return warning(said, advice) if least < LOW_BYTES else well(said)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
