"""The folder of the broker's files: replaced atomically, recorded, checked for damage."""

from __future__ import annotations

import contextlib
import grp
import hashlib
import json
import math
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from broker.ca_certificates import issuing_cas
from broker.capath import FILE_MODE, CaFolder
from broker.crl import CheckedCrl, CrlWindow, Trust, read_window, validate_crl
from broker.process import started_at
from broker.session import connect_unix
from config import Settings
from core.broker_control import RECORD_FILE, ControlKind
from core.errors import BrokerUnavailable, ProjectionInvalid, SettingInvalid
from core.failpoints import failpoint
from core.files import FileLock, access_problem, fsync_directory, private_folder, replace_file, temporary_beside

CRL_FILE, CA_FILE, CA_FOLDER = "crl.pem", "ca.pem", "capath"
CRLS_READ = "crls"  # in the record
SERVER_CERTIFICATE_FILE, SERVER_KEY_FILE = "server.pem", "server.key"
# The broker, as another user, creates its socket, pid file and database here, so its group may write. Set-group-id
# gives those its group; the sticky bit keeps it from replacing the portal's files.
FOLDER_MODE = 0o3770
_MAX_RECORD_BYTES = 16_384


_NEVER = CrlWindow(datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC))


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file as it was when last read."""

    signature: tuple[int, ...]
    digest: str
    window: CrlWindow | None


class BrokerFolder:
    """The files of ``settings.broker_dir`` that the portal writes for the broker, whatever its control.

    A control adds those of its own by ``_RECORDED`` and ``_other_damage``.
    """

    _RECORDED: tuple[str, ...] = (CA_FILE, CRL_FILE)  # the files whose digests are recorded

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        self._settings = settings
        self._clock = clock
        self._group = broker_group(settings)
        self._ca_folder = CaFolder(settings.broker_file(CA_FOLDER), self._group)
        self._stated: tuple[tuple[int, ...], Any] = ((), None)  # the record as it was when last read
        self._paths: dict[str, Path] = {}  # of its files
        self._seen: dict[str, _Seen] = {}
        self._password: tuple[tuple[int, ...], str] = ((), "")  # as it was when last read
        self._checked: tuple[str, CrlWindow] = ("", _NEVER)  # the CRLs checked last, by the digest of CRLs and CAs
        self._checked_crls: dict[bytes, CheckedCrl] = {}  # the CRLs that were checked last
        self._windows: dict[bytes, CrlWindow] = {}  # of the CRLs that were read last
        self._lock = threading.Lock()

    def _check(self, generation: int, trust: Trust) -> None:
        """Raise ``ProjectionInvalid`` if the broker must not get ``trust``, or not as of ``generation``.

        The CRLs are checked completely if they are not those checked last, and always that they are current.
        """
        if not 0 <= generation < 1 << 63:
            raise ProjectionInvalid("A generation must be a whole number that is not negative.")
        digest = hashlib.sha256(hashlib.sha256(trust.ca).digest() + trust.crl).hexdigest()
        seen, window = self._checked
        if digest != seen or window.problem(self._clock()):
            self._checked = (digest, self._validate(trust))

    def _validate(self, trust: Trust) -> CrlWindow:
        return validate_crl(trust.crl, issuing_cas(trust.ca), self._clock(), self._checked_crls)

    def _check_order(self, generation: int) -> None:
        """Raise ``ProjectionInvalid`` if a newer generation is installed."""
        installed = self.installed_generation()
        if installed is not None and installed > generation:
            raise ProjectionInvalid(
                f"The broker's files are of generation {installed}, newer than {generation}:"
                " the database is older than they are, so revocations may be missing from it."
            )

    def _write(self, generation: int, contents: Mapping[str, bytes], stated: Mapping[str, object]) -> None:
        """Write the recorded files, those that already have the content excepted, and the record.

        Recorded files that are not in ``contents`` stay as they are. ``stated`` is what the record says besides. Raise
        ``BrokerUnavailable`` if a file cannot be written; then no file is changed. One process at a time: the caller
        holds the lock.
        """
        _, before = self._record() or (0, {})
        new = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        digests = {**{name: before[name] for name in self._RECORDED if name in before}, **new}
        record = json.dumps({**stated, "generation": generation, "sha256": digests}, indent=1) + "\n"
        with self._lock:
            changed = {
                name: content
                for name, content in contents.items()
                if self._file_problem(name) is not None or self._digest(name) != digests[name]
            }
            self._replace({**changed, RECORD_FILE: record.encode()})
            for name, content in changed.items():
                window = self._checked[1] if name == CRL_FILE else None
                self._remember(name, digests[name], window, len(content))

    def installed_generation(self) -> int | None:
        """Return the generation recorded with the files, or ``None`` without a readable record."""
        record = self._record()
        return record[0] if record else None

    def damage(self) -> list[str]:
        """Return a sentence for each file that is not as it was installed, or whose CRL is not current.

        A file is read again only if its inode, size or times changed since it was last read.
        """
        record = self._record()
        if record is None:
            return [f"{self._path(RECORD_FILE)} is missing or unreadable."]
        generation, digests = record
        with self._lock:
            problems = [self._file_damage(name, digests.get(name), generation) for name in self._RECORDED]
        others = [self._other_damage(), self._live_problem()]
        return [problem for problem in [*problems, *others] if problem is not None]

    def _other_damage(self) -> str | None:
        """Return what is wrong with files that are not recorded."""
        return None

    def _live_problem(self) -> str | None:
        """Return what is wrong with what the running broker reads by itself."""
        return self._ca_folder.problem()

    def publish(self, trust: Trust) -> bool:
        """Give CRLs and CAs to the running broker, which obeys from the next handshake on; see ``CaFolder.publish``."""
        try:
            connect_unix(self._settings.broker_socket, time.monotonic() + 1).close()
        except (FileNotFoundError, ConnectionRefusedError):
            self._ca_folder.compact()  # certainly no broker runs that has counted the CRLs there
        except OSError:
            pass
        return self._ca_folder.publish(trust)

    def crl_bytes(self) -> int:
        """Return how many bytes of CRLs, in PEM, the running broker was given, which keeps them until it ends."""
        try:
            started, count = self.stated()[CRLS_READ]
        except (KeyError, TypeError, ValueError):
            return 0
        return count if started == started_at(self._settings) and type(count) is int else 0

    def seconds_since_crl(self) -> float:
        """Return how long ago the CRLs for the broker's next start were written, by any process."""
        try:
            return abs(time.time() - self._path(CRL_FILE).stat().st_mtime)
        except OSError:
            return math.inf

    def with_crls_read(self, trust: Trust) -> dict[str, Any]:
        """Return what the record says of ``crl_bytes`` once ``trust`` was published."""
        return {CRLS_READ: [started_at(self._settings), self.crl_bytes() + len(trust.crl)]}

    def write_server_certificate(self, chain: bytes, key: bytes) -> bool:
        """Write the broker's own certificate with its issuers (PEM) and private key (PEM, PKCS#8, not encrypted).

        Return whether anything changed: then the broker has to be reloaded. Raise ``ProjectionInvalid`` if they do not
        belong together, ``BrokerUnavailable`` if they cannot be written.
        """
        try:
            certificate = x509.load_pem_x509_certificates(chain)[0]
            matches = load_pem_private_key(key, None).public_key() == certificate.public_key()
        except (ValueError, TypeError) as error:
            raise ProjectionInvalid("The broker's certificate or key cannot be read.") from error
        if not matches:
            raise ProjectionInvalid("The broker's key is not the one of its certificate.")
        contents = {SERVER_CERTIFICATE_FILE: chain, SERVER_KEY_FILE: key}
        with self._lock:
            same = [
                self._file_problem(name) is None and self._path(name).read_bytes() == contents[name]
                for name in contents
            ]
            if all(same):
                return False
            self._replace(contents)
        return True

    def password(self) -> str:
        """Return the portal's password on the internal listener, 256 bits, created at first use."""
        path = self._settings.secrets_dir / "broker-password"
        try:
            signature, password = self._password
            with contextlib.suppress(FileNotFoundError):
                if signature and signature_of(path.stat()) == signature:
                    return password
            if not path.exists():
                private_folder(path.parent)
                with FileLock(path.with_name("broker-password.lock")).hold():
                    if not path.exists():
                        replace_file(path, secrets.token_urlsafe(32).encode())
            signature, password = signature_of(path.stat()), path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BrokerUnavailable(f"{path} cannot be used; give it to the portal's user, mode 0600.") from error
        if not re.fullmatch(r"[A-Za-z0-9_-]{43,}", password):
            raise BrokerUnavailable(f"{path} does not contain a password of the portal; remove it to get a new one.")
        self._password = signature, password
        return password

    def _path(self, name: str) -> Path:
        if (path := self._paths.get(name)) is None:
            path = self._paths[name] = self._settings.broker_dir / name
        return path

    def _replace(self, contents: Mapping[str, bytes]) -> None:
        """Replace several files; none is changed before all are on the disk under another name."""
        staged = {name: temporary_beside(self._path(name)) for name in contents}
        path = self._settings.broker_dir
        try:
            self._make_folder()
            for name, content in contents.items():
                path = staged[name]
                replace_file(path, content, mode=FILE_MODE, group=self._group)
            failpoint("install.staged")
            for name in contents:
                path = self._path(name)
                staged[name].rename(path)
                failpoint("install.renamed")
            fsync_directory(path.parent)
        except OSError as error:
            raise BrokerUnavailable.unwritable(path, error) from error
        finally:
            for path in staged.values():
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _make_folder(self) -> None:
        folder = self._settings.broker_dir
        if not folder.exists():
            private_folder(folder, mode=0o700 if self._group is None else FOLDER_MODE, group=self._group)
        elif self._group is not None:
            status = folder.stat()
            ours = status.st_uid == os.geteuid()  # else the operator created it and chose its mode
            if ours and (status.st_gid, stat.S_IMODE(status.st_mode)) != (self._group, FOLDER_MODE):
                private_folder(folder, mode=FOLDER_MODE, group=self._group)

    def stated(self) -> Mapping[str, Any]:
        """Return what the record says, empty if it is missing or unreadable; it is read again if it has changed."""
        path = self._path(RECORD_FILE)
        try:
            signature, stated = self._stated
            if signature_of(path.stat()) != signature:
                with path.open("rb") as file:
                    signature, stated = signature_of(os.fstat(file.fileno())), json.loads(file.read(_MAX_RECORD_BYTES))
                self._stated = signature, stated
        except (OSError, ValueError):
            return {}
        return stated if isinstance(stated, dict) else {}

    def _record(self) -> tuple[int, dict[str, str]] | None:
        record = self.stated()
        generation, digests = record.get("generation"), record.get("sha256")
        if type(generation) is not int or not isinstance(digests, dict):
            return None
        return generation, digests

    def _file_problem(self, name: str) -> str | None:
        """Return what is wrong with a file's presence, mode or group, or ``None``."""
        return access_problem(self._path(name), FILE_MODE, self._group)

    def _read(self, name: str) -> _Seen:
        """Return a file's digest, and when its CRLs are current; read it only if it changed. Raise ``OSError``."""
        path, seen = self._path(name), self._seen.get(name)
        if seen is not None and signature_of(path.stat()) == seen.signature:
            return seen
        with path.open("rb") as file:
            signature, content = signature_of(os.fstat(file.fileno())), file.read()
        window = None
        if name == CRL_FILE:
            with contextlib.suppress(ProjectionInvalid):
                window = read_window(content, self._windows)
        seen = self._seen[name] = _Seen(signature, hashlib.sha256(content).hexdigest(), window)
        return seen

    def _remember(self, name: str, digest: str, window: CrlWindow | None, size: int) -> None:
        """Remember a file that was just written, so that it need not be read again."""
        self._seen.pop(name, None)
        with contextlib.suppress(OSError):
            status = self._path(name).stat()
            if status.st_size == size:
                self._seen[name] = _Seen(signature_of(status), digest, window)

    def _digest(self, name: str) -> str | None:
        try:
            return self._read(name).digest
        except OSError:
            return None

    def _file_damage(self, name: str, digest: str | None, generation: int) -> str | None:
        if problem := self._file_problem(name):
            return problem
        path = self._path(name)
        try:
            seen = self._read(name)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}."
        if seen.digest != digest:
            return f"{path} was changed since generation {generation} was installed."
        if seen.window is not None and (problem := seen.window.problem(self._clock())):
            return f"{path} {problem}."
        return None


def signature_of(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced."""
    return status.st_ino, status.st_dev, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def broker_group(settings: Settings) -> int | None:
    """Return the group id of the broker's files, ``None`` for the portal's own; raise ``SettingInvalid``."""
    if settings.broker_group:
        try:
            return grp.getgrnam(settings.broker_group).gr_gid
        except KeyError:
            raise SettingInvalid(f"PORTAL_BROKER_GROUP: there is no group {settings.broker_group}.") from None
    if os.geteuid() == 0:
        is_cluster = settings.broker_control is ControlKind.RABBITMQ
        with contextlib.suppress(KeyError):
            return grp.getgrnam("rabbitmq" if is_cluster else "mosquitto").gr_gid
    return None
