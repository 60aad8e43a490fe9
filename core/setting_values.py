"""Parsers of the values that settings have in the environment.

Each raises ``ValueError`` with the end of a sentence that begins with the name of the setting.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from pydantic import PlainValidator, SecretStr

from core.operator_groups import GroupGrants, parse_group_grants
from core.pkcs11_uri import TokenUri, parse_token_uri

UNIX_SOCKET_PATH_LIMIT = 107  # bytes in sockaddr_un.sun_path without the closing NUL

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Address(NamedTuple):
    """A host and a TCP port; or, as the host, the path of a Unix socket, with port 0."""

    host: str
    port: int

    @property
    def is_unix(self) -> bool:
        """Whether this is a Unix socket."""
        return self.host.startswith("/")

    def __str__(self) -> str:
        if self.is_unix:
            return f"unix:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def is_ip_address(host: str) -> bool:
    """Return whether a host is an address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a name or address is that of the machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_path(value: str) -> Path:
    """Return an absolute path; ``~`` is the home folder."""
    return Path(value).expanduser().absolute()


def parse_names(value: str) -> tuple[str, ...]:
    """Return DNS names and IP addresses, separated by commas."""
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9.:_*-]{1,253}", name):
            raise ValueError(f"{name!r} is neither a DNS name nor an IP address")
    return names


def parse_mail_addresses(value: str) -> tuple[str, ...]:
    """Return mail addresses (RFC 5321, without quoting and comments), separated by commas."""
    addresses = tuple(address.strip() for address in value.split(",") if address.strip())
    for address in addresses:
        if not re.fullmatch(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,253}", address):
            raise ValueError("must be addresses such as people@example.com, separated by commas")
    return addresses


def parse_networks(value: str) -> tuple[Network, ...]:
    """Return IP networks (CIDR) separated by commas; a single address is a network, too."""
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in value.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"must be networks such as 10.1.0.0/16 or fd00::/8, separated by commas ({error})") from None


def parse_ip_address(value: str) -> str:
    """Return an IP address."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("must be an IP address, such as 127.0.0.1") from None


def parse_address(value: str, *, example: str = "127.0.0.1:8443") -> Address:
    """Return a listening address from ``HOST:PORT``; the error for another value gives the ``example``."""
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"must be HOST:PORT, such as {example}")
    return Address(host.strip("[]"), int(port))


def parse_optional_address(value: str) -> Address | None:
    """Return an address from ``HOST:PORT``, ``None`` if empty."""
    return parse_address(value) if value else None


def parse_address_or_socket(value: str) -> Address:
    """Return a listening address from ``HOST:PORT`` or ``unix:/PATH``."""
    if not value.startswith("unix:"):
        return parse_address(value)
    path = value.removeprefix("unix:")
    if not path.startswith("/") or len(path.encode()) > UNIX_SOCKET_PATH_LIMIT:
        raise ValueError(f"must be unix: and an absolute path of at most {UNIX_SOCKET_PATH_LIMIT} bytes")
    return Address(path, 0)


def parse_url(value: str) -> str:
    """Return an http or https URL without query, fragment and closing slash."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("must be an http:// or https:// URL without query or fragment")
    return value.rstrip("/")


def parse_optional_https_url(value: str) -> str:
    """Return an https URL as ``parse_url`` does; empty stays empty."""
    if value and not value.startswith("https://"):
        raise ValueError("must be an https:// URL")
    return parse_url(value) if value else ""


def parse_issuer(value: str) -> str:
    """Return the issuer identifier of OpenID Connect as it is, character by character; empty stays empty."""
    parts = urlsplit(value)
    plain = value.isascii() and value.isprintable() and " " not in value and len(value) <= 100
    if value and (
        parts.scheme != "https" or not parts.hostname or "@" in parts.netloc or not plain or set("?#") & {*value}
    ):
        raise ValueError("must be an https:// URL of at most 100 characters without user, query or fragment")
    return value


def parse_client_id(value: str) -> str:
    """Return a client id of OAuth 2.0 (RFC 6749 appendix A.1)."""
    if not re.fullmatch(r"[ -~]{0,255}", value):
        raise ValueError("must be printable ASCII, as the identity provider shows it")
    return value


def parse_scopes(value: str) -> str:
    """Return scopes of OAuth 2.0 (RFC 6749 section 3.3), openid among them."""
    scopes = value.split()
    if "openid" not in scopes or len(value) > 512 or not re.fullmatch(r"[!#-\[\]-~ ]+", value):
        raise ValueError("must be scopes separated by blanks, openid among them")
    return " ".join(scopes)


