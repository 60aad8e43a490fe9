"""What a device or an application may be given, what reaches too far."""

from __future__ import annotations

import itertools
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from core.errors import TopicRefused
from core.topics import (
    Access,
    Topic,
    check_application_topics,
    check_topics,
    default_topics,
    expand,
    is_device_id,
    reads_less,
)

OWN = "3f2b8c1e-9d4a-4e6b-8a57-1c0d2e3f4a5b"
OTHER = "a1b2c3d4-e5f6-4a7b-8c9d-0e1f2a3b4c5d"


def check(*filters: str, device_id: str | None = OWN, prefix: str = "devices") -> list[str]:
    topics = [Topic(filter_, Access.READWRITE) for filter_ in filters]
    return [topic.filter for topic in check_topics(topics, device_id=device_id, prefix=prefix)]


@pytest.mark.parametrize(
    ("filter_", "normal"),
    [
        ("devices/{id}/#", "devices/{id}/#"),
        ("devices/{id}", "devices/{id}"),
        (f"devices/{OWN}/#", "devices/{id}/#"),
        (f"devices/{OWN.upper()}/x", "devices/{id}/x"),
        (f"devices/{OWN.replace('-', '')}/x", "devices/{id}/x"),
        ("devices/{id}/+/temperature", "devices/{id}/+/temperature"),
        ("devices/shared/announce", "devices/shared/announce"),
        ("devices/shared/+/#", "devices/shared/+/#"),
        (f"devices/shared/{OWN}/x", "devices/shared/{id}/x"),
        ("devices/{id}/living room", "devices/{id}/living room"),
    ],
)
def test_a_filter_of_its_own_is_allowed_in_normal_form(filter_: str, normal: str) -> None:
    assert check(filter_) == [normal]


@pytest.mark.parametrize(
    "filter_",
    [
        "#",
        "+",
        "+/x",
        "+/{id}/x",
        "devices",
        "devices/",
        "devices/#",
        "devices/+",
        "devices/+/x",
        "devices/+/#",
        "other/{id}/#",
        "Devices/{id}/#",
        "devicesx/{id}/#",
        "/devices/{id}/#",
        "$SYS/#",
        "$SYS/broker/uptime",
        "$share/g/devices/{id}/#",
        "$CONTROL/dynamic-security/v1",
        "portal/generation/1",
        f"devices/{OTHER}/#",
        f"devices/{OTHER}",
        f"devices/{OTHER.upper()}/x",
        f"devices/{OTHER.replace('-', '')}/x",
        f"devices/{OTHER.replace('-', '').upper()}/x",
        f"devices/urn:uuid:{OTHER}/x",
        f"devices/{{{OTHER}}}/x",
    ],
)
def test_a_filter_that_reaches_beyond_the_device_is_refused(filter_: str) -> None:
    with pytest.raises(TopicRefused) as caught:
        check(filter_)
    assert [problem.field for problem in caught.value.errors] == ["topics.0.filter"]


@pytest.mark.parametrize(
    ("filter_", "message"),
    [
        ("", "empty"),
        ("devices/{id}/" + "x" * 240, "256 bytes"),
        ("devices/{id}/a+", "whole level"),
        ("devices/{id}/+a/b", "whole level"),
        ("devices/{id}/#/b", "last whole level"),
        ("devices/{id}/b#", "last whole level"),
        ("devices/{id}//b", "empty level"),
        ("devices/{id}/b/", "empty level"),
        ("devices//#", "empty level"),
        ("devices/{id}/\x00", "printable"),
        ("devices/{id}/a\nuser other", "printable"),
        ("devices/{id}/a\rtopic readwrite #", "printable"),
        ("devices/{id}/a\ttab", "printable"),
        ("devices/{id}/\x7f", "printable"),
        ("devices/{id}/caf\u00e9", "printable"),
        ("devices/{id}/\u2028x", "printable"),
        (" devices/{id}/#", "space"),
        ("devices/{id}/x ", "space"),
        ("devices/%u/#", "%"),
        ("devices/{id}/%c", "%"),
        ("devices/{id}x/#", "braces"),
        ("devices/{name}/#", "braces"),
        ("devices/{id}/{", "braces"),
        ("devices/{{id}}/x", "braces"),
    ],
)
def test_a_malformed_filter_is_refused_with_the_reason(filter_: str, message: str) -> None:
    with pytest.raises(TopicRefused) as caught:
        check(filter_)
    assert message in caught.value.errors[0].message
    assert filter_ not in caught.value.detail or not filter_


