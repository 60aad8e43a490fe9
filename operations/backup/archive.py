"""The file of a backup: a ZIP archive with a manifest of its members, and a seal that detects changes."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from core.errors import BackupRefused
from pki.algorithms import PrivateKey
from pki.keys.contract import sign_message, verifies
from pki.keys.files import MAX_FILE_BYTES, is_ca_name
from pki.keys.token_keys import is_in_token
from store import copy as store_copy
from store.tables import DEFAULT_TENANT

FORMAT = 1
MANIFEST, SEAL = "manifest.json", "manifest.seal"
MAX_MANIFEST_BYTES = 16 << 20  # with many tenants it names some files of each
_MAX_SEAL_BYTES = 2048  # of an RSA key of 4096 bits half of it
_SIGNATURE = "signature:"
_CHUNK = 1 << 20
_SMALL_FILE = re.compile(r"(ca|secrets)/([a-z0-9][a-z0-9.-]{0,80})")
_TABLE = re.compile(r"tables/([a-z_]{1,64})\.jsonl")


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the archive except manifest and seal: size in bytes, SHA-256 in lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a backup; ``made_at`` is RFC 3339 in UTC, ``sealed_by`` the name of a CA.

    ``tenant`` is whose rows alone it has, ``None`` for the whole installation.
    """

    format: int
    made_at: str
    revision: str
    generation: int
    crl_numbers: Mapping[str, int]
    counts: Mapping[str, int]
    sealed_by: str
    members: Mapping[str, Member]
    tenant: str | None = None

    def to_json(self) -> bytes:
        """Return the manifest as it is stored: an older version reads that of a whole backup, and of no other."""
        values = asdict(self)
        if self.tenant is None:
            del values["tenant"]
        return json.dumps(values, indent=1, sort_keys=True).encode()


def seal_of(manifest: bytes, key: PrivateKey) -> str:
    """Return HMAC-SHA256 of the manifest in hex, with a key derived from a CA's private key (HKDF, RFC 5869).

    A key in a token, which cannot be read, signs it instead. Nobody can change a backup unnoticed without the CA's key.
    """
    if is_in_token(key):
        return _SIGNATURE + sign_message(key, _signed(manifest)).hex()
    secret = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    derived = HKDF(hashes.SHA256(), 32, salt=None, info=b"onboarding portal: seal of a backup").derive(secret)
    return hmac.new(derived, manifest, hashlib.sha256).hexdigest()


def _signed(manifest: bytes) -> bytes:
    """Return what is signed: it begins as no certificate, CRL or OCSP response does, so that it is taken for none."""
    return b"onboarding portal: seal of a backup\n" + manifest


class BackupWriter:
    """Writes the members of a backup one by one."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.members: dict[str, Member] = {}

    def add(self, name: str, parts: Iterable[bytes]) -> None:
        """Write a member from its parts, which are not kept in memory."""
        size, digest = 0, hashlib.sha256()
        with self._archive.open(_entry(name), "w", force_zip64=True) as member:
            for part in parts:
                member.write(part)
                digest.update(part)
                size += len(part)
        self.members[name] = Member(size, digest.hexdigest())

    def finish(self, manifest: Manifest, key: PrivateKey) -> None:
        """Write the manifest and its seal."""
        content = manifest.to_json()
        self._archive.writestr(_entry(MANIFEST), content)
        self._archive.writestr(_entry(SEAL), seal_of(content, key))


def checkpoint_members(tenant_id: str) -> tuple[str, str]:
    """Return the names of a tenant's checkpoint, a signed note, and of the public key of its signer."""
    folder = "audit" if tenant_id == DEFAULT_TENANT else f"audit/{tenant_id}"
    return f"{folder}/checkpoint", f"{folder}/key"


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # the time is in the manifest; here it would be local and to two seconds
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o100600 << 16
    return entry


