"""Sign and open checkpoints of a log: signed notes (c2sp.org/signed-note) with the text of c2sp.org/tlog-checkpoint."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

MAX_BYTES = 64 * 1024  # of a note; verifiers must take 16 signatures at least
_ED25519 = b"\x01"  # the signature type of the notes' registry
_PRIVATE = re.compile(r"PRIVATE\+KEY\+(?P<name>[^+\s]+)\+(?P<id>[0-9a-f]{8})\+(?P<key>[A-Za-z0-9+/=]+)")
_PUBLIC = re.compile(r"(?P<name>[^+\s]+)\+(?P<id>[0-9a-f]{8})\+(?P<key>[A-Za-z0-9+/=]+)")
_SIZE = re.compile("0|[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log says of itself: its origin, the number of its entries, and the root of their Merkle tree."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """Return the text of the note: three lines."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """The public key of a log with its name, which is also the log's origin."""

    name: str
    key: Ed25519PublicKey

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """Read ``<name>+<key id in hex>+<base64 of 01 and the key>``; raise ``ValueError``."""
        name, key = _parts(_PUBLIC, text)
        found = cls(name, Ed25519PublicKey.from_public_bytes(key))
        if str(found) != text:
            raise ValueError("the id of the key is not that of its name and its bytes")
        return found

    def __str__(self) -> str:
        return f"{self.name}+{self._id().hex()}+{base64.b64encode(_ED25519 + self._bytes()).decode()}"

    def _bytes(self) -> bytes:
        return self.key.public_bytes(Encoding.Raw, PublicFormat.Raw)

    def _id(self) -> bytes:
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self._bytes()).digest()[:4]

    def line_of(self, signature: bytes) -> str:
        """Return the line of a note that carries a signature with this key."""
        return f"\u2014 {self.name} {base64.b64encode(self._id() + signature).decode()}\n"

    def open(self, note: str) -> Checkpoint:
        """Return the checkpoint that a note signed with this key holds; raise ``ValueError``.

        Signatures of other keys, such as those of witnesses, are passed over.
        """
        text, separator, lines = note.rpartition("\n\n")
        text += "\n"
        if not separator or len(note) > MAX_BYTES or any(char < " " and char != "\n" for char in note):
            raise ValueError("this is not a signed note")
        start = f"\u2014 {self.name} "
        own = [line.removeprefix(start) for line in lines.splitlines() if line.startswith(start)]
        decoded = [_decoded(signature) for signature in own]
        signatures = [signature[4:] for signature in decoded if signature[:4] == self._id()]
        if not signatures:
            raise ValueError(f"the note is not signed with the key of {self.name}")
        try:
            for signature in signatures:
                self.key.verify(signature, text.encode())
        except InvalidSignature:
            raise ValueError(f"a signature with the key of {self.name} does not fit the note") from None
        origin, size, root, *_ = [*text.split("\n"), "", ""]
        if origin != self.name or not _SIZE.fullmatch(size) or len(_decoded(root)) != hashlib.sha256().digest_size:
            raise ValueError(f"the note is not a checkpoint of {self.name}")
        return Checkpoint(origin, int(size), _decoded(root))


class SigningKey:
    """The private key of a log; as text ``PRIVATE+KEY+<name>+<key id in hex>+<base64 of 01 and the seed>``."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.verifier = VerifierKey(name, key.public_key())

    @classmethod
    def create(cls, name: str) -> SigningKey:
        """Make a key for the log ``name``, which has neither spaces nor plus signs."""
        return cls(name, Ed25519PrivateKey.generate())

    @classmethod
    def parse(cls, text: str) -> SigningKey:
        """Read what ``str`` returned; raise ``ValueError``, which says nothing of the key."""
        name, seed = _parts(_PRIVATE, text)
        return cls(name, Ed25519PrivateKey.from_private_bytes(seed))

    def __str__(self) -> str:
        name, key_id, _ = str(self.verifier).split("+", 2)
        seed = self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        return f"PRIVATE+KEY+{name}+{key_id}+{base64.b64encode(_ED25519 + seed).decode()}"

    def note_of(self, size: int, root: bytes) -> str:
        """Return the signed note of a checkpoint; the same one for the same size and root."""
        text = Checkpoint(self.verifier.name, size, root).text()
        return f"{text}\n{self.verifier.line_of(self._key.sign(text.encode()))}"


def _parts(pattern: re.Pattern[str], text: str) -> tuple[str, bytes]:
    match = pattern.fullmatch(text)
    key = b"" if match is None else _decoded(match["key"])
    if match is None or len(key) != 33 or key[:1] != _ED25519:
        raise ValueError("this is not an Ed25519 key of a signed note")
    return match["name"], key[1:]


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
