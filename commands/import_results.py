"""The folder of an import: what became of each row, bundles and certificates."""

from __future__ import annotations

import csv
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from commands.errors import CheckFailed
from commands.files import Folder, defused, replace_file, undefused, writing

RESULTS, BUNDLES, CERTIFICATES = "results.csv", "bundles", "certificates"
STATE = "import.json"  # of imports whose rows had ids by their line
COLUMNS = (
    "line", "external_id", "name", "result", "device_id", "fingerprint", "serial_number", "expires_at",
    "download_url", "download_expires_at", "bundle_password", "code", "detail",
)  # fmt: skip
GIVEN = ("external_id", "name", "code", "detail")  # texts that come from the file or the answer
DONE = ("registered", "repeated")


class Results:
    """The folder of an import: ``results.csv`` (0600) with a row for each device, bundles and certificates."""

    def __init__(self, folder: Path) -> None:
        """Create the folder or continue in it; raises ``CheckFailed`` if it contains something else."""
        self.folder = Folder(folder, (), force=True).path
        self.path = self.folder / RESULTS
        self.done: set[str] = set()
        self._file: TextIO | None = None
        if os.path.lexists(self.folder / STATE):
            raise CheckFailed(
                f"{self.folder} was begun by an earlier version of this command; choose another folder.",
                hints=["Leave out the rows that its results.csv has as registered, unless they have an external_id."],
            )
        if os.path.lexists(self.path):
            self.done = {undefused(row["external_id"]) for row in self.rows() if row["result"] in DONE}

    def __enter__(self) -> Self:
        """Open the file to add results; keeps earlier results except failures."""
        with writing(self.path):
            if os.path.lexists(self.path):
                self._file = self._rewrite()
            else:
                self._file = _open(self.path)
                csv.writer(self._file).writerow(COLUMNS)
        return self

    def _rewrite(self) -> TextIO:
        fresh = self.path.with_name(f".{RESULTS}.{secrets.token_hex(6)}.tmp")
        file = _open(fresh)
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in self.rows():
            if row["result"] in DONE:
                writer.writerow([row[name] for name in COLUMNS])
        file.flush()
        os.fsync(file.fileno())
        os.replace(fresh, self.path)
        return file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None  # the rows can still be read

    def sync(self) -> None:
        """Make durable what was added; raises ``CheckFailed``."""
        if self._file is not None:
            with writing(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def add(self, line: int, external_id: str, name: str, answer: Mapping[str, Any]) -> None:
        """Add the answer to a row."""
        if self._file is None:
            raise CheckFailed(f"{self.path} is not open.")
        row = {column: str(answer.get(column) or "") for column in COLUMNS}
        failed = "device_id" not in answer
        row |= {"line": str(line), "external_id": external_id, "name": name}
        row["result"] = "failed" if failed else "repeated" if answer.get("repeated") else "registered"
        with writing(self.path):
            if isinstance(answer.get("chain"), str):
                self._keep_certificate(str(answer["device_id"]), answer["chain"])
            csv.writer(self._file).writerow([defused(row[name]) if name in GIVEN else row[name] for name in COLUMNS])
        if not failed:
            self.done.add(external_id)

    def _keep_certificate(self, device_id: str, chain: str) -> None:
        if not _is_id(device_id):
            raise CheckFailed("The portal's answer contains an invalid device_id.")
        folder = self.folder / CERTIFICATES
        folder.mkdir(mode=0o700, exist_ok=True)
        replace_file(folder / f"{device_id}.pem", chain.encode(), mode=0o644)

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield every complete row of the file."""
        if self._file is not None:
            self._file.flush()
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or COLUMNS) != COLUMNS:
                raise CheckFailed(f"{self.path} is not one of an import; choose another folder.")
            for row in reader:
                if None not in row and all(isinstance(value, str) for value in row.values()):  # else it was truncated
                    yield row

    def bundle_path(self, device_id: str, content: bytes) -> Path:
        """Return the path for the bundle of a device, a ZIP or a PKCS#12 file, in a folder of mode 0700."""
        folder = self._bundles(device_id)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{device_id}{'.zip' if content.startswith(b'PK') else '.p12'}"

    def has_credentials(self, device_id: str) -> bool:
        """Return whether the folder has the bundle of a device, or the certificate for its own key."""
        return self.has_bundle(device_id) or (self.folder / CERTIFICATES / f"{device_id}.pem").exists()

    def has_bundle(self, device_id: str) -> bool:
        """Return whether the bundle of a device was downloaded."""
        folder = self._bundles(device_id)
        return any((folder / f"{device_id}{suffix}").exists() for suffix in (".zip", ".p12"))

    def _bundles(self, device_id: str) -> Path:
        if not _is_id(device_id):
            raise CheckFailed(f"{self.path} contains an invalid device_id.")
        return self.folder / BUNDLES


def _is_id(text: str) -> bool:
    return len(text) == 36 and all(letter in "0123456789abcdef-" for letter in text)


def _open(path: Path) -> TextIO:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    return open(descriptor, "w", encoding="utf-8", newline="")
