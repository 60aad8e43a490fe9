"""Finds the certificate that a client has shown: in its TLS connection, or in the header of a trusted proxy."""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Sequence
from typing import Any

from config import Network
from core.errors import RequestMalformed
from web.transport import client_certificate

_BYTE_SEQUENCE = re.compile(r":([A-Za-z0-9+/]{1,24576}={0,2}):")  # RFC 9651 section 4.2.7


def presented(environ: dict[str, Any], trusted_proxies: Sequence[Network]) -> bytes | None:
    """The client's certificate, DER, ``None`` where it has shown none.

    From a trusted proxy's address the header ``Client-Cert`` (RFC 9440) counts, and the proxy's own certificate does
    not; from any other address the header is as if it were not there. Raises ``RequestMalformed``.
    """
    if not _is_trusted(environ.get("REMOTE_ADDR", ""), trusted_proxies):
        return client_certificate(environ.get("gunicorn.socket"))
    header = environ.get("HTTP_CLIENT_CERT")
    if header is None:
        return None
    found = _BYTE_SEQUENCE.fullmatch(header.strip())
    if found is None:
        raise RequestMalformed("The proxy's Client-Cert header is not one byte sequence as in RFC 9440.")
    try:
        return base64.b64decode(found[1], validate=True)
    except ValueError as error:
        raise RequestMalformed("The proxy's Client-Cert header is not valid Base64.") from error


def _is_trusted(address: str, networks: Sequence[Network]) -> bool:
    if not networks:
        return False
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed in network for network in networks)