class Backup:
    """A backup opened for reading; its content is untrusted until ``is_sealed_with`` and ``check`` succeed."""

    def __init__(self, path: Path) -> None:
        """Read the manifest; raise ``BackupRefused`` if the file is not a backup."""
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            said = error.strerror if isinstance(error, OSError) else "it is damaged, or something else"
            raise BackupRefused(f"{path} cannot be read as a backup: {said}.") from error
        try:
            self._manifest = self._whole(MANIFEST, MAX_MANIFEST_BYTES)
            self._seal = self._whole(SEAL, _MAX_SEAL_BYTES).decode("ascii", "replace")
            manifest = _manifest(self._manifest)
            if manifest is None:
                raise BackupRefused(
                    f"{path} is not a backup that this version can read; use the version that wrote it."
                )
            self.manifest = manifest
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()

    def is_sealed_with(self, key: PrivateKey) -> bool:
        """Return whether the manifest was written with this CA key."""
        if not self._seal.startswith(_SIGNATURE):
            return not is_in_token(key) and hmac.compare_digest(self._seal, seal_of(self._manifest, key))
        try:
            signature = bytes.fromhex(self._seal.removeprefix(_SIGNATURE))
        except ValueError:
            return False
        return verifies(key.public_key(), signature, _signed(self._manifest), hashes.SHA256())

    def check(self) -> None:
        """Raise ``BackupRefused`` unless the members are exactly those of the manifest."""
        names = self._archive.namelist()
        wanted = self.manifest.members
        if sorted(names) != sorted([*wanted, MANIFEST, SEAL]):
            raise BackupRefused(f"{self.path} does not hold what its manifest names; use another backup.")
        if {f"tables/{name}.jsonl" for name in self.manifest.counts} != {n for n in wanted if _TABLE.fullmatch(n)}:
            raise BackupRefused(f"{self.path} does not hold the tables that its manifest names; use another backup.")
        for name, member in wanted.items():
            size, digest = 0, hashlib.sha256()
            for part in self._parts(name):
                size += len(part)
                if size > member.size:
                    break
                digest.update(part)
            if (size, digest.hexdigest()) != (member.size, member.sha256):
                raise BackupRefused(f"{name} in {self.path} is damaged; use another backup.")

    def small_files(self, folder: str) -> dict[str, bytes]:
        """Return the files of ``ca`` or ``secrets`` by name."""
        found = ((name, _SMALL_FILE.fullmatch(name)) for name in self.manifest.members)
        return {match[2]: self._whole(name, MAX_FILE_BYTES) for name, match in found if match and match[1] == folder}

    def checkpoint(self, tenant_id: str) -> tuple[str, str] | None:
        """Return the checkpoint of a tenant's audit record and the public key of its signer, if the backup has one."""
        names = checkpoint_members(tenant_id)
        if not set(names) <= self.manifest.members.keys():
            return None
        note, key = (self._whole(name, MAX_FILE_BYTES).decode("utf-8", "replace") for name in names)
        return note, key

    def lines(self, table: str) -> Iterator[bytes]:
        """Yield a table's lines as ``store.copy.dump`` wrote them."""
        with self._opened(f"tables/{table}.jsonl") as member:
            yield from member

    def rows(self, table: str) -> Iterator[dict[str, Any]]:
        """Yield a table's rows."""
        return store_copy.read(self.lines(table))

    def _opened(self, name: str) -> Any:
        try:
            return self._archive.open(name)
        except (KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise BackupRefused(f"{name} is missing from {self.path}; use another backup.") from error

    def _parts(self, name: str) -> Iterator[bytes]:
        try:
            with self._opened(name) as member:
                while part := member.read(_CHUNK):
                    yield part
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            raise BackupRefused(f"{name} in {self.path} is damaged; use another backup.") from error

    def _whole(self, name: str, limit: int) -> bytes:
        content = b""
        for part in self._parts(name):
            content += part
            if len(content) > limit:
                raise BackupRefused(f"{name} in {self.path} is longer than it can be; use another backup.")
        return content


def _manifest(content: bytes) -> Manifest | None:
    try:
        values = json.loads(content)
        if values["format"] != FORMAT:
            return None
        members = {name: Member(**member) for name, member in values["members"].items()}
        manifest = Manifest(**(values | {"members": members}))
        texts = (manifest.made_at, manifest.revision, manifest.sealed_by)
        numbers = (manifest.generation, *manifest.crl_numbers.values(), *manifest.counts.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if manifest.tenant is not None and type(manifest.tenant) is not str:
        return None
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        return None
    if not is_ca_name(manifest.sealed_by):  # part of a path, before the seal is checked
        return None
    return manifest
