"""Lets clients and caches keep an answer, without sending it again to who has it."""

from __future__ import annotations

import hashlib
from datetime import datetime
from email.utils import format_datetime, parsedate_to_datetime

from web.api.routing import Call, Reply


def cached(
    call: Call,
    content: bytes,
    media_type: str,
    *,
    max_age: int,
    last_modified: datetime | None = None,
    expires: datetime | None = None,
    directives: str = "",
    tag: str = "",
) -> Reply:
    """Give ``content`` to be kept for ``max_age`` seconds; answer 304 where the client has it (RFC 9110 section 13.1).

    ``directives`` are further ones of Cache-Control, after a comma; ``tag`` names the content where its name is known.
    """
    etag = f'"{tag or tag_of(content)}"'
    headers = {"ETag": etag, "Cache-Control": f"public, max-age={max_age}{directives}"}
    if last_modified is not None:
        headers["Last-Modified"] = format_datetime(last_modified, usegmt=True)
    if expires is not None:
        headers["Expires"] = format_datetime(expires, usegmt=True)
    wanted = call.headers.get("If-None-Match")
    if call.method not in ("GET", "HEAD"):
        fresh = False
    elif wanted is not None:
        fresh = wanted.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in wanted.split(",")]
    else:
        fresh = last_modified is not None and _not_modified_since(call.headers.get("If-Modified-Since"), last_modified)
    if fresh:
        return Reply(content=b"", media_type="", status=304, headers=headers)
    return Reply(content=content, media_type=media_type, headers=headers)


def tag_of(content: bytes) -> str:
    """What names this content and no other, for an entity tag: the first half of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:32]


def _not_modified_since(header: str | None, last_modified: datetime) -> bool:
    try:
        return header is not None and parsedate_to_datetime(header) >= last_modified.replace(microsecond=0)
    except (ValueError, TypeError):
        return False
