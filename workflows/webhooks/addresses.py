"""Decides where events may be sent: to public addresses, and to those that ``PORTAL_WEBHOOK_ALLOW`` names."""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import urlsplit

from core.errors import FieldProblem, InputInvalid

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_LENGTH = 2048  # characters
PORTS = (80, 443)  # and every unprivileged port
FIRST_UNPRIVILEGED_PORT = 1024
MAX_ADDRESSES = 8
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")

# Refused although ``is_global`` accepts some of them: protocol assignments (RFC 6890), transition mechanisms that lead
# to any IPv4 address (RFC 3056, 3068, 4380, 4291, 8215), site-local addresses (RFC 3879), addresses of examples (RFC
# 9637), and the metadata host of Azure, which has a public address.
_INTERNAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",
        "192.88.99.0/24",
        "2001::/23",
        "2002::/16",
        "::/96",
        "64:ff9b:1::/48",
        "fec0::/10",
        "3fff::/20",
        "168.63.129.16/32",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are the IPv4 address


class SendFailed(Exception):
    """An event was not delivered; the text is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed URL: ``path`` includes the query, ``host`` has no brackets."""

    https: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Return the value of the Host header (RFC 9110 section 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.https else 80) else f"{host}:{self.port}"


def read_url(url: str, allowed: Sequence[Network]) -> Target:
    """Parse a URL that events may be sent to; raises ``InputInvalid`` if its form rules that out.

    ``http`` is accepted for addresses in ``allowed`` only. The addresses of a host name are checked each time an
    event is sent, by ``resolve``.
    """
    problem = _problem_of(url, allowed)
    if problem is not None:
        raise InputInvalid(f"The url {problem}.", [FieldProblem("url", problem)])
    parts = urlsplit(url)
    https = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(https, (parts.hostname or "").rstrip("."), parts.port or (443 if https else 80), path)


def _problem_of(url: str, allowed: Sequence[Network]) -> str | None:
    if len(url) > MAX_URL_LENGTH or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return f"must be at most {MAX_URL_LENGTH} characters of ASCII without spaces or backslashes"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "cannot be read"
    if parts.scheme not in ("http", "https") or not host:
        return "must begin with https:// and a host"
    if "@" in parts.netloc:
        return "must not contain a user name or password; the receiver authenticates the portal by the signature"
    if "#" in url:
        return "must not have a fragment"
    if port is not None and port < FIRST_UNPRIVILEGED_PORT and port not in PORTS:
        return "must use port 80, 443, or a port of at least 1024"
    return _problem_of_host(parts.scheme, host, allowed)


def _problem_of_host(scheme: str, host: str, allowed: Sequence[Network]) -> str | None:
    literal = _literal(host)
    if literal is None and not _HOST.fullmatch(host):
        return "must have a host name of letters, digits, hyphens and dots, or an address"
    if literal is not None and not may_reach(literal, allowed):
        return f"must not lead to {literal}, which is internal; PORTAL_WEBHOOK_ALLOW permits internal addresses"
    if scheme == "http" and (not allowed or (literal is not None and not _is_in(literal, allowed))):
        return "must begin with https://; http is for addresses in PORTAL_WEBHOOK_ALLOW"
    return None


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def may_reach(address: Address, allowed: Sequence[Network]) -> bool:
    """Tell whether events may be sent to an address: it is public, or in ``allowed``."""
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return False
    inner = _inner(address)
    if _is_in(inner, allowed):
        return True
    return inner.is_global and not inner.is_multicast and not inner.is_reserved and not _is_in(inner, _INTERNAL)


def _inner(address: Address) -> Address:
    """Return the IPv4 address that an IPv4-mapped or NAT64 address contains, else the address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(_inner(address) in network for network in networks)


def resolve(target: Target, allowed: Sequence[Network], *, seconds: float) -> list[Address]:
    """Look up the addresses of a host once; connect to one of them, never to the name, which could change meanwhile.

    Raises ``SendFailed`` if the name does not resolve within ``seconds``, or if any address is not allowed: a name
    with an internal address among others is an attack or a mistake.
    """
    found = _look_up(target, seconds)[:MAX_ADDRESSES]
    for address in found:
        if not may_reach(address, allowed):
            raise SendFailed(
                f"{target.host} has the address {address}, which is internal and not in PORTAL_WEBHOOK_ALLOW."
            )
        if not target.https and not _is_in(address, allowed):
            raise SendFailed(f"{target.host} has the address {address}, for which https is needed.")
    return found


def _look_up(target: Target, seconds: float) -> list[Address]:
    """Ask the resolver in a thread of its own, which is abandoned after ``seconds``: the call takes no timeout."""
    answer: queue.SimpleQueue[list[Address] | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
            answer.put(list(dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError, ValueError):
            answer.put(None)

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        addresses = answer.get(timeout=seconds)
    except queue.Empty:
        raise SendFailed(f"The name {target.host} was not resolved within {seconds:g} seconds.") from None
    if not addresses:
        raise SendFailed(f"The name {target.host} does not resolve.")
    return addresses
