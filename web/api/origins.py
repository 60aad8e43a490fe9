"""What browsers say in headers of where a request comes from, which anybody else can say, too."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit


def parts_of(url: str) -> SplitResult | None:
    """Return the parts of a URL in a header, ``None`` if it is none, as with brackets that do not match."""
    try:
        return urlsplit(url)
    except ValueError:
        return None
