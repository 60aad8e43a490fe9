"""The places of all CA keys of an installation, each key in one of them: files, and PKCS#11 tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from core.errors import CaKeyUnavailable
from core.pkcs11_uri import TokenUri
from pki.algorithms import KeyType, PrivateKey, PublicKey
from pki.keys.contract import CaKeys, KeyDescription
from pki.keys.files import KeyFiles, create_private_file
from pki.keys.token_client import TokenClient
from pki.keys.tokens import TokenKeys, read_record, record_path, recorded_keys

ROOT = "root"
_ROOT_NAME = re.compile(r"(?:.*-)?root(?:-[0-9]+)?")  # the installation's, or a tenant's own
FILES = None  # among places, for the files of the CA folder
Place = TokenUri | None


class SharedKeys(Protocol):
    """What gives the nodes of an installation each other's keys, by the paths of their files."""

    def publish(self, path: Path) -> None:
        """Give a file to the other nodes."""

    def fetch(self, path: Path) -> None:
        """Write the file of another node if there is one."""

    def destroy(self, path: Path) -> None:
        """Have the other nodes destroy a file."""


class KeyStores:
    """CA keys, each where the CA folder says; a new one goes into the first of its places.

    The folder has a file of the key or a record of the token that holds it. If it has both, the token counts: a key
    that was moved there leaves its file last.
    """

    def __init__(
        self,
        folder: Path,
        passphrase: bytes,
        *,
        issuing: Sequence[Place],
        root: Sequence[Place],
        timeout: float,
        markers: Path | None = None,
        shared: SharedKeys | None = None,
    ) -> None:
        """``issuing`` and ``root`` are the places for the keys of issuing CAs and of the root; opens none of them.

        ``markers`` is the folder that says which PINs were refused, if it is another one. ``shared`` is given where
        other nodes need the keys, too.
        """
        self._folder = folder
        self._shared = shared
        self.files = KeyFiles(folder, passphrase)
        self._places = {False: tuple(issuing), True: tuple(root)}
        self._clients: dict[TokenUri, TokenClient] = {}
        self._tokens: dict[TokenUri, TokenKeys] = {}
        for uri in dict.fromkeys((*issuing, *root)):
            if uri is not None:
                known, is_watched = functools.partial(self._known, uri), uri in issuing
                client = TokenClient(uri, markers or folder, timeout=timeout, is_watched=is_watched, known=known)
                self._clients[uri], self._tokens[uri] = client, TokenKeys(uri, folder, client)

    def exists(self, name: str) -> bool:
        """Return whether there is a file or a record of that key; asks no token."""
        return self.files.exists(name) or record_path(self._folder, name).exists()

    def is_taken(self, name: str) -> bool:
        """Return whether there is a key of that name, or one was destroyed; asks no token."""
        return self.exists(name) or self._destroyed(name).exists()

    def destroy(self, name: str) -> None:
        """Destroy a key for good, in a token, too; no new one gets its name. May be repeated."""
        create_private_file(self._destroyed(name), b"")
        if record_path(self._folder, name).exists():
            uri = self._uri_of(name)
            if uri is None:
                self._holding(name)  # raises, and says what to do
            else:
                self._tokens[uri].destroy(name)
        self.files.destroy(name)
        if self._shared is not None:
            for path in self._files_of(name):
                self._shared.destroy(path)

    def create(self, name: str, kind: KeyType) -> PrivateKey:
        """Make a new key in the first of its places; an existing one is never replaced."""
        self._refuse_existing(name)
        return self._published(name, self._for_new(name).create(name, kind))

    def adopt(self, name: str, key: PrivateKey) -> PrivateKey:
        """Keep a key that was made elsewhere in the first of its places; an existing one is never replaced."""
        self._refuse_existing(name)
        return self._published(name, self._for_new(name).adopt(name, key))

    def load(self, name: str) -> PrivateKey:
        """Return a key from where it is."""
        return self._holding(name).load(name)

    def describe(self, name: str) -> KeyDescription:
        """Return where a key is, without asking a token."""
        return self._holding(name).describe(name)

    def examine(self, name: str) -> KeyDescription:
        """Have a key sign, and return where it is and how it came there; asks its token."""
        return self._holding(name).examine(name)

    def names(self) -> list[str]:
        """Return the names of the keys that are here."""
        files = {path.name.removesuffix(".key.pem") for path in self._folder.glob("*.key.pem")}
        return sorted(files | {path.name.removesuffix(".token.json") for path in self._folder.glob("*.token.json")})

    def copy_into_token(self, name: str, public_key: PublicKey) -> KeyDescription:
        """Copy a key from its file into the first token among its places, and see that the token signs with it.

        From then on the file is not used, and may be set aside. ``public_key`` is that of the key's certificate. What
        was cut off is continued.
        """
        setting = _setting_of(name)
        uri = next((place for place in self._places[is_root_name(name)] if place is not None), None)
        if uri is None:
            raise CaKeyUnavailable(f"{setting} names no token; put the token's URI into it, and file after it.")
        if not self.files.exists(name):
            where = f"it is at {self.describe(name).place}" if self.exists(name) else "bring its file there"
            raise CaKeyUnavailable(f"There is no file with the key of {name} in {self._folder}; {where}.")
        key = self.files.load(name)
        if key.public_key() != public_key:
            raise CaKeyUnavailable(f"The key of {name} does not belong to its certificate; restore the right key file.")
        if self._holding(name) is self.files:
            self._tokens[uri].adopt(name, key)
        if self.load(name).public_key() != public_key:
            raise CaKeyUnavailable(
                f"The token at {self.describe(name).place} has another key than that of {name}; set object= in"
                f" {setting}, with which the names of keys begin, and remove {record_path(self._folder, name)}."
            )
        return self.examine(name)

    def problem(self, name: str) -> str | None:
        """Return what keeps the token of a key from being used, as far as known."""
        holding = self._holding(name) if self.exists(name) else None
        return holding.problem if isinstance(holding, TokenKeys) else None

    def token(self, uri: TokenUri) -> TokenKeys:
        """Return the keys in one of the tokens."""
        return self._tokens[uri]

    def close(self) -> None:
        """End what was started for the tokens; their keys cannot be used any more."""
        for client in self._clients.values():
            client.close()

    def _files_of(self, name: str) -> tuple[Path, Path]:
        return self.files.path(name), record_path(self._folder, name)

    def _published(self, name: str, key: PrivateKey) -> PrivateKey:
        """Give a new key to the other nodes before a certificate of it is recorded, which they then need it for."""
        if self._shared is not None:
            for path in filter(Path.exists, self._files_of(name)):
                self._shared.publish(path)
        return key

    def _destroyed(self, name: str) -> Path:
        return self._folder / f"{name}.destroyed"

    def _refuse_existing(self, name: str) -> None:
        if self.exists(name):
            raise CaKeyUnavailable(
                f"There is a CA key {name} at {self.describe(name).place}, and keys are never replaced; move it away"
                " first."
            )

    def _for_new(self, name: str) -> CaKeys:
        first = self._places[is_root_name(name)][0]
        return self.files if first is FILES else self._tokens[first]

    def _holding(self, name: str) -> CaKeys:
        if self._shared is not None and not self.exists(name):
            for path in self._files_of(name):
                self._shared.fetch(path)
        is_recorded = record_path(self._folder, name).exists()
        if not is_recorded or (self.files.exists(name) and not read_record(self._folder, name).public):
            return self.files  # a move into a token that was cut off has not moved it
        uri = self._uri_of(name)
        if uri is None:
            record = read_record(self._folder, name)
            raise CaKeyUnavailable(
                f"The key of {name} is in the token {record.token.get('token', '')!r}, which {_setting_of(name)} does"
                " not name; add its URI there, after the others."
            )
        return self._tokens[uri]

    def _uri_of(self, name: str) -> TokenUri | None:
        """Return the token that a key is in: the one that fits the record, or else the one that may be a copy of it.

        A copy differs by its serial number. Of several that may be it, none is taken: who lacks the key would seem
        exchanged.
        """
        tokens = [place for place in self._places[is_root_name(name)] if place is not None]
        seen = read_record(self._folder, name).token
        if fitting := [uri for uri in tokens if _fits(uri, seen)]:
            return fitting[0]
        alike = [uri for uri in tokens if _fits(uri, {**seen, "serial": uri.serial or ""})]
        return alike[0] if len(alike) == 1 else None

    def _known(self, uri: TokenUri) -> list[dict[str, object]]:
        return [known for known in recorded_keys(self._folder) if self._uri_of(str(known["name"])) == uri]


def is_root_name(name: str) -> bool:
    """Return whether a CA of this name is a root."""
    return _ROOT_NAME.fullmatch(name) is not None


def _setting_of(name: str) -> str:
    return "PORTAL_ROOT_KEYS" if is_root_name(name) else "PORTAL_CA_KEYS"


def _fits(uri: TokenUri, seen: dict[str, str]) -> bool:
    return all(getattr(uri, name) in (None, value) for name, value in seen.items())