def parse_claim_name(value: str) -> str:
    """Return the name of a claim, or the names of one in objects, joined by dots."""
    if not re.fullmatch(r"[!-~]{1,255}", value):
        raise ValueError("must be the name of a claim, such as groups or realm_access.roles")
    return value


def count(low: int, high: int) -> PlainValidator:
    """Accept a whole number from ``low`` to ``high``."""

    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return PlainValidator(parse)


def seconds(low: float, high: float) -> PlainValidator:
    """Accept a number of seconds from ``low`` to ``high``."""

    def parse(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value) or not low <= float(value) <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return float(value)

    return PlainValidator(parse)


def choice(values: Iterable[str], kind: Callable[[str], str] = str) -> PlainValidator:
    """Accept one of ``values``, and return it as a ``kind``."""
    allowed = tuple(values)

    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError("must be one of " + ", ".join(allowed))
        return kind(value)

    return PlainValidator(parse)


def parse_distinguished_name_part(value: str) -> str:
    """Return a text for a common name."""
    if not re.fullmatch(r"[A-Za-z0-9 '()+,./:=?_-]{1,40}", value):
        raise ValueError("must be 1 to 40 letters, digits, spaces or simple punctuation")
    return value


def parse_topic_prefix(value: str) -> str:
    """Return one or more topic levels without wildcards."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,7}", value):
        raise ValueError("must be one or more topic levels of letters, digits, - and _, such as devices")
    return value


def parse_topic_prefixes(value: str) -> tuple[str, ...]:
    """Return topic prefixes separated by commas, each as ``parse_topic_prefix`` does; not that of the portal itself."""
    prefixes = tuple(parse_topic_prefix(prefix.strip()) for prefix in value.split(",") if prefix.strip())
    if any(prefix.split("/")[0] == "portal" for prefix in prefixes):
        raise ValueError("must not contain portal, where the portal and its broker talk")
    return prefixes


def parse_database_url(value: str) -> str:
    """Return a SQLAlchemy URL of SQLite or PostgreSQL."""
    if not value.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
        raise ValueError("must begin with sqlite:/// or postgresql://")
    return value


def parse_owner_url(value: str) -> str:
    """Return a SQLAlchemy URL of PostgreSQL; empty stays empty."""
    if value and not value.startswith(("postgresql://", "postgresql+psycopg://")):
        raise ValueError("must begin with postgresql://")
    return value


def parse_passphrase(value: str) -> SecretStr:
    """Return a passphrase of at least 16 characters; empty stays empty."""
    return long_enough(value) if value else SecretStr("")


def long_enough(passphrase: str) -> SecretStr:
    """Return a passphrase of at least 16 characters."""
    if len(passphrase) < 16:
        raise ValueError("must have at least 16 characters")
    return SecretStr(passphrase)


def parse_key_places(value: str) -> tuple[TokenUri | None, ...]:
    """Return the places for CA keys, separated by blanks: tokens (RFC 7512), ``None`` for files; new ones go first."""
    places = tuple(None if place == "file" else parse_token_uri(place) for place in value.split())
    if not places or len(set(places)) < len(places):
        raise ValueError("must be file or the URI of a token, or several of these, each once")
    return places


def _optional_path(value: str) -> Path | None:
    return parse_path(value) if value else None


PathSetting = Annotated[Path, PlainValidator(parse_path)]
OptionalPath = Annotated[Path | None, PlainValidator(_optional_path)]
PkiAddressSetting = Annotated[Address, PlainValidator(lambda value: parse_address(value, example="127.0.0.1:8080"))]
Names = Annotated[tuple[str, ...], PlainValidator(parse_names)]
Networks = Annotated[tuple[Network, ...], PlainValidator(parse_networks)]
KeyPlaces = Annotated[tuple[TokenUri | None, ...], PlainValidator(parse_key_places)]
MailAddresses = Annotated[tuple[str, ...], PlainValidator(parse_mail_addresses)]
OidcIssuer = Annotated[str, PlainValidator(parse_issuer)]
OidcClientId = Annotated[str, PlainValidator(parse_client_id)]
OidcScopes = Annotated[str, PlainValidator(parse_scopes)]
ClaimName = Annotated[str, PlainValidator(parse_claim_name)]
GroupGrantsSetting = Annotated[GroupGrants, PlainValidator(parse_group_grants)]
Text = Annotated[str, PlainValidator(str)]
Url = Annotated[str, PlainValidator(parse_url)]
OptionalUrl = Annotated[str, PlainValidator(parse_optional_https_url)]
