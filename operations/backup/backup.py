"""Writes a backup while the portal keeps serving."""

from __future__ import annotations

import contextlib
import os
import secrets
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from config import Settings
from core.errors import BackupRefused
from core.files import fsync_directory
from core.server_command import client_command
from operations import data_folder
from operations.backup.archive import FORMAT, BackupWriter, Manifest, checkpoint_members
from pki.algorithms import PrivateKey
from pki.keys.files import MAX_FILE_BYTES
from pki.keys.tokens import read_record
from store import copy as store_copy
from store import generations, issuers, schema
from store.database import Database
from store.tables import DEFAULT_TENANT
from store.tenants import is_tenant, tenant_ids
from workflows.audit import KEY_FILE, LogFiles
from workflows.authority.keys import open_keys
from workflows.authority.names import FIRST_ISSUING, is_issuing_name, root_names

# The passphrase makes the keys usable; the token belongs to one machine. The key of checkpoints signs one audit record,
# and a restored one is another, which gets a new key. Files whose names only begin so are left out, too.
LEFT_OUT = ("ca-passphrase", "operator-token", KEY_FILE)
_BATCH_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class WrittenBackup:
    """A backup that was written: its size in bytes, and where that is which it does not contain.

    ``in_tokens`` are the names of the keys that are in a token, with the labels of these.
    """

    manifest: Manifest
    size: int
    passphrase_at: str
    in_tokens: tuple[tuple[str, str], ...] = ()


def back_up(settings: Settings, path: Path, *, now: datetime, tenant_id: str | None = None) -> WrittenBackup:
    """Write a backup of one state of the database to ``path``, mode 0600, completely or not at all.

    With ``tenant_id`` it has what is of that tenant alone, which is not the first one. Raise ``BackupRefused`` if the
    file exists or there is no portal or tenant to back up, ``CaKeyUnavailable``,
    ``TokenUnavailable`` if a token has the key that seals it and does not sign, ``DatabaseUnavailable``.
    """
    if os.path.lexists(path):
        raise BackupRefused(f"{path} exists and is not overwritten; give another name.")
    if not path.parent.is_dir():
        raise BackupRefused(f"There is no folder {path.parent}; create it first.")
    if not settings.ca_dir.is_dir():
        raise BackupRefused(f"There is no portal in {settings.data_dir}; set PORTAL_DATA_DIR to its folder.")
    with (
        data_folder.shared(settings),
        contextlib.closing(open_database(settings)) as database,
        contextlib.closing(open_keys(settings, make=False)) as keys,
    ):
        return write(settings, database, path, keys.load(FIRST_ISSUING), now=now, tenant_id=tenant_id)


def write(
    settings: Settings,
    database: Database,
    path: Path,
    key: PrivateKey,
    *,
    now: datetime,
    tenant_id: str | None = None,
) -> WrittenBackup:
    """Write a backup of ``database`` and the files of ``settings``, sealed with the key of the first issuing CA.

    With ``tenant_id`` it has the rows, keys and checkpoint of that tenant alone.
    """
    with _new_file(path) as file, zipfile.ZipFile(file, "w") as archive, database.snapshot() as tx:
        current = schema.revision(tx)
        if current is None or current != schema.newest_revision():
            raise BackupRefused(
                "The database has the schema of another version of the portal; make the backup with that version, or"
                " start this version once."
            )
        writer = BackupWriter(archive)
        if tenant_id is not None:
            check_tenant(tx, tenant_id)
        names = store_copy.table_names(tenant_id)
        counts = {name: _add_table(writer, tx, name, tenant_id) for name in names}
        tenants = tenant_ids(tx) if tenant_id is None else [tenant_id]
        for name, content in (*_small_files(settings, tenant_id), *_checkpoints(settings, tenants)):
            writer.add(name, [content])
        manifest = Manifest(
            format=FORMAT,
            made_at=now.isoformat(timespec="seconds"),
            revision=current,
            generation=generations.get_broker_state(tx).generation,
            crl_numbers=_crl_numbers(tx, tenant_id),
            counts=counts,
            sealed_by=FIRST_ISSUING,
            members=writer.members,
            tenant=tenant_id,
        )
        writer.finish(manifest, key)
    at = str(settings.ca_passphrase_file or settings.secrets_dir / "ca-passphrase")
    if settings.ca_passphrase and not settings.ca_passphrase_file:
        at = "PORTAL_CA_PASSPHRASE"
    return WrittenBackup(manifest, path.stat().st_size, at, _in_tokens(settings, tenant_id))


