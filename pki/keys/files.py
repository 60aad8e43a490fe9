"""Keep the private keys of the CAs in encrypted files."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from core.errors import CaKeyUnavailable
from core.files import fsync_directory, private_folder, replace_file
from pki.algorithms import KeyType, PrivateKey, encrypt_private_key, generate_key
from pki.encoding import failing_as
from pki.keys.contract import KeyDescription, Origin, check_that_it_signs

MAX_FILE_BYTES = 64 * 1024
MIN_PASSPHRASE_BYTES = 16
ASIDE = ".moved"  # ends the name of a key's file once the key is in a token

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def is_ca_name(name: str) -> bool:
    """Return whether a CA may have this name, which is part of its key's path."""
    return _NAME.fullmatch(name) is not None


class KeyFiles:
    """CA keys as files ``<name>.key.pem``, mode 0600 in a folder of mode 0700, encrypted under one passphrase."""

    def __init__(self, folder: Path, passphrase: bytes) -> None:
        self._folder = folder
        self._passphrase = passphrase

    def path(self, name: str) -> Path:
        """Return the path of the file that holds the key ``name``."""
        if not is_ca_name(name):
            raise CaKeyUnavailable("The name of a CA must have 1 to 63 lower-case letters, digits and inner hyphens.")
        return self._folder / f"{name}.key.pem"

    def exists(self, name: str) -> bool:
        """Return whether a file of that name exists, readable or not; a dangling symbolic link counts, too."""
        return os.path.lexists(self.path(name))

    def create(self, name: str, kind: KeyType) -> PrivateKey:
        """Make a key and keep it durably; it is read back from its file, which shows that it can be opened again."""
        return self._keep(name, lambda: generate_key(kind))

    def adopt(self, name: str, key: PrivateKey) -> PrivateKey:
        """Keep a key that was made elsewhere durably, and read it back from its file."""
        return self._keep(name, lambda: key)

    def _keep(self, name: str, make: Callable[[], PrivateKey]) -> PrivateKey:
        path = self.path(name)
        if not self.exists(name) and create_private_file(path, encrypt_private_key(make(), self._passphrase)):
            return self.load(name)
        raise CaKeyUnavailable(f"There is a CA key at {path}, and keys are never replaced; move it away first.")

    def load(self, name: str) -> PrivateKey:
        """Read and decrypt a key, which takes about 0.1 s for the derivation from the passphrase."""
        path = self.path(name)
        content = read_private_file(path, "CA key", "restore it from a backup")
        if b"-----BEGIN ENCRYPTED PRIVATE KEY-----" not in content:
            raise CaKeyUnavailable(
                f"The CA key {path} is damaged or not encrypted; restore it from a backup, or, if it is in the clear,"
                " encrypt it with: openssl pkcs8 -topk8 -iter 600000."
            )
        unopened = CaKeyUnavailable(
            f"The CA key {path} does not open: give the passphrase it was made with (PORTAL_CA_PASSPHRASE, or the"
            " passphrase file), or, if the file is damaged, restore it from a backup."
        )
        with failing_as(unopened):
            key = load_pem_private_key(content, self._passphrase)
        if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
            raise CaKeyUnavailable(
                f"The CA key {path} is of a kind that cannot sign certificates; restore the right one."
            )
        return key

    def describe(self, name: str) -> KeyDescription:
        """Return the path of the key's file."""
        return KeyDescription(name, str(self.path(name)), Origin.FILE)

    def examine(self, name: str) -> KeyDescription:
        """See that the key opens and signs, and return the path of its file."""
        check_that_it_signs(self.load(name))
        return self.describe(name)

    def destroy(self, name: str) -> None:
        """Delete a key's file, and those that it was copied to when it was moved into a token."""
        path = self.path(name)
        try:
            for each in (path, *path.parent.glob(f"{path.name}{ASIDE}*")):
                each.unlink(missing_ok=True)
            fsync_directory(self._folder)
        except OSError as error:
            raise CaKeyUnavailable(f"{path} cannot be deleted: {error.strerror}.") from error

    def set_aside(self, name: str) -> Path:
        """Give a key's file, mode 0600, a name under which it is not used any more, and return that."""
        path = self.path(name)
        try:
            os.chmod(path, 0o600)
            aside = self._linked_aside(path)
            path.unlink()
            fsync_directory(self._folder)
        except OSError as error:
            raise CaKeyUnavailable(f"{path} cannot be renamed: {error.strerror}.") from error
        return aside

    def _linked_aside(self, path: Path) -> Path:
        number = 1
        while True:
            aside = path.with_name(f"{path.name}{ASIDE}" if number == 1 else f"{path.name}{ASIDE}-{number}")
            try:
                os.link(path, aside)  # unlike a rename, this never replaces a file
            except FileExistsError:
                if not aside.samefile(path):  # else an earlier call was cut off here
                    number += 1
                    continue
            return aside

    def set_aside_files(self) -> list[Path]:
        """Return the files of keys that were set aside, and not destroyed yet."""
        return sorted(self._folder.glob(f"*.key.pem{ASIDE}*"))


def passphrase(settings_value: str, path: Path, *, make: bool = True) -> bytes:
    """Return the passphrase of the CA keys: the setting's value, else the content of the file.

    With ``make``, a missing file is created with 256 random bits and mode 0600, in a folder of mode 0700. Raises
    ``CaKeyUnavailable`` if the file is readable by others, too short, or cannot be read or written.
    """
    if settings_value:
        return settings_value.encode()
    if make and not os.path.lexists(path):
        create_private_file(path, secrets.token_urlsafe(32).encode() + b"\n")  # unless another process was faster
    mend = "put your copy of it there, or set PORTAL_CA_PASSPHRASE"  # backups do not have it
    content = read_private_file(path, "passphrase file", mend).strip()
    if len(content) < MIN_PASSPHRASE_BYTES:
        raise CaKeyUnavailable(f"The passphrase file {path} is damaged; {mend}.")
    return content


def create_private_file(path: Path, content: bytes) -> bool:
    """Write a durable file of mode 0600 into a folder of mode 0700, and return True, unless the name is taken."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    try:
        private_folder(path.parent)
        replace_file(staged, content, mode=0o600)
        try:
            os.link(staged, path)  # unlike a rename, this never replaces a file
        except FileExistsError:
            return False
        finally:
            staged.unlink()
            fsync_directory(path.parent)
    except OSError as error:
        raise CaKeyUnavailable(f"{path} cannot be written: {error.strerror}.") from error
    return True


def read_private_file(path: Path, what: str, remedy: str) -> bytes:
    """Return the first ``MAX_FILE_BYTES`` of a file that only its owner may read; raises ``CaKeyUnavailable``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a FIFO would block
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CaKeyUnavailable(f"The {what} {path} is not a regular file; {remedy}.")
            if status.st_uid not in (0, os.geteuid()):
                raise CaKeyUnavailable(f"The {what} {path} belongs to another user, who could change it; {remedy}.")
            if status.st_mode & 0o077:
                raise CaKeyUnavailable(
                    f"The {what} {path} is open to other users; take that away with: chmod 600 {shlex.quote(str(path))}"
                )
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise CaKeyUnavailable(f"The {what} {path} cannot be read ({error.strerror}); {remedy}.") from error
