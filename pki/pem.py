"""Writes PEM."""

from __future__ import annotations

import base64

_BLOCK = 48 << 10  # bytes: a multiple of the 48 that fill a line


def pem(label: str, der: bytes) -> str:
    """The text of RFC 7468 section 2 around ``der``, with lines of 64 characters as OpenSSL writes them."""
    return f"-----BEGIN {label}-----\n{_lines(der).decode('ascii')}-----END {label}-----\n"


class PemOfSuccessors:
    """Writes PEM of documents of which each differs little from the one before: only what is new is encoded."""

    def __init__(self, label: str) -> None:
        self._begin, self._end = f"-----BEGIN {label}-----\n".encode(), f"-----END {label}-----\n".encode()
        self._blocks: list[tuple[bytes, bytes]] = []  # of the last document, with their lines

    def pem(self, der: bytes) -> bytes:
        """As the function ``pem``."""
        blocks = []
        for number, start in enumerate(range(0, len(der), _BLOCK)):
            block = der[start : start + _BLOCK]
            known = self._blocks[number] if number < len(self._blocks) else (b"", b"")
            blocks.append(known if known[0] == block else (block, _lines(block)))
        self._blocks = blocks
        return b"".join([self._begin, *(lines for _, lines in blocks), self._end])


def _lines(der: bytes) -> bytes:
    text = base64.b64encode(der)
    return b"".join([text[start : start + 64] + b"\n" for start in range(0, len(text), 64)])
