"""Finds the certificate that a client has shown: in its TLS connection, or in a header of the front server."""

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
    """Return the client's certificate, DER, ``None`` where it has shown none.

    A resumed TLS session brings the one of its beginning (RFC 8446 section 4.6.1), so what has happened to the
    certificate since then is for the caller to find out. On the Unix socket, and from a trusted proxy's address, the
    headers ``Client-Cert`` (RFC 9440) and ``X-SSL-Client-Cert`` (PEM, URL-encoded, nginx's
    ``$ssl_client_escaped_cert``) count, and the proxy's own certificate does not; from any other address the headers
    are as if they were not there. Raises ``RequestMalformed``.
    """
    if not comes_from_front(environ, trusted_proxies):
        return client_certificate(environ.get("gunicorn.socket"))
    byte_sequence, escaped = environ.get("HTTP_CLIENT_CERT"), environ.get("HTTP_X_SSL_CLIENT_CERT")
    if byte_sequence and escaped:
        raise RequestMalformed("The proxy sends both Client-Cert and X-SSL-Client-Cert; let it send one.")
    if byte_sequence:
        return _of_byte_sequence(byte_sequence)
    return _of_escaped_pem(escaped) if escaped else None


def comes_from_front(environ: dict[str, Any], trusted_proxies: Sequence[Network]) -> bool:
    """Whether the request was passed on by a server whose headers about the client are believed."""
    connection = environ.get("gunicorn.socket")
    if getattr(connection, "family", None) == socket.AF_UNIX:
        return True
    return _is_trusted(environ.get("REMOTE_ADDR", ""), trusted_proxies)


def client_certificate(connection: object) -> bytes | None:
    """Return the certificate, DER, that a TLS client has shown with proof of its key, ``None`` where it has none."""
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
