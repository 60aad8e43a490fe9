"""Keeps what an import has brought, so that it goes on where it stopped."""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from commands.errors import CheckFailed, Misused
from commands.files import Folder, NewFile, reason, replace_file, write_new

STATE, RESULTS, BUNDLES, CERTIFICATES = "import.json", "results.csv", "bundles", "certificates"
COLUMNS = (
    "line", "external_id", "name", "result", "device_id", "fingerprint", "serial_number", "expires_at",
    "download_url", "download_expires_at", "bundle_password", "code", "detail",
)  # fmt: skip
DONE = ("registered", "repeated")


class Results:
    """The folder of an import: ``results.csv`` (0600) with a row for each device, and what belongs to it."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Make the folder, or go on in it; raises ``CheckFailed``, and ``Misused`` where it is another file's."""
        self.folder = Folder(folder, (), force=True).path
        self.path = self.folder / RESULTS
        self.done: set[str] = set()
        state = self._state(fingerprint)
        self._prefix = state["prefix"]
        self._file: TextIO | None = None

    def _state(self, fingerprint: str) -> dict[str, str]:
        path = self.folder / STATE
        if not os.path.lexists(path):
            if os.path.lexists(self.path):
                raise CheckFailed(f"{self.folder} holds a {RESULTS} of something else; choose another folder.")
            state = {"file_sha256": fingerprint, "prefix": secrets.token_hex(8)}
            write_new(path, NewFile(json.dumps(state).encode(), 0o600), force=False)
            return state
        try:
            state = json.loads(path.read_bytes())
            state = {name: str(state[name]) for name in ("file_sha256", "prefix")}
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckFailed(f"{path} is damaged; choose another folder.") from None
        if state["file_sha256"] != fingerprint:
            raise Misused(
                f"{self.folder} holds the import of another file, or of this one before it was changed.",
                hints=["Choose another folder; devices with an external_id are made only once anyhow."],
            )
        return state

    def external_id(self, line: int) -> str:
        """The id of a row that has none of its own: always the same for the same line."""
        return f"import-{self._prefix}-{line}"

    def __enter__(self) -> Self:
        """Read what is there, leaving out what failed, and open the file to add to it."""
        try:
            if os.path.lexists(self.path):
                self._file = self._rewrite()
            else:
                self._file = _open(self.path)
                csv.writer(self._file).writerow(COLUMNS)
        except OSError as error:
            raise CheckFailed(f"{self.path} cannot be written: {reason(error)}.") from None
        return self

    def _rewrite(self) -> TextIO:
        fresh = self.path.with_name(f".{RESULTS}.{secrets.token_hex(6)}.tmp")
        file = _open(fresh)
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in self.rows():
            if row["result"] in DONE:
                self.done.add(row["external_id"])
                writer.writerow([row[name] for name in COLUMNS])
        file.flush()
        os.fsync(file.fileno())
        os.replace(fresh, self.path)
        return file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None  # the rows can still be read

    def add(self, line: int, external_id: str, name: str, answer: Mapping[str, Any]) -> None:
        """Write down the answer to a row."""
        if self._file is None:
            raise CheckFailed(f"{self.path} is not open.")
        row = {column: str(answer.get(column) or "") for column in COLUMNS}
        failed = "device_id" not in answer
        row |= {"line": str(line), "external_id": external_id, "name": name}
        row["result"] = "failed" if failed else "repeated" if answer.get("repeated") else "registered"
        try:
            if isinstance(answer.get("chain"), str):
                self._keep_certificate(str(answer["device_id"]), answer["chain"])
            csv.writer(self._file).writerow([row[column] for column in COLUMNS])
        except OSError as error:
            raise CheckFailed(f"{self.path} cannot be written: {reason(error)}.") from None
        if not failed:
            self.done.add(external_id)

    def _keep_certificate(self, device_id: str, chain: str) -> None:
        if not _is_id(device_id):
            raise CheckFailed("The portal's answer holds a device_id that is none.")
        folder = self.folder / CERTIFICATES
        folder.mkdir(mode=0o700, exist_ok=True)
        replace_file(folder / f"{device_id}.pem", chain.encode(), mode=0o644)

    def rows(self) -> Iterator[dict[str, str]]:
        """Every whole row of the file."""
        if self._file is not None:
            self._file.flush()
        with self.path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if None not in row and all(isinstance(value, str) for value in row.values()):  # else it was cut off
                    yield row

    def bundle_path(self, device_id: str, content: bytes) -> Path:
        """Where the bundle of a device goes, in a folder of mode 0700: a ZIP, or else a PKCS#12 file."""
        return self._bundles(device_id) / f"{device_id}{'.zip' if content.startswith(b'PK') else '.p12'}"

    def has_bundle(self, device_id: str) -> bool:
        """Whether the bundle of a device is here."""
        folder = self._bundles(device_id)
        return any((folder / f"{device_id}{suffix}").exists() for suffix in (".zip", ".p12"))

    def _bundles(self, device_id: str) -> Path:
        if not _is_id(device_id):
            raise CheckFailed(f"{self.path} holds a device_id that is none.")
        folder = self.folder / BUNDLES
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder


def _is_id(text: str) -> bool:
    return len(text) == 36 and all(letter in "0123456789abcdef-" for letter in text)


def _open(path: Path) -> TextIO:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    return open(descriptor, "w", encoding="utf-8", newline="")
