"""A cfssl that makes keys and signs certificates with its SQLite store, to measure the portal beside."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.harness import STOP_SECONDS, cpu_seconds
from tests.support.ports import free_port

# The tables that cfssl's own migrations make (certdb/sqlite of its source); Debian's package does not bring them.
SCHEMA = """
CREATE TABLE certificates (
    serial_number blob NOT NULL, authority_key_identifier blob NOT NULL, ca_label blob, status blob NOT NULL,
    reason int, expiry timestamp, revoked_at timestamp, pem blob NOT NULL, issued_at timestamp, not_before timestamp,
    metadata text, sans text, common_name text, PRIMARY KEY (serial_number, authority_key_identifier));
CREATE TABLE ocsp_responses (
    serial_number blob NOT NULL, authority_key_identifier blob NOT NULL, body blob NOT NULL, expiry timestamp,
    PRIMARY KEY (serial_number, authority_key_identifier),
    FOREIGN KEY (serial_number, authority_key_identifier)
        REFERENCES certificates (serial_number, authority_key_identifier));
"""
KEY = {"algo": "ecdsa", "size": 256}


def cfssl_version() -> str | None:
    """Return the version of the cfssl that is installed, if one is."""
    if not shutil.which("cfssl"):
        return None
    said = subprocess.run(["cfssl", "version"], capture_output=True, text=True, check=True).stdout
    return said.partition("\n")[0].removeprefix("Version:").strip()


class Cfssl:
    """``cfssl serve`` on plain HTTP, with a CA of its own in ``folder``: no bundle, no ACL, no audit record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self.access = {"PORTAL_URL": f"http://127.0.0.1:{self._port}", "PORTAL_TOKEN": ""}

    def __enter__(self) -> Self:
        self._folder.mkdir()
        self._make_ca()
        with contextlib.closing(sqlite3.connect(self._folder / "certs.db")) as database:
            database.executescript(SCHEMA)
        # By default it answers "database is locked" after 5 s, and under load some requests wait that long.
        source = "file:certs.db?_busy_timeout=60000"
        (self._folder / "db.json").write_text(json.dumps({"driver": "sqlite3", "data_source": source}))
        profile = {"expiry": "8760h", "usages": ["digital signature", "client auth"]}
        (self._folder / "config.json").write_text(json.dumps({"signing": {"default": profile}}))
        command = ["cfssl", "serve", "-ca", "ca.pem", "-ca-key", "ca-key.pem", "-config", "config.json"]
        command += ["-db-config", "db.json", "-port", str(self._port), "-loglevel", "5"]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while not self._answers():
            if time.monotonic() > deadline:
                self._stop()
                sys.exit(f"cfssl did not start:\n{(self._folder / 'log').read_text()}")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def racer(self, *, csr: bool) -> list[str]:
        """Return what ``bench/client.py`` needs: a new key with its certificate, or the certificate for a new CSR."""
        path = "sign" if csr else "newcert"
        request = {"CN": "3f2b8c1e-5a4d-4e6f-8a9b-0c1d2e3f4a5b", "key": KEY, "names": []}
        file = self._folder / f"{path}.json"
        file.write_text(json.dumps({} if csr else {"request": request}))
        options = ["--csr", "certificate_request"] if csr else []
        return ["--path", f"/api/v1/cfssl/{path}", "--body", str(file), "--status", "200", *options]

    def cpu_seconds(self) -> float:
        """Processor time that it has used until now."""
        assert self._process is not None
        return cpu_seconds(self._process.pid)

    def _make_ca(self) -> None:
        request = json.dumps({"CN": "bench", "key": KEY}).encode()
        made = subprocess.run(
            ["cfssl", "genkey", "-initca", "-"], input=request, cwd=self._folder, check=True, capture_output=True
        )
        for name, text in zip(("ca.pem", "ca-key.pem"), map(json.loads(made.stdout).get, ("cert", "key")), strict=True):
            (self._folder / name).write_text(str(text))

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.access['PORTAL_URL']}/", timeout=1):  # noqa: S310 - http, as above
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(STOP_SECONDS)
