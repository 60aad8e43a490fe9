"""Decides which MQTT topic filters a device, or an application, may be given."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from core.errors import FieldProblem, TopicRefused

DEVICE_ID = "{id}"  # stands for the device's own id, always as a whole level
MAX_TOPICS = 32
MAX_APPLICATION_TOPICS = 64
MAX_FILTER_BYTES = 256  # with the device's id in the place of {id}
# All filters of an application together, a space as the three bytes that it has in the guard's journal: they are in
# one line of it.
MAX_APPLICATION_BYTES = 16384
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PRINTABLE_ASCII = re.compile(r"[ -~]+")


class Access(StrEnum):
    """What a device may do with the topics of a filter; the text is the keyword of Mosquitto's ACL."""

    READ = "read"
    WRITE = "write"
    READWRITE = "readwrite"


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic filter, in which ``{id}`` is a placeholder for the device's id, and the access to its topics."""

    filter: str
    access: Access


def is_device_id(text: str) -> bool:
    """Tell whether ``text`` is a UUID in the form of device ids: lower case, with hyphens (RFC 9562 section 4)."""
    return _CANONICAL_UUID.fullmatch(text) is not None


def check_device_id(text: str) -> None:
    """Raise ``ValueError`` unless ``text`` has the form of device ids, in which nothing can end a line or a filter."""
    if not is_device_id(text):
        raise ValueError("a device's id must be a UUID in lower case with hyphens")


def default_topics(prefix: str) -> tuple[Topic, ...]:
    """Return the topics of a device for which none were requested: everything below its id."""
    return (Topic(f"{prefix}/{DEVICE_ID}/#", Access.READWRITE),)


def expand(topic: Topic, device_id: str) -> str:
    """Return the filter of ``topic`` with the device's id in place of ``{id}``, as the broker is given it."""
    return topic.filter.replace(DEVICE_ID, device_id)


def literal_levels(filter_: str) -> str:
    """Return the levels of a filter before the first wildcard or ``{id}``: every topic that it matches begins so."""
    levels = filter_.split("/")
    return "/".join(itertools.takewhile(lambda level: level not in ("+", "#", DEVICE_ID), levels))


def reads_less(before: Iterable[Topic], after: Iterable[Topic]) -> bool:
    """Tell whether some filter that could be read ``before`` is not contained in one that can be ``after``.

    Both are valid filters with the same meaning of ``{id}``. One that only several others cover together
    counts as lost.
    """
    readable = [topic.filter.split("/") for topic in after if topic.access is not Access.WRITE]
    return any(
        not any(_contains(outer, topic.filter.split("/")) for outer in readable)
        for topic in before
        if topic.access is not Access.WRITE
    )


def _contains(outer: Sequence[str], inner: Sequence[str]) -> bool:
    """Tell whether ``outer`` matches every topic that ``inner`` does, both as levels (MQTT 5.0 section 4.7)."""
    for index, level in enumerate(outer):
        if level == "#":  # matches its parent, too
            return True
        if index == len(inner) or inner[index] == "#" or level not in ("+", inner[index]):
            return False
    return len(outer) == len(inner)


def check_topics(topics: Iterable[Topic], *, device_id: str | None, prefix: str) -> tuple[Topic, ...]:
    """Return the topics in normal form (the device's own id becomes ``{id}``) or raise ``TopicRefused``.

    A filter is allowed if it is a valid topic filter (MQTT 5.0 section 4.7) of printable ASCII that begins with the
    levels of ``prefix``, followed by a level that is ``{id}``, the device's own id, or a literal that is not a UUID in
    any spelling. So no wildcard can match the id of another device. ``device_id`` is None for a device that has no id
    yet. The error names each field refused, as ``topics.<index>.filter``.
    """
    normal = [Topic(_with_own_id_as_placeholder(topic.filter, device_id, prefix), topic.access) for topic in topics]
    return _checked(normal, lambda levels: _reach_problem(levels, prefix), MAX_TOPICS)


def check_application_topics(topics: Iterable[Topic], *, prefixes: Sequence[str]) -> tuple[Topic, ...]:
    """Return the topics of an application, or raise ``TopicRefused`` as ``check_topics`` does.

    A filter is allowed if it is a valid one of printable ASCII that begins with the levels of one of ``prefixes``,
    followed by at least one level: any, also a wildcard, and the id of any device.
    """
    topics = tuple(topics)
    size = sum(len(topic.filter) + 2 * topic.filter.count(" ") for topic in topics)
    checked = _checked(topics, lambda levels: _application_problem(levels, prefixes), MAX_APPLICATION_TOPICS)
    if size > MAX_APPLICATION_BYTES:
        raise _refused(
            f"must have at most {MAX_APPLICATION_BYTES} bytes in all filters together, a space counted as three"
        )
    return checked


