"""Read the URIs of PKCS#11 tokens (RFC 7512), as the settings name where the keys of the CAs are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

SCHEME = "pkcs11:"
# What a path may say of the token, with the most bytes that a token can have of it: CK_TOKEN_INFO of PKCS#11.
TOKEN_ATTRIBUTES = {"token": 32, "manufacturer": 32, "model": 16, "serial": 16}
MAX_OBJECT_BYTES = 64
# What RFC 7512 section 2.3 lets stand as it is in a path (pk11-res-avail and unreserved).
_PLAIN = ":[]@!$'()*+,=&"
_PIN_VALUE = re.compile(r"[:;?&]\s*pin-value", re.IGNORECASE)
_ESCAPED = re.compile(r"(?:[^%\x00-\x20]|%[0-9a-fA-F]{2})*")


@dataclass(frozen=True, slots=True)
class TokenUri:
    """A token, the module through which it is reached, and the file with its PIN; ``None`` is anything.

    ``object`` begins the labels of the keys in it, which else are the names of the CAs alone.
    """

    module: Path
    pin_file: Path
    token: str | None = None
    manufacturer: str | None = None
    model: str | None = None
    serial: str | None = None
    slot_id: int | None = None
    object: str | None = None

    @property
    def of_token(self) -> str:
        """Return the part that says which token, without module and PIN."""
        named = {name: getattr(self, name) for name in TOKEN_ATTRIBUTES}
        slot = None if self.slot_id is None else str(self.slot_id)
        return of_token({**named, "slot-id": slot, "object": self.object})

    def __str__(self) -> str:
        query = f"module-path={quote(str(self.module), safe='/')}&pin-source=file:{quote(str(self.pin_file), safe='/')}"
        return f"{self.of_token}?{query}"


def of_token(attributes: Mapping[str, str | None]) -> str:
    """Return the part of a URI that says which token, by those of its attributes that are not ``None``."""
    named = [f"{name}={quote(value, safe=_PLAIN)}" for name, value in attributes.items() if value is not None]
    return SCHEME + ";".join(named)


def parse_token_uri(text: str) -> TokenUri:
    """Read a URI such as ``pkcs11:token=portal?module-path=/usr/lib/m.so&pin-source=file:/etc/pin``.

    It must name the token, by label, serial or slot, the module, and the file with the PIN. Raises ``ValueError`` with
    the end of a sentence; a PIN in the URI itself is refused, and is never in the text of the error.
    """
    if not text.startswith(SCHEME):
        raise ValueError(f"must be file or begin with {SCHEME}")
    # First, because a PIN with ; ? or & goes on as what looks like another attribute, which must not be named.
    if _PIN_VALUE.search(text):
        raise ValueError("must not hold the PIN (pin-value); put it into a file of mode 0600 and name it by pin-source")
    path, _mark, query = text.removeprefix(SCHEME).partition("?")
    named = _attributes(path, ";", {*TOKEN_ATTRIBUTES, "slot-id", "object", "type"})
    asked = _attributes(query, "&", {"module-path", "pin-source"})
    if named.pop("type", "private") != "private":
        raise ValueError("can only have the type private")
    if not {"token", "serial", "slot-id"} & named.keys():
        raise ValueError("must say which token, by token=, serial= or slot-id=")
    for name, limit in {**TOKEN_ATTRIBUTES, "object": MAX_OBJECT_BYTES}.items():
        if name in named and not 1 <= len(named[name].encode()) <= limit:
            raise ValueError(f"must have 1 to {limit} bytes after {name}=")
    slot = named.pop("slot-id", None)
    if slot is not None and not re.fullmatch(r"[0-9]{1,19}", slot):
        raise ValueError("must have a number after slot-id=")
    return TokenUri(
        module=_absolute(asked.get("module-path", ""), "module-path"),
        pin_file=_absolute(re.sub(r"^file:(//(?=/))?", "", asked.get("pin-source", "")), "pin-source"),
        slot_id=None if slot is None else int(slot),
        **named,
    )


def _attributes(text: str, separator: str, known: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, text.split(separator)):
        name, equals, value = part.partition("=")
        if name not in known:
            raise ValueError("has an attribute that is not known here" + (f", {name[:40]!r}" if equals else ""))
        if not equals or name in found:
            raise ValueError(f"must have {name}= once, with a value")
        if not _ESCAPED.fullmatch(value):
            raise ValueError(f"has a blank or a % without two hex digits after {name}=")
        try:
            found[name] = unquote_to_bytes(value).decode()
        except UnicodeDecodeError:
            raise ValueError(f"has other bytes than UTF-8 after {name}=") from None
        if "\0" in found[name]:
            raise ValueError(f"has a zero byte after {name}=")
    return found


def _absolute(value: str, name: str) -> Path:
    if not value.startswith("/"):
        raise ValueError(f"must have an absolute path after {name}=")
    return Path(value)