def test_every_refused_filter_is_named() -> None:
    with pytest.raises(TopicRefused) as caught:
        check("devices/{id}/#", "#", "devices/{id}/x", "devices/+/x")
    assert [problem.field for problem in caught.value.errors] == ["topics.1.filter", "topics.3.filter"]


@pytest.mark.parametrize("count", [0, 33])
def test_the_number_of_topics_has_limits(count: int) -> None:
    with pytest.raises(TopicRefused, match="1 to 32"):
        check(*(f"devices/{{id}}/{number}" for number in range(count)))


def test_thirty_two_topics_are_allowed() -> None:
    assert len(check(*(f"devices/{{id}}/{number}" for number in range(32)))) == 32


def test_one_filter_twice_is_refused_however_it_is_spelt() -> None:
    with pytest.raises(TopicRefused, match="twice"):
        check("devices/{id}/x", f"devices/{OWN}/x")


def test_a_device_without_an_id_yet_may_not_name_any() -> None:
    assert check("devices/{id}/#", device_id=None) == ["devices/{id}/#"]
    with pytest.raises(TopicRefused):
        check(f"devices/{OWN}/#", device_id=None)


@pytest.mark.parametrize("prefix", ["devices", "plant/line-1/devices"])
def test_the_default_is_allowed_and_expands_to_the_id(prefix: str) -> None:
    default = default_topics(prefix)
    assert check_topics(default, device_id=OWN, prefix=prefix) == default
    assert expand(default[0], OWN) == f"{prefix}/{OWN}/#"


def test_a_prefix_of_several_levels_is_needed_whole() -> None:
    assert check("plant/devices/{id}/#", prefix="plant/devices") == ["plant/devices/{id}/#"]
    for filter_ in ("plant/{id}/#", "plant/+/{id}", "plant/#", "devices/{id}/#"):
        with pytest.raises(TopicRefused):
            check(filter_, prefix="plant/devices")


@pytest.mark.parametrize("text", [OWN.upper(), OWN.replace("-", ""), OWN + "\n", " " + OWN, f"{{{OWN}}}", "", "#"])
def test_only_a_canonical_uuid_is_a_device_id(text: str) -> None:
    assert is_device_id(OWN)
    assert not is_device_id(text)


_levels = st.sampled_from(
    [
        "devices",
        "plant",
        "+",
        "#",
        "{id}",
        "",
        OWN,
        OTHER,
        OTHER.upper(),
        OTHER.replace("-", ""),
        "$SYS",
        "x",
        "%u",
        "a b",
    ]
) | st.text(max_size=6)
_filters = st.lists(_levels, min_size=1, max_size=6).map("/".join) | st.lists(_levels, max_size=4).map(
    lambda levels: "/".join(["devices", *levels])
)


@given(_filters, st.uuids(), st.lists(st.sampled_from(["x", "shared", OWN, "a b"]), max_size=4))
def test_no_accepted_filter_matches_a_topic_of_another_device(filter_: str, other: uuid.UUID, rest: list[str]) -> None:
    try:
        (topic,) = check_topics([Topic(filter_, Access.READ)], device_id=OWN, prefix="devices")
    except TopicRefused:
        return
    granted = expand(topic, OWN)
    for id_ in (str(other), OTHER):
        for spelling in (id_, id_.upper(), id_.replace("-", "")):
            assert not topic_matches_sub(granted, "/".join(["devices", spelling, *rest]))
    assert granted.startswith("devices/")
    assert granted.isprintable()
    assert check_topics([topic], device_id=OWN, prefix="devices") == (topic,)


# --- Applications


def check_application(*filters: str) -> list[str]:
    topics = [Topic(filter_, Access.READ) for filter_ in filters]
    return [topic.filter for topic in check_application_topics(topics, prefixes=("devices", "home/assistant"))]


@pytest.mark.parametrize(
    "filter_",
    [
        "devices/#",
        "devices/+",
        "devices/+/telemetry",
        "devices/+/+/#",
        f"devices/{OTHER}/#",
        "devices/shared/living room",
        "home/assistant/+/config",
    ],
)
def test_an_applications_filter_may_have_wildcards_anywhere_below_a_prefix(filter_: str) -> None:
    assert check_application(filter_) == [filter_]


