"""How the parts of paths that vary are matched."""

from __future__ import annotations

import re

from werkzeug.routing import BaseConverter


class SegmentConverter(BaseConverter):
    """One path segment of at most 512 characters."""

    regex = "[^/]{1,512}"


class RestConverter(BaseConverter):
    """All that follows, at most 8,192 characters: base64 has slashes."""

    regex = r"[\s\S]{1,8192}"
    part_isolating = False


CONVERTERS: dict[str, type[BaseConverter]] = {"segment": SegmentConverter, "rest": RestConverter}
_OF_MANY_SEGMENTS = {"request"}


def rule_of(path: str) -> str:
    """The rule by which the web framework matches a path such as ``/devices/{device_id}``."""
    return re.sub(
        r"\{(\w+)\}", lambda part: f"<{'rest' if part[1] in _OF_MANY_SEGMENTS else 'segment'}:{part[1]}>", path
    )
