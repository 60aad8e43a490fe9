"""Where events may be sent: addresses that are not the portal's own surroundings."""

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

URL_MOST = 2048  # characters
PORTS = (80, 443)  # and everything from 1024 on
FIRST_FREE_PORT = 1024
MOST_ADDRESSES = 8
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")

# Refused, whatever Python's list of global addresses says: protocol assignments (RFC 6890), transition mechanisms
# that lead to any IPv4 address (RFC 3056, 3068, 4380, 4291, 8215), site-local addresses (RFC 3879), and the host of
# Azure's metadata, which has a public address.
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
        "168.63.129.16/32",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the IPv4 address stands in the last 32 bits


class Refused(Exception):
    """An address that nothing is sent to; the text is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart: ``path`` with its query, ``host`` without brackets."""

    https: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the Host header says (RFC 9110 section 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.https else 80) else f"{host}:{self.port}"


def read_url(url: str, allowed: Sequence[Network]) -> Target:
    """Take apart a URL that events may be sent to; raises ``InputInvalid`` where its form rules that out.

    ``http`` is for addresses in ``allowed`` only. What a name's addresses are is looked at each time something is sent.
    """
    problem = _problem_of(url, allowed)
    if problem is not None:
        raise InputInvalid(f"The url {problem}.", [FieldProblem("url", problem)])
    parts = urlsplit(url)
    https = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(https, (parts.hostname or "").rstrip("."), parts.port or (443 if https else 80), path)


def _problem_of(url: str, allowed: Sequence[Network]) -> str | None:
    if len(url) > URL_MOST or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return f"must be at most {URL_MOST} characters of ASCII without spaces or backslashes"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "cannot be read"
    if parts.scheme not in ("http", "https") or not host:
        return "must begin with https:// and a host"
    if "@" in parts.netloc:
        return "must not hold a name or password; the signature tells the receiver who sends"
    if "#" in url:
        return "must have no fragment"
    if port is not None and port < FIRST_FREE_PORT and port not in PORTS:
        return "must have the port 80, 443 or one from 1024 on"
    literal = _literal(host)
    if literal is None and not _HOST.fullmatch(host):
        return "must have a host name of letters, digits, hyphens and dots, or an address"
    if literal is not None and not may_reach(literal, allowed):
        return f"must not lead to {literal}, which is internal, unless PORTAL_WEBHOOK_ALLOW has it"
    if parts.scheme == "http" and (not allowed or (literal is not None and not _is_in(literal, allowed))):
        return "must begin with https://; http is for addresses in PORTAL_WEBHOOK_ALLOW"
    return None


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def may_reach(address: Address, allowed: Sequence[Network]) -> bool:
    """Whether something may be sent to an address: one of the internet's, or one in ``allowed``."""
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return False
    inner = _inner(address)
    if _is_in(inner, allowed):
        return True
    return inner.is_global and not inner.is_multicast and not inner.is_reserved and not _is_in(inner, _INTERNAL)


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, where it does."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(_inner(address) in network for network in networks)


def resolve(target: Target, allowed: Sequence[Network], *, seconds: float) -> list[Address]:
    """The addresses of a host, each of which may be reached; a connection is made to one of them, not to the name.

    Raises ``Refused`` where any of them may not: a name with an internal address among others is up to something.
    """
    found = _look_up(target, seconds)[:MOST_ADDRESSES]
    for address in found:
        if not may_reach(address, allowed):
            raise Refused(
                f"{target.host} has the address {address}, which is internal and not in PORTAL_WEBHOOK_ALLOW."
            )
        if not target.https and not _is_in(address, allowed):
            raise Refused(f"{target.host} has the address {address}, for which https is needed.")
    return found


def _look_up(target: Target, seconds: float) -> list[Address]:
    """Ask the resolver, which knows no deadline, in a thread that is left to itself past ours."""
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
        raise Refused(f"The name {target.host} was not resolved within {seconds:g} seconds.") from None
    if not addresses:
        raise Refused(f"The name {target.host} does not resolve.")
    return addresses