@pytest.mark.parametrize(
    "filter_",
    [
        "#",
        "+/x",
        "+/+/telemetry",
        "devices",
        "devices/",
        "devicesx/#",
        "home/#",
        "home/assistant",
        "homeassistant/#",
        "$SYS/#",
        "$CONTROL/#",
        "$share/g/#",
        "$share/g/devices/+/telemetry",
        "portal/guard/#",
        "/devices/#",
        "devices/#/x",
        "devices/a+/x",
        "devices/{id}/#",
        "devices/%u/#",
        "devices/x\x00",
        "devices/x\n",
        "devices/\ud800",
        "devices/ö",
        "devices/" + "x" * 249,
        "devices/" + "x" * 65527,
    ],
    ids=lambda filter_: ascii(filter_)[:40],
)
def test_an_applications_filter_that_reaches_outside_is_refused_in_a_sentence(filter_: str) -> None:
    with pytest.raises(TopicRefused) as refused:
        check_application(filter_)
    assert refused.value.detail.startswith("topics.0.filter must")
    assert refused.value.detail.endswith(".")


def test_an_application_has_1_to_64_topics_that_fit_into_a_line_of_the_journal() -> None:
    assert len(check_application(*(f"devices/{number}" for number in range(64)))) == 64
    assert len(check_application(*("devices/" + "x" * 246 + f"{number:02}" for number in range(64)))) == 64
    for filters in (
        [],
        [f"devices/{number}" for number in range(65)],
        ["devices/" + " x" * 123 + f"{number:02}" for number in range(64)],
        ["devices/#", "devices/#"],
    ):
        with pytest.raises(TopicRefused):
            check_application(*filters)


# --- Topics that are lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        (["devices/{id}/#:readwrite"], ["devices/{id}/#:readwrite"], False),
        (["devices/{id}/#:readwrite"], ["devices/{id}/#:read"], False),
        (["devices/{id}/#:readwrite"], ["devices/{id}/#:write"], True),
        (["devices/{id}/#:read"], ["devices/{id}/+:read"], True),
        (["devices/{id}/+:read"], ["devices/{id}/#:read"], False),
        (["devices/{id}:read"], ["devices/{id}/#:read"], False),  # which has its parent
        (["devices/{id}/#:read"], ["devices/{id}/+/#:read", "devices/{id}:read"], True),  # not by one alone
        (["devices/{id}/a:read", "devices/b:read"], ["devices/+/a:read", "devices/b:read", "devices/c:read"], False),
        (["devices/{id}/a:read", "devices/b:read"], ["devices/{id}/a:read"], True),
        (["devices/{id}/a/b:read"], ["devices/{id}/a:read"], True),
        (["devices/{id}/a:read"], ["devices/{id}/a/b:read"], True),
        (["devices/{id}/a:write"], ["devices/{id}/b:write"], False),
        (["devices/+/x:read"], ["devices/a/x:read"], True),
    ],
)
def test_who_can_read_less_is_told_from_who_cannot(before: list[str], after: list[str], *, lost: bool) -> None:
    had, has = (
        [Topic(f, Access(a)) for f, _, a in (text.rpartition(":") for text in texts)] for texts in (before, after)
    )
    assert reads_less(had, has) is lost


LEVELS = st.sampled_from(["a", "b", "+"])
FILTERS = st.builds(
    lambda levels, end: "/".join([*levels, *end]),
    st.lists(LEVELS, min_size=1, max_size=3),
    st.sampled_from([[], ["#"]]),
)
TOPICS = ["/".join(levels) for count in range(1, 6) for levels in itertools.product("ab", repeat=count)]


@given(before=FILTERS, after=FILTERS)
def test_what_a_filter_contains_is_what_it_matches(before: str, after: str) -> None:
    matched = [topic for topic in TOPICS if topic_matches_sub(before, topic)]
    lost = reads_less([Topic(before, Access.READ)], [Topic(after, Access.READ)])
    if not all(topic_matches_sub(after, topic) for topic in matched):
        assert lost
    elif "+" not in before and "#" not in before:
        assert not lost
