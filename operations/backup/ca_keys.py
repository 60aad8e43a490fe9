"""The keys of the CAs in a backup and after its restore: files, and keys in tokens, of which it has records alone."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from config import Settings
from core.errors import BackupRefused, CaKeyUnavailable, PortalError, TokenUnavailable
from core.files import private_folder
from core.states import IssuerKind
from operations.backup.archive import Backup
from pki.algorithms import PrivateKey, public_key_der
from pki.keys.contract import check_that_it_signs
from pki.keys.files import create_private_file, passphrase
from pki.keys.stores import KeyStores
from store.tables import DEFAULT_TENANT

FILES = ("*.key.pem", "*.token.json")  # what says which key is where, in the CA folder
_FILE, _RECORD = (pattern.removeprefix("*") for pattern in FILES)


def passphrase_here(settings: Settings) -> bytes:
    """Return the passphrase of the CA keys, without creating one; raise ``CaKeyUnavailable`` if there is none."""
    return passphrase(settings.ca_passphrase.get_secret_value(), settings.secrets_dir / "ca-passphrase", make=False)


def key_files(folder: Path) -> list[Path]:
    """Return the files of a CA folder that hold keys, or say which key of a token is meant."""
    return [path for pattern in FILES for path in sorted(folder.glob(pattern))]


def sealing_key(backup: Backup, settings: Settings, stack: contextlib.ExitStack) -> tuple[PrivateKey, bool]:
    """Return the CA key that sealed a backup, and whether it is the key of this data folder.

    ``stack`` keeps a token open. Raise ``CaKeyUnavailable`` if the configured passphrase decrypts neither the key here
    nor the one in the backup, or the token does not have the key; ``BackupRefused`` if the backup was changed.
    """
    name, copies = backup.manifest.sealed_by, backup.small_files("ca")
    opened = False
    if (settings.ca_dir / f"{name}{_FILE}").is_file() or f"{name}{_FILE}" in copies:
        for key, same in _keys_in_files(backup, settings, name):
            if backup.is_sealed_with(key):
                return key, same or _is_recorded(settings, name, key)
            opened = opened or not same
    for folder, same in ((settings.ca_dir, True), (stack.enter_context(_staged(copies)), False)):
        if (folder / f"{name}{_RECORD}").is_file():
            keys = stack.enter_context(contextlib.closing(_stores(folder, settings)))
            try:
                key = keys.load(name)
            except PortalError as error:
                raise _refusal(error) from error
            if backup.is_sealed_with(key):
                if not same:
                    _check_the_token(key)
                return key, same
            opened = opened or not same
    if opened:
        raise BackupRefused(f"{backup.path} was changed after it was written; use another backup.")
    raise CaKeyUnavailable(
        "The configured passphrase does not decrypt the CA key in the backup: put the backup's passphrase into"
        f" PORTAL_CA_PASSPHRASE or {settings.secrets_dir / 'ca-passphrase'}."
    )


@dataclass(frozen=True, slots=True)
class CheckedKeys:
    """What is to be known of keys in tokens; ``refusals`` are why those of a tenant beside the first cannot be used."""

    notes: Sequence[str] = ()  # the root's token may be away
    refusals: Mapping[str, CaKeyUnavailable] = field(default_factory=dict)

    def of_removed(self, removed: Collection[str]) -> list[str]:
        """Return notes about removed tenants, whose keys may be destroyed; raise the refusal of any other one."""
        for tenant_id, refusal in self.refusals.items():
            if tenant_id not in removed:
                raise refusal
        return [f"The tenant {name} stays removed, and its CAs cannot sign: a key is lost." for name in self.refusals]


def check_keys(backup: Backup, settings: Settings, files: Mapping[str, bytes]) -> CheckedKeys:
    """See that each key that will be in a token signs, and belongs to its certificate in the backup.

    ``files`` are those of the CA folder as it will be. Raise ``CaKeyUnavailable`` with what to do if that is not so of
    a key of the first tenant: which of the others stay removed is not known yet.
    """
    recorded = {name.removesuffix(_RECORD) for name in files if name.endswith(_RECORD)}
    recorded = {name for name in recorded if f"{name}{_FILE}" not in files}
    issuers = [row for row in backup.rows("issuers") if row["name"] in recorded]
    if not issuers:
        return CheckedKeys()
    notes: list[str] = []
    refusals: dict[str, CaKeyUnavailable] = {}
    with _staged(files) as folder, contextlib.closing(_stores(folder, settings)) as keys:
        for row in issuers:
            name, certificate = row["name"], x509.load_der_x509_certificate(row["der"])
            try:
                if keys.load(name).public_key() != certificate.public_key():
                    raise CaKeyUnavailable(f"The key of {name} in the token does not belong to its certificate.")
                keys.examine(name)
            except PortalError as error:
                tenant_id = row["tenant_id"]
                if row["kind"] == IssuerKind.ROOT and isinstance(error, TokenUnavailable):
                    notes.append(f"The root's key is in a token that is not here, and was not tried: {error.detail}")
                elif tenant_id == DEFAULT_TENANT:
                    raise _refusal(error) from error
                else:
                    refusals.setdefault(tenant_id, _refusal(error))
    return CheckedKeys(notes, refusals)


def _keys_in_files(backup: Backup, settings: Settings, name: str) -> Iterator[tuple[PrivateKey, bool]]:
    """Yield the key here, then the one in the backup, as far as the passphrase opens them."""
    secret, here = passphrase_here(settings), settings.ca_dir / f"{name}{_FILE}"
    copied = backup.small_files("ca").get(f"{name}{_FILE}")
    for content, same in ((here.read_bytes() if here.is_file() else None, True), (copied, False)):
        key = None if content is None else _opened(content, secret)
        if key is not None:
            yield key, same


def _opened(content: bytes, secret: bytes) -> PrivateKey | None:
    try:
        key = load_pem_private_key(content, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) else None


def _is_recorded(settings: Settings, name: str, key: PrivateKey) -> bool:
    """Return whether a key that was in a file when the backup was made is in a token of this portal now."""
    if not (settings.ca_dir / f"{name}{_RECORD}").is_file():
        return False
    with contextlib.closing(_stores(settings.ca_dir, settings)) as keys:
        return public_key_der(keys.load(name).public_key()) == public_key_der(key.public_key())


def _check_the_token(key: PrivateKey) -> None:
    """Believe a record in a backup, which anybody may have written, if the token has its key."""
    try:
        check_that_it_signs(key)
    except PortalError as error:
        raise _refusal(error) from error


def _refusal(error: PortalError) -> CaKeyUnavailable:
    return CaKeyUnavailable(
        f"{error.detail} The backup does not have the keys in a token: bring it here, name it in PORTAL_CA_KEYS or"
        " PORTAL_ROOT_KEYS, and run the command again; nothing was changed."
    )


@contextlib.contextmanager
def _staged(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Put the files of a CA folder into a private one, for the body of a ``with``; keys in it are encrypted."""
    with tempfile.TemporaryDirectory(prefix="portal-restore-") as folder:
        for name, content in files.items():
            if name.endswith((_FILE, _RECORD)):
                create_private_file(Path(folder) / name, content)
        yield Path(folder)


def _stores(folder: Path, settings: Settings) -> KeyStores:
    """Open the keys of a folder; what is known of refused PINs is in the CA folder, whichever folder that is."""
    private_folder(settings.ca_dir)
    return KeyStores(
        folder,
        b"",  # files are not opened by it
        issuing=settings.ca_keys,
        root=settings.root_keys,
        timeout=settings.token_timeout,
        markers=settings.ca_dir,
    )
