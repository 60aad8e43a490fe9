"""Reads the values that settings can have; each function raises ``ValueError`` with what is wrong."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Address(NamedTuple):
    """A host and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class EndOfPrevious(StrEnum):
    """When the certificate ends that a device had before it renewed by itself."""

    AFTER_OVERLAP = "after_overlap"
    WHEN_USED = "when_used"


class AclStyle(StrEnum):
    """How devices stand in the broker's ACL file."""

    PER_DEVICE = "per-device"
    PATTERN = "pattern"


class LogFormat(StrEnum):
    """How a line of the log is written."""

    TEXT = "text"
    JSON = "json"


KEY_TYPES = ("ec-p256", "ec-p384", "ed25519", "rsa-2048", "rsa-3072")


def parse_text(value: str) -> str:
    """Any text."""
    return value


def parse_path(value: str) -> Path:
    """A path, made absolute; ``~`` is the home folder."""
    return Path(value).expanduser().absolute()


def parse_names(value: str) -> tuple[str, ...]:
    """DNS names and IP addresses, separated by commas."""
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9.:_*-]{1,253}", name):
            raise ValueError(f"{name!r} is neither a DNS name nor an IP address")
    return names


def parse_networks(value: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """IP networks in CIDR form, separated by commas; an address alone is a network of one."""
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in value.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"must be networks such as 10.1.0.0/16 or fd00::/8, separated by commas ({error})") from None


def parse_address(value: str) -> Address:
    """A listening address, HOST:PORT."""
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:8443")
    return Address(host.strip("[]"), int(port))


def parse_url(value: str) -> str:
    """An http or https URL without query, fragment or closing slash."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("must be an http:// or https:// URL without query or fragment")
    return value.rstrip("/")


def count(low: int, high: int) -> Callable[[str], int]:
    """A whole number within limits."""

    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    """A number of seconds within limits."""

    def parse(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value) or not low <= float(value) <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return float(value)

    return parse


def choice(choices: type[StrEnum]) -> Callable[[str], StrEnum]:
    """One of an enumeration's values."""

    def parse(value: str) -> StrEnum:
        try:
            return choices(value)
        except ValueError:
            raise ValueError("must be one of " + ", ".join(choices)) from None

    return parse


def parse_key_type(value: str) -> str:
    """A kind of key that devices may have."""
    if value not in KEY_TYPES:
        raise ValueError("must be one of " + ", ".join(KEY_TYPES))
    return value


def parse_distinguished_name_part(value: str) -> str:
    """A text that may stand in a certificate's name."""
    if not re.fullmatch(r"[A-Za-z0-9 '()+,./:=?_-]{1,40}", value):
        raise ValueError("must be 1 to 40 letters, digits, spaces or simple punctuation")
    return value


def parse_topic_prefix(value: str) -> str:
    """One or more topic levels without wildcards."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,7}", value):
        raise ValueError("must be one or more topic levels of letters, digits, - and _, such as devices")
    return value


def parse_secret(value: str) -> str:
    """A secret of 16 characters at least."""
    if len(value) < 16:
        raise ValueError("must have at least 16 characters")
    return value


def parse_database_url(value: str) -> str:
    """A SQLAlchemy URL of SQLite or PostgreSQL."""
    if not value.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
        raise ValueError("must begin with sqlite:/// or postgresql://")
    return value
