"""Asks the identity provider over HTTPS: with limits of time and size, without redirects and proxies.

The connections are urllib3's and not those of requests, since a limit for a whole request needs the socket.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlencode, urlsplit

from core.connections import cut_off_after
from core.errors import StartupError
from workflows.oidc.refusals import ProviderUnavailable

CONNECT_SECONDS = 4.0
TOTAL_SECONDS = 8.0  # of a request, from the handshake to the last byte
MAX_ANSWER = 256 * 1024  # bytes
JSON, FORM = "application/json", "application/x-www-form-urlencoded"


@dataclass(frozen=True, slots=True)
class Answer:
    """A status with the JSON object that came with it, which is empty if an error came with anything else."""

    status: int
    content: Mapping[str, Any]


class Transport:
    """Sends one request after the other, each over a connection of its own."""

    def __init__(self, ca_file: Path | None) -> None:
        """Trust the CA certificates in ``ca_file`` (PEM) in place of the system's; raises ``StartupError``."""
        try:
            self._tls = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise StartupError(
                f"PORTAL_OIDC_CA_FILE names {ca_file}, which holds no CA certificates in PEM."
            ) from error

    def get(self, url: str) -> Mapping[str, Any]:
        """Return the JSON object at ``url``; raises ``ProviderUnavailable``."""
        answer = self._request("GET", url, None, {})
        if answer.status != 200:
            raise ProviderUnavailable(f"{_origin(url)} answered with status {answer.status}.")
        return answer.content

    def post(self, url: str, fields: Mapping[str, str], headers: Mapping[str, str]) -> Answer:
        """Return the answer to a form, be it an error; raises ``ProviderUnavailable``."""
        return self._request("POST", url, urlencode(fields).encode(), {"Content-Type": FORM, **headers})

    def _request(self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        from urllib3.exceptions import HTTPError  # loaded by those portals alone that have a provider

        try:
            status, media_type, content = self._exchange(method, url, body, headers)
        except TimeoutError:
            raise ProviderUnavailable(f"{_origin(url)} did not answer within {TOTAL_SECONDS:g} seconds.") from None
        except ssl.SSLCertVerificationError as error:
            raise ProviderUnavailable(
                f"The certificate of {_origin(url)} is not trusted: {error.verify_message}."
            ) from None
        except (OSError, HTTPError, http.client.HTTPException) as error:
            raise ProviderUnavailable(f"There is no connection to {_origin(url)} ({type(error).__name__}).") from error
        if 300 <= status < 400:
            raise ProviderUnavailable(f"{_origin(url)} redirects (status {status}), which is not followed.")
        if len(content) > MAX_ANSWER:
            raise ProviderUnavailable(f"The answer of {_origin(url)} is longer than {MAX_ANSWER >> 10} KiB.")
        return Answer(status, _object(url, status, media_type, content))

    def _exchange(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, str, bytes]:
        from urllib3.connection import HTTPSConnection

        parts = urlsplit(url)
        connection = HTTPSConnection(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS, ssl_context=self._tls)
        with closing(connection), cut_off_after(TOTAL_SECONDS, lambda: connection.sock):
            connection.connect()
            connection.sock.settimeout(TOTAL_SECONDS)
            connection.timeout = TOTAL_SECONDS
            sent = {"Accept": JSON, "Connection": "close", **headers}
            connection.request(method, _target(parts), body, sent, preload_content=False)
            response = connection.getresponse()
            content = response.read(MAX_ANSWER + 1, decode_content=False)
        return response.status, response.headers.get("Content-Type", ""), content


def is_https(url: object) -> bool:
    """Return whether this is an ``https://`` URL with a host, and without user, fragment, blanks and such."""
    if not isinstance(url, str) or len(url) > 1024 or not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        return bool(parts.scheme == "https" and parts.hostname and parts.port != 0 and "@" not in parts.netloc) and (
            "#" not in url
        )
    except ValueError:
        return False


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _origin(url: str) -> str:
    return f"https://{urlsplit(url).netloc}"


def _object(url: str, status: int, media_type: str, content: bytes) -> Mapping[str, Any]:
    try:
        read = json.loads(content)
    except (ValueError, RecursionError):
        read = None
    if isinstance(read, dict):
        return read
    if status >= 400:
        return {}
    raise ProviderUnavailable(f"The answer of {_origin(url)} is not a JSON object ({media_type[:64] or 'no type'}).")
