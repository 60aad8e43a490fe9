"""What a trusted front server says of the client behind it: whether it is believed, and the client's address.

A header counts from the addresses in ``PORTAL_TRUSTED_PROXIES`` only. Each proxy appends the address of its client to
``X-Forwarded-For``, or as ``for=`` to ``Forwarded`` (RFC 7239), so that only the entries on the right of the first
untrusted address are of trusted proxies. That address is the client's; what stands on its left is its own invention.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any

from core.setting_values import Network

MAX_HOPS = 16
# One element of Forwarded; others of its parameters are of no interest. A quoted comma makes an element unreadable.
_FOR = re.compile(r'(?:^|;)\s*for=("?)(?P<node>[^";,\s]+)\1\s*(?:;|$)', re.IGNORECASE)
# An address as headers write it: IPv6 in brackets if a port follows.
_NODE = re.compile(
    r"\[(?P<v6>[0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|(?P<v4>[0-9.]+)(?::[0-9]{1,5})?|(?P<bare>[0-9A-Fa-f:.]+)"
)


def is_trusted(address: str, networks: Sequence[Network]) -> bool:
    """Return whether an address is a trusted proxy's; an IPv4 address in IPv6 counts as itself."""
    if not networks:
        return False
    parsed = _address(address)
    return parsed is not None and any(parsed in network for network in networks)


def client_address(environ: Mapping[str, Any], trusted_proxies: Sequence[Network]) -> str:
    """Return the address of the client that made a request, as far as trusted proxies vouch for it.

    That is the right-most address which is not a trusted proxy's; the last proxy's if the entry before it is no
    address, and that of the connection if ``Forwarded`` and ``X-Forwarded-For`` disagree: a proxy that sets one of them
    may pass on the other as the client made it up.
    """
    peer = str(environ.get("REMOTE_ADDR") or "")
    if not is_trusted(peer, trusted_proxies):
        return peer
    chains = []
    if "HTTP_X_FORWARDED_FOR" in environ:
        chains.append(_last(environ["HTTP_X_FORWARDED_FOR"]))
    if "HTTP_FORWARDED" in environ:
        matches = [_FOR.search(element) for element in _last(environ["HTTP_FORWARDED"])]
        chains.append([match["node"] if match else "" for match in matches])
    found = {_first_untrusted(peer, chain, trusted_proxies) for chain in chains}
    return found.pop() if len(found) == 1 else peer


def _last(header: str) -> list[str]:
    """Return the last elements of a header, the one on the right first."""
    return [element.strip() for element in reversed(header.rsplit(",", MAX_HOPS)[-MAX_HOPS:])]


def _first_untrusted(peer: str, chain: Sequence[str], trusted_proxies: Sequence[Network]) -> str:
    """Return the first address of a chain, which begins at the nearest proxy, that is not a trusted one's."""
    nearest = peer
    for node in chain:
        match = _NODE.fullmatch(node)
        address = _address(match["v6"] or match["v4"] or match["bare"]) if match else None
        if address is None:
            break
        nearest = str(address)
        if not is_trusted(nearest, trusted_proxies):
            break
    return nearest


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped
    return parsed
