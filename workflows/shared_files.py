"""Secret files that every node of an installation needs: each node gives its new ones to the others, sealed.

They go through the database, encrypted under the installation's key (AES-256-GCM), a file of each node that is never in
the database. Without that file there is one node, and nothing is given.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from config import Settings
from core.errors import StartupError
from core.files import private_folder, replace_file, secret_file
from pki.keys.stores import is_root_name
from store import nodes
from store.database import Database
from store.scope import ALL_TENANTS

KEY_FILE = "installation-key"
# What a node must have in common with the others to answer as they do; CA keys are compared with their certificates.
COMPARED = ("link-keys", "idempotency-pepper", "webhook-key")
NONCE_BYTES = 12
_NAMES = re.compile(
    r"secrets/(?:link-keys|idempotency-pepper|webhook-key|ca-passphrase|audit-key|audit-keys/[a-z0-9-]{1,63})"
    r"|ca/(?P<ca>[a-z0-9-]{1,63})\.(?:key\.pem|token\.json)"
)


def seal(key: bytes, name: str, content: bytes) -> bytes:
    """Encrypt the content of a file, which cannot be opened as that of another one."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, name.encode())


def unseal(key: bytes, name: str, sealed: bytes) -> bytes:
    """Decrypt what ``seal`` returned; raises ``ValueError`` if it was altered, or the key is another one."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], name.encode())
    except (InvalidTag, ValueError):
        raise ValueError("it was altered, or sealed under another key") from None


def is_shared(name: str) -> bool:
    """Return whether a file, by its path in the data folder, is one that all nodes need; the key of a root is none."""
    found = _NAMES.fullmatch(name)
    return found is not None and not (found["ca"] and is_root_name(found["ca"]))


class SharedFiles:
    """The files of one node's data folder that the others need, too."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._folder = settings.data_dir
        self._key_path = settings.secrets_dir / KEY_FILE
        self._database = database

    @property
    def are_shared(self) -> bool:
        """Whether there may be other nodes."""
        return self._key_path.exists()

    def key(self) -> bytes:
        """Return the installation's key, made at the first call; raises ``StartupError`` if its file is unusable."""
        return bytes.fromhex(secret_file(self._key_path, lambda: secrets.token_hex(32)))

    def publish(self, path: Path) -> None:
        """Give a file to the other nodes, unless they have one of that path."""
        name = str(path.relative_to(self._folder))
        if self.are_shared and is_shared(name):
            sealed = seal(self.key(), name, path.read_bytes())
            with self._database.transaction(sees=ALL_TENANTS) as tx:
                nodes.put_shared_file(tx, name, sealed)

    def publish_all(self) -> None:
        """Give all files to the other nodes that they need."""
        for path in (*self._folder.glob("secrets/**/*"), *self._folder.glob("ca/*")):
            if path.is_file():
                self.publish(path)

    def fetch(self, path: Path) -> None:
        """Write a file that another node has given, mode 0600, unless it is here; nothing if there is none."""
        name = str(path.relative_to(self._folder))
        if not self.are_shared or not is_shared(name) or path.exists():
            return
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            sealed = nodes.shared_file(tx, name)
        if sealed is not None and (content := self._opened(name, sealed)):
            private_folder(path.parent)
            replace_file(path, content)

    def fetch_all(self) -> None:
        """Write what other nodes have given and is not here, and destroy what they have destroyed."""
        if not self.are_shared:
            return
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            there = nodes.shared_files(tx)
        for name, destroyed in there.items():
            path = self._folder / name
            if not is_shared(name) or path.with_name(path.name.replace(".key.pem", ".token.json")).exists():
                continue  # a key that was moved into a token is not wanted in a file again
            if not destroyed:
                self.fetch(path)
            elif path.exists():
                self._destroy(name, path)

    def destroy(self, path: Path) -> None:
        """Have all nodes destroy a file, of which nobody gives one of that path any more."""
        name = str(path.relative_to(self._folder))
        if self.are_shared and is_shared(name):
            with self._database.transaction(sees=ALL_TENANTS) as tx:
                if nodes.shared_file(tx, name) is not None:
                    nodes.put_shared_file(tx, name, seal(self.key(), name, b""), destroyed=True)

    def _destroy(self, name: str, path: Path) -> None:
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            sealed = nodes.shared_file(tx, name)
        if sealed is not None and self._opened(name, sealed) == b"":  # as only a node can say
            path.unlink(missing_ok=True)

    def _opened(self, name: str, sealed: bytes) -> bytes:
        try:
            return unseal(self.key(), name, sealed)
        except ValueError as error:
            raise StartupError(
                f"{name} of another node cannot be opened: {error}; let this folder join again."
            ) from error
