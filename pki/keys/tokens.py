"""Keep the private keys of the CAs in a PKCS#11 token, where they are made and which they never leave."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from core.errors import CaKeyUnavailable, TokenUnavailable
from core.failpoints import failpoint
from core.files import fsync_directory, replace_file
from core.pkcs11_uri import TokenUri, of_token
from pki.algorithms import RSA_EXPONENT, KeyType, PrivateKey, PublicKey
from pki.keys.contract import KeyDescription, Origin, check_that_it_signs
from pki.keys.files import create_private_file, read_private_file
from pki.keys.token_client import Facts, TokenClient
from pki.keys.token_keys import token_key

SLOW_SECONDS = 120.0  # small tokens take a minute to make an RSA key
CURVES: dict[KeyType, ec.EllipticCurve] = {KeyType.EC_P256: ec.SECP256R1(), KeyType.EC_P384: ec.SECP384R1()}


@dataclass(frozen=True, slots=True)
class TokenKeyRecord:
    """What is known of a key in a token, as the file ``<name>.token.json`` of the CA folder has it.

    ``public`` is the point (X9.62 uncompressed, or RFC 8032) or the modulus in hex, empty while the key is being made;
    ``birth`` is what the token tells of it, ``None`` where it does not.
    """

    label: str
    id: str
    kind: KeyType
    public: str = ""
    token: dict[str, str] = field(default_factory=dict)
    birth: dict[str, bool | None] = field(default_factory=dict)

    @property
    def origin(self) -> Origin:
        """How the key came into the token (CKA_LOCAL, CKA_ALWAYS_SENSITIVE and CKA_NEVER_EXTRACTABLE of PKCS#11)."""
        told = [self.birth.get(name) for name in ("local", "always_sensitive", "never_extractable")]
        if all(told):
            return Origin.BORN_IN_TOKEN
        return Origin.IMPORTED if False in told else Origin.UNKNOWN

    @property
    def can_leave(self) -> bool:
        """Whether the token says that the key can be read."""
        return self.birth.get("sensitive") is False or self.birth.get("extractable") is True

    @property
    def public_key(self) -> PublicKey:
        """The public key."""
        public = bytes.fromhex(self.public)
        if self.kind in CURVES:
            return ec.EllipticCurvePublicKey.from_encoded_point(CURVES[self.kind], public)
        if self.kind is KeyType.ED25519:
            return ed25519.Ed25519PublicKey.from_public_bytes(public)
        return rsa.RSAPublicNumbers(RSA_EXPONENT, int.from_bytes(public, "big")).public_key()


class TokenKeys:
    """CA keys in one token: there by label and id, here as ``TokenKeyRecord``, which says which key is meant."""

    def __init__(self, uri: TokenUri, folder: Path, client: TokenClient) -> None:
        self._uri = uri
        self._folder = folder
        self._client = client

    @property
    def problem(self) -> str | None:
        """What keeps the token from being used, as far as known; a sentence."""
        return self._client.problem

    def exists(self, name: str) -> bool:
        """Return whether a key of that name is recorded."""
        return os.path.lexists(record_path(self._folder, name))

    def create(self, name: str, kind: KeyType) -> PrivateKey:
        """Have the token make a key, unless it has one of that label; what was begun before is completed instead.

        Raises ``CaKeyUnavailable`` if the token makes keys that can leave it.
        """
        record = self._begin(name, kind)
        return self._complete(name, record, self._find_or({"do": "make", **asdict(record)}))

    def adopt(self, name: str, key: PrivateKey) -> PrivateKey:
        """Import a key that was made elsewhere, and see that it signs; after that, it does not leave the token.

        What was begun before is continued. Until the key has signed, nobody takes it for the one to use.
        """
        kind, public, key_type, public_values, values = _parts(key)
        record = self._begin(name, kind)
        failpoint("move.begun")
        parts = {"key_type": key_type, "public_values": public_values, "values": values}
        answer = self._find_or({"do": "adopt", **asdict(record), **parts})
        failpoint("move.imported")
        return self._complete(name, replace(record, public=public), answer, is_tried=True)

    def load(self, name: str) -> PrivateKey:
        """Return a key by its record, without asking the token, unless its making was cut off: then it is completed."""
        record = self._read(name)
        return self._key_of(record) if record.public else self.create(name, record.kind)

    def _key_of(self, record: TokenKeyRecord) -> PrivateKey:
        request = {"do": "sign", **asdict(record)}

        def sign(mechanism: str, data: bytes, again: bool) -> bytes:
            answer = self._client.ask({**request, "mechanism": mechanism, "data": data.hex(), "again": again})
            return bytes.fromhex(answer["signature"])

        return token_key(record.public_key, sign)

    def destroy(self, name: str) -> None:
        """Have the token destroy the key, both parts of it, then delete what is recorded of it."""
        self._client.ask({"do": "destroy", **asdict(self._read(name))}, seconds=SLOW_SECONDS)
        path = record_path(self._folder, name)
        try:
            path.unlink()
            fsync_directory(self._folder)
        except OSError as error:
            raise CaKeyUnavailable(f"{path} cannot be deleted: {error.strerror}.") from error

    def describe(self, name: str) -> KeyDescription:
        """Return in which token the key is, and how it came there."""
        return self._described(name, self._read(name))

    def examine(self, name: str) -> KeyDescription:
        """Ask the token for the key, have it sign, and return what the token says of the key now."""
        record = self._read(name)
        check_that_it_signs(self.load(name))  # which compares the public key, too
        answer = self._client.ask({"do": "find", **asdict(record)})
        seen = {part: answer.get(part, getattr(record, part)) for part in ("birth", "token")}
        return self._described(name, replace(record, **seen))

    def _described(self, name: str, record: TokenKeyRecord) -> KeyDescription:
        seen = {part: record.token[part] for part in ("token", "serial") if record.token.get(part)}
        place = of_token(seen) if seen else self._uri.of_token
        return KeyDescription(name, f"{place} ({record.label})", record.origin, can_leave=record.can_leave)

    def _begin(self, name: str, kind: KeyType) -> TokenKeyRecord:
        """Record the key that is to be made: if this is cut off, it is known by its id, and is not taken for another's.

        What was begun under the label of another URI is begun again, unless the token has the key. Raises
        ``CaKeyUnavailable`` if there is one already.
        """
        label = name if self._uri.object is None else f"{self._uri.object}-{name}"
        record = TokenKeyRecord(label, secrets.token_hex(16), kind)
        if create_private_file(record_path(self._folder, name), _to_json(record)):
            return record
        begun = self._read(name)
        if begun.public or begun.kind is not kind:
            raise CaKeyUnavailable(
                f"There is a CA key {name} in the token {self._uri.of_token}, and keys are never replaced."
            )
        if begun.label != label and not self._find(asdict(begun)):  # object= was set, as another portal has that label
            replace_file(record_path(self._folder, name), _to_json(record))
            return record
        return begun

    def _find(self, request: Facts) -> Facts:
        return self._client.ask({**request, "do": "find"}, seconds=SLOW_SECONDS)

    def _find_or(self, request: Facts) -> Facts:
        """Search before anything is made: what was cut off may have left the key in the token."""
        return self._find(request) or self._client.ask(request, seconds=SLOW_SECONDS)

    def _complete(self, name: str, record: TokenKeyRecord, answer: Facts, *, is_tried: bool = False) -> PrivateKey:
        public = answer["public"] or record.public
        if not public or record.public not in ("", public) or answer["exponent"] not in (None, "010001"):
            raise TokenUnavailable(f"The token {self._uri.of_token} does not tell the public key of {record.label}.")
        done = replace(record, public=public, token=answer["token"], birth=answer["birth"])
        if done.can_leave:
            raise CaKeyUnavailable(
                f"The token {self._uri.of_token} has made the key {record.label} so that it can be read; set it up to"
                " keep keys (CKA_SENSITIVE, not CKA_EXTRACTABLE), and remove that key."
            )
        key = self._key_of(done)
        if is_tried:
            check_that_it_signs(key)
        replace_file(record_path(self._folder, name), _to_json(done))
        return key

    def _read(self, name: str) -> TokenKeyRecord:
        return read_record(self._folder, name)


def record_path(folder: Path, name: str) -> Path:
    """Return the path of the file that says which key of a token is that of the CA."""
    return folder / f"{name}.token.json"


def read_record(folder: Path, name: str) -> TokenKeyRecord:
    """Return what is recorded of a key in a token; raises ``CaKeyUnavailable``."""
    path = record_path(folder, name)
    content = read_private_file(path, "record of a key in a token", "restore it from a backup")
    try:
        values: dict[str, Any] = json.loads(content)
        record = TokenKeyRecord(**{**values, "kind": KeyType(values["kind"])})
        if record.public:
            record.public_key  # noqa: B018 - raises if it is damaged
    except (ValueError, TypeError, KeyError, UnsupportedAlgorithm) as error:
        raise CaKeyUnavailable(f"{path} is damaged; restore it from a backup.") from error
    return record


def _to_json(record: TokenKeyRecord) -> bytes:
    return json.dumps(asdict(record), indent=1).encode() + b"\n"


def recorded_keys(folder: Path) -> list[Facts]:
    """Return what a token is recognized by: the public keys that are recorded, with the token's serial number."""
    found = []
    for path in sorted(folder.glob("*.token.json")):
        name = path.name.removesuffix(".token.json")
        try:
            record = read_record(folder, name)
        except CaKeyUnavailable:
            continue  # who asks for that key is told
        if record.public:
            found.append({**asdict(record), "name": name, "serial": record.token.get("serial", "")})
    return found


_Values = dict[str, str]


def _parts(key: PrivateKey) -> tuple[KeyType, str, Literal["EC", "EC_EDWARDS", "RSA"], _Values, _Values]:
    """Return kind and public part of a key that is to be imported, and the attributes of its objects in hex."""
    match key:
        case ec.EllipticCurvePrivateKey():
            kind = next((kind for kind, curve in CURVES.items() if curve.name == key.curve.name), None)
            if kind is None:
                raise CaKeyUnavailable("Only keys on P-256 and P-384, Ed25519 and RSA keys can be moved into a token.")
            point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
            secret = key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big")
            curve = {"EC_PARAMS": _EC_PARAMETERS[kind]}
            public = {**curve, "EC_POINT": _octet_string(point)}
            return kind, point.hex(), "EC", public, {**curve, "VALUE": secret.hex()}
        case ed25519.Ed25519PrivateKey():
            raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
            curve = {"EC_PARAMS": _EC_PARAMETERS[KeyType.ED25519]}
            public = {**curve, "EC_POINT": _octet_string(raw)}
            return KeyType.ED25519, raw.hex(), "EC_EDWARDS", public, {**curve, "VALUE": key.private_bytes_raw().hex()}
        case _:
            return _rsa_parts(key)


def _rsa_parts(key: rsa.RSAPrivateKey) -> tuple[KeyType, str, Literal["RSA"], _Values, _Values]:
    numbers = key.private_numbers()
    public = {"MODULUS": numbers.public_numbers.n, "PUBLIC_EXPONENT": numbers.public_numbers.e}
    private = {
        "PRIVATE_EXPONENT": numbers.d,
        "PRIME_1": numbers.p,
        "PRIME_2": numbers.q,
        "EXPONENT_1": numbers.dmp1,
        "EXPONENT_2": numbers.dmq1,
        "COEFFICIENT": numbers.iqmp,
    }
    shown = {name: _big_integer(value) for name, value in public.items()}
    hidden = {name: _big_integer(value) for name, value in private.items()}
    return KeyType(f"rsa-{key.key_size}"), shown["MODULUS"], "RSA", shown, {**shown, **hidden}


def _big_integer(value: int) -> str:
    return value.to_bytes((value.bit_length() + 7) // 8, "big").hex()


def _octet_string(content: bytes) -> str:
    return (bytes([4, len(content)]) + content).hex()


# Object identifiers in DER: prime256v1 and secp384r1 (RFC 5480), id-Ed25519 (RFC 8410).
_EC_PARAMETERS = {
    KeyType.EC_P256: "06082a8648ce3d030107",
    KeyType.EC_P384: "06052b81040022",
    KeyType.ED25519: "06032b6570",
}