def open_database(settings: Settings, *, as_owner: bool = False) -> Database:
    """Open the portal's database, ``as_owner`` of its tables; raise ``BackupRefused`` if there is no SQLite file."""
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise BackupRefused(f"There is no database at {url.database}.")
    taken = (as_owner and settings.database_owner_url) or settings.database_url
    return Database(taken, folder=settings.data_dir, threads=1)


def check_tenant(tx: Connection, tenant_id: str) -> None:
    """Raise ``BackupRefused`` unless there is a tenant of this name beside the first one."""
    if tenant_id == DEFAULT_TENANT:
        raise BackupRefused("The tenant default is the installation: leave --tenant out.")
    if not is_tenant(tx, tenant_id):
        raise BackupRefused(f"There is no tenant {tenant_id}; list them with: {client_command('tenant list')}.")


def is_key_of(tenant_id: str | None, name: str) -> bool:
    """Return whether a CA of this name is a tenant's; without a tenant, every CA is meant."""
    return tenant_id is None or is_issuing_name(tenant_id, name) or name in root_names(tenant_id)


def _in_tokens(settings: Settings, tenant_id: str | None) -> tuple[tuple[str, str], ...]:
    names = sorted(path.name.removesuffix(".token.json") for path in settings.ca_dir.glob("*.token.json"))
    names = [name for name in names if is_key_of(tenant_id, name)]
    recorded = [(name, read_record(settings.ca_dir, name)) for name in names]
    return tuple((name, record.token.get("token", "")) for name, record in recorded if record.public)


def _add_table(writer: BackupWriter, tx: Connection, name: str, tenant_id: str | None) -> int:
    count = -1  # the first line has the names of the columns

    def parts() -> Iterator[bytes]:
        nonlocal count
        gathered: list[str] = []
        size = 0
        for line in store_copy.dump(tx, name, tenant_id):
            count += 1
            gathered.append(line)
            size += len(line)
            if size >= _BATCH_BYTES:
                yield "".join(gathered).encode()
                gathered, size = [], 0
        yield "".join(gathered).encode()

    writer.add(f"tables/{name}.jsonl", parts())
    return count


def _small_files(settings: Settings, tenant_id: str | None) -> Iterator[tuple[str, bytes]]:
    """Yield the files of CAs: keys, records of keys in tokens, requests; and the secrets, which are of all tenants."""
    for suffix in (".key.pem", ".token.json", ".csr.pem"):  # the last are of CAs whose certificates have not come yet
        for path in sorted(settings.ca_dir.glob(f"*{suffix}")):
            if not is_key_of(tenant_id, path.name.removesuffix(suffix)):
                continue
            content = _content(path)
            if suffix == ".key.pem" and b"-----BEGIN ENCRYPTED PRIVATE KEY-----" not in content:
                raise BackupRefused(
                    f"{path} is not an encrypted key, so it must not be in a backup; encrypt it or move it away."
                )
            yield f"ca/{path.name}", content
    for path in sorted(settings.secrets_dir.iterdir()) if tenant_id is None else ():
        if not path.name.startswith(LEFT_OUT) and not path.name.startswith(".") and path.suffix != ".lock":
            yield f"secrets/{path.name}", _content(path)


def _checkpoints(settings: Settings, tenants: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield each tenant's newest checkpoint, if there is one, and the public key that it is verified with."""
    for tenant_id in tenants:
        files = LogFiles(tenant_id, settings)
        try:
            kept = files.kept()
        except ValueError as error:
            raise BackupRefused(f"{files.checkpoint_path()} cannot be used: {error}.") from error
        if kept is not None:
            note, key = checkpoint_members(tenant_id)
            yield note, kept.note.encode()
            yield key, str(files.key().verifier).encode()


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BackupRefused(f"{path} cannot be read ({error.strerror}); run this as the portal's user.") from error
    if len(content) > MAX_FILE_BYTES:
        raise BackupRefused(f"{path} is too large for a file of the portal; move it away.")
    return content


def _crl_numbers(tx: Connection, tenant_id: str | None) -> dict[str, int]:
    own = issuers.list_issuers(tx, retired=True, tenant_id=tenant_id)
    found = ((issuer.name, issuers.get_crl(tx, issuer.id)) for issuer in own)
    return {name: crl.number for name, crl in found if crl is not None}


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file, mode 0600, that gets its name only when complete and on the disk, and if the name is free."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.link(staged, path)  # unlike a rename, never replaces a file
        finally:
            staged.unlink(missing_ok=True)
        fsync_directory(path.parent)
    except FileExistsError as error:
        raise BackupRefused(f"{path} exists and is not overwritten; give another name.") from error
    except OSError as error:
        raise BackupRefused(f"{path} cannot be written: {error.strerror}.") from error
