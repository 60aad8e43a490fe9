"""The static files of the console: read once, and served under a path that names their content.

The path has a hash of all of them, so that a browser keeps each for a year and still has the new ones after an upgrade.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
PREFIX = "/ui/static"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is served."""

    content: bytes
    media_type: str


def _read() -> Mapping[str, StaticFile]:
    paths = sorted(path for path in FOLDER.iterdir() if path.suffix in _MEDIA_TYPES)
    return {path.name: StaticFile(path.read_bytes(), _MEDIA_TYPES[path.suffix]) for path in paths}


FILES = _read()
VERSION = hashlib.sha256(b"".join(name.encode() + one.content for name, one in FILES.items())).hexdigest()[:16]


def find(version: str, name: str) -> StaticFile | None:
    """Return the file of this name, if the path that was asked for names the content that there is now."""
    return FILES.get(name) if version == VERSION else None


def url_of(name: str) -> str:
    """Return the path of a static file; raises ``KeyError`` if there is none of this name."""
    if name not in FILES:
        raise KeyError(name)
    return f"{PREFIX}/{VERSION}/{name}"
