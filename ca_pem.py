"""Writes PEM."""

from __future__ import annotations

import base64


def pem(label: str, der: bytes) -> str:
    """The text of RFC 7468 section 2 around ``der``, with lines of 64 characters as OpenSSL writes them."""
    text = base64.b64encode(der).decode("ascii")
    lines = (text[start : start + 64] for start in range(0, len(text), 64))
    return "\n".join((f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""))
