"""Finds the certificate that a client has presented: in its TLS connection, or in a header of a front server."""

from __future__ import annotations

import base64
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable
from urllib.parse import unquote

from config import Network
from core.errors import RequestMalformed

_BYTE_SEQUENCE = re.compile(r":([A-Za-z0-9+/]{1,24576}={0,2}):")  # RFC 9651 section 4.2.7
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]{1,32768}\n-----END CERTIFICATE-----\n*")


@runtime_checkable
class HasPeer(Protocol):
    """A TLS socket."""

    def getpeercert(self, binary_form: Literal[True]) -> bytes | None:
        """Return the peer's certificate, DER."""


def presented(environ: dict[str, Any], trusted_proxies: Sequence[Network]) -> bytes | None:
    """Return the client's certificate, DER, ``None`` if it has presented none; raise ``RequestMalformed``.

    A resumed TLS session has the certificate of its beginning (RFC 8446 section 4.6.1), so the caller checks what has
    happened to it since. From a trusted proxy's address the header ``Client-Cert`` (RFC 9440) counts in place of the
    proxy's own certificate. On the Unix socket ``X-SSL-Client-Cert`` (URL-encoded PEM, nginx's
    ``$ssl_client_escaped_cert``) counts, too, and the front server must set or remove both. It does not count from an
    address: proxies there are configured to remove ``Client-Cert`` alone, and would pass on what a client makes up.
    """
    if getattr(environ.get("gunicorn.socket"), "family", None) == socket.AF_UNIX:
        byte_sequence, escaped = environ.get("HTTP_CLIENT_CERT"), environ.get("HTTP_X_SSL_CLIENT_CERT")
        if byte_sequence and escaped:
            raise RequestMalformed("The proxy sends both Client-Cert and X-SSL-Client-Cert; let it send one.")
        if escaped:
            return _of_escaped_pem(escaped)
    elif _is_trusted(environ.get("REMOTE_ADDR", ""), trusted_proxies):
        byte_sequence = environ.get("HTTP_CLIENT_CERT")
    else:
        return client_certificate(environ.get("gunicorn.socket"))
    return _of_byte_sequence(byte_sequence) if byte_sequence else None


def client_certificate(connection: object) -> bytes | None:
    """Return the certificate, DER, that a TLS client has presented with proof of its key, ``None`` if it has none."""
    if not isinstance(connection, HasPeer):
        return None
    return connection.getpeercert(binary_form=True)


def _of_byte_sequence(header: str) -> bytes:
    found = _BYTE_SEQUENCE.fullmatch(header.strip())
    if found is None:
        raise RequestMalformed("The proxy's Client-Cert header is not one byte sequence as in RFC 9440.")
    try:
        return base64.b64decode(found[1], validate=True)
    except ValueError as error:
        raise RequestMalformed("The proxy's Client-Cert header is not valid Base64.") from error


def _of_escaped_pem(header: str) -> bytes:
    text = unquote(header)
    if not _PEM.fullmatch(text):
        raise RequestMalformed("The proxy's X-SSL-Client-Cert header is not one URL-encoded certificate in PEM.")
    try:
        return ssl.PEM_cert_to_DER_cert(text)
    except ValueError as error:
        raise RequestMalformed("The proxy's X-SSL-Client-Cert header is not valid PEM.") from error


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
