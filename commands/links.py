"""Download links, and the keys by which a repeated request is known: without HTTP, which takes long to import."""

from __future__ import annotations

import hashlib
import re
import secrets
from urllib.parse import urlsplit

from commands.connection import is_loopback
from commands.errors import Misused

_PATH = re.compile(r"/download/[A-Za-z0-9._~=-]{8,2048}")


def new_idempotency_key() -> str:
    """Return 192 random bits as text: the portal seals with this key what it keeps for a repeat."""
    return secrets.token_urlsafe(24)


def key_of_download(key: str) -> str:
    """Return the idempotency key of the download that belongs to a request with an idempotency ``key``.

    So the same command again fetches the same bundle, for as long as the portal keeps that.
    """
    return hashlib.sha256(f"download {key}".encode()).hexdigest()


def check_link(link: str) -> str:
    """Return a valid download link; raises ``Misused``, without the link in the message."""
    try:
        parts = urlsplit(link.strip())
        host = parts.hostname or ""
    except ValueError:
        host = ""
    whole = host and not parts.query and not parts.fragment and "@" not in parts.netloc
    if not whole or re.search(_PATH.pattern + "$", parts.path) is None:
        raise Misused(
            "This is not a download link; it must look like https://portal.example.com:8443/download/… without spaces."
        )
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise Misused("A download link must begin with https://.")
    return link.strip()