def _checked(topics: Sequence[Topic], reach_problem: Callable[[list[str]], str | None], most: int) -> tuple[Topic, ...]:
    """Check topics whose reach, of a filter's levels, is judged by ``reach_problem``."""
    if not 1 <= len(topics) <= most:
        raise _refused(f"must hold 1 to {most} topics")
    checked: list[Topic] = []
    problems: list[FieldProblem] = []
    seen: set[str] = set()
    for index, topic in enumerate(topics):
        problem = _syntax_problem(topic.filter) or reach_problem(topic.filter.split("/"))
        if problem is None and topic.filter in seen:
            problem = "is there twice; give each filter once, with readwrite for both directions"
        if problem is not None:
            problems.append(FieldProblem(f"topics.{index}.filter", problem))
            continue
        seen.add(topic.filter)
        checked.append(Topic(topic.filter, Access(topic.access)))
    if problems:
        raise TopicRefused(f"{problems[0].field} {problems[0].message}.", problems)
    return tuple(checked)


def _refused(message: str) -> TopicRefused:
    return TopicRefused(f"topics {message}.", [FieldProblem("topics", message)])


def _with_own_id_as_placeholder(filter_: str, device_id: str | None, prefix: str) -> str:
    """Replace the level after the prefix where it is the own id in any spelling, other levels where it is exact."""
    if device_id is None:
        return filter_
    place = prefix.count("/") + 1
    own = _bare_uuid(device_id)
    levels = filter_.split("/")
    for index, level in enumerate(levels):
        if level == device_id or (index == place and own is not None and _bare_uuid(level) == own):
            levels[index] = DEVICE_ID
    return "/".join(levels)


def _syntax_problem(filter_: str) -> str | None:
    if not filter_:
        return "must not be empty"
    if len(filter_) > MAX_FILTER_BYTES or len(filter_.replace(DEVICE_ID, "x" * 36)) > MAX_FILTER_BYTES:
        return f"must have at most {MAX_FILTER_BYTES} bytes, with the device's id in the place of {DEVICE_ID}"
    if not _PRINTABLE_ASCII.fullmatch(filter_):
        return "must be printable ASCII, with no control characters"
    if filter_ != filter_.strip():
        return "must not begin or end with a space"
    if "%" in filter_:
        return "must not contain %, which the broker would replace"
    return _level_problem(filter_.split("/"))


def _level_problem(levels: list[str]) -> str | None:
    if "" in levels:
        return "must have no empty level, and not begin or end with /"
    for index, level in enumerate(levels):
        if "+" in level and level != "+":
            return "must have + as a whole level only"
        if "#" in level and (level != "#" or index != len(levels) - 1):
            return "must have # as the last whole level only"
        if ("{" in level or "}" in level) and level != DEVICE_ID:
            return f"must have braces only in {DEVICE_ID}, as a whole level"
    return None


def _reach_problem(levels: list[str], prefix: str) -> str | None:
    wanted = prefix.split("/")
    if levels[: len(wanted)] != wanted or len(levels) <= len(wanted):
        return f"must begin with {prefix}/{DEVICE_ID} or {prefix}/ and a name"
    place = levels[len(wanted)]
    if place in ("+", "#"):
        return f"must have no wildcard directly after {prefix}/, where the device's id is"
    if place != DEVICE_ID and _bare_uuid(place) is not None:
        return f"must not name another device; use {DEVICE_ID} for this one"
    return None


def _application_problem(levels: list[str], prefixes: Sequence[str]) -> str | None:
    if DEVICE_ID in levels:
        return f"must not contain {DEVICE_ID}; an application uses + for the ids of all devices, or a certain id"
    for prefix in prefixes:
        wanted = prefix.split("/")
        if levels[: len(wanted)] == wanted and len(levels) > len(wanted):
            return None
    begin = " or ".join(f"{prefix}/" for prefix in prefixes)
    return f"must begin with {begin} and have a level after it; PORTAL_TOPIC_PREFIXES allows other prefixes"


def _bare_uuid(level: str) -> str | None:
    """Return the 32 hex digits of a UUID in any common spelling, or None if the text is not a UUID."""
    digits = level.lower().removeprefix("urn:uuid:").strip("{}").replace("-", "")
    return digits if re.fullmatch(r"[0-9a-f]{32}", digits) else None
