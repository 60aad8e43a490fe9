"""The access list as text: what is in it, what its checker refuses."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.files.acl import Acl, check_style, validate_acl
from broker_provisioning import add_device_acl, remove_device_acl
from core.broker_control import AclStyle
from core.errors import ProjectionInvalid, TopicRefused
from core.topics import Access, Topic, default_topics

ONE = "3f2b8c1e-9d4a-4e6b-8a57-1c0d2e3f4a5b"
TWO = "a1b2c3d4-e5f6-4a7b-8c9d-0e1f2a3b4c5d"
WIDER = (*default_topics("devices"), Topic("devices/shared/announce", Access.READ))
NARROWER = (Topic("devices/{id}/telemetry", Access.WRITE),)
PER_DEVICE, PATTERN = AclStyle.PER_DEVICE, AclStyle.PATTERN


def rendered(acl: Acl, generation: int = 7) -> list[str]:
    content = acl.render(generation)
    validate_acl(content, generation, style=acl.style, prefix=acl.prefix)
    return content.decode().splitlines()


def per_device() -> Acl:
    acl = Acl(PER_DEVICE, "devices")
    add_device_acl(acl, ONE, None)
    add_device_acl(acl, TWO, NARROWER)
    return acl


def test_an_allow_list_has_one_block_a_device() -> None:
    lines = rendered(per_device())
    assert lines[1:] == [
        "# generation 7",
        "# style per-device",
        "user portal",
        "topic write portal/acl/7",
        "topic read $SYS/broker/version",
        f"user {ONE}",
        f"topic readwrite devices/{ONE}/#",
        f"user {TWO}",
        f"topic write devices/{TWO}/telemetry",
        "# end 7 2",
    ]


def test_a_device_out_of_an_allow_list_is_not_named_at_all() -> None:
    acl = per_device()
    remove_device_acl(acl, ONE)
    assert ONE not in "\n".join(rendered(acl))


def test_the_pattern_covers_devices_without_a_block() -> None:
    acl = Acl(PATTERN, "devices")
    add_device_acl(acl, ONE, None)
    assert rendered(acl)[3:] == [
        "pattern readwrite devices/%u/#",
        "user portal",
        "topic write portal/acl/7",
        "topic read $SYS/broker/version",
        "topic deny devices/portal/#",
        "# end 7 0",
    ]


def test_a_device_out_of_the_pattern_is_left_to_the_crl() -> None:
    acl = Acl(PATTERN, "devices")
    add_device_acl(acl, ONE, WIDER)
    remove_device_acl(acl, ONE)
    assert ONE not in "\n".join(rendered(acl))


def test_topics_wider_than_the_default_stand_beside_the_pattern() -> None:
    acl = Acl(PATTERN, "devices")
    add_device_acl(acl, ONE, WIDER)
    assert rendered(acl)[-4:-1] == [
        f"user {ONE}",
        f"topic readwrite devices/{ONE}/#",
        "topic read devices/shared/announce",
    ]


def test_topics_that_the_pattern_cannot_express_close_the_device() -> None:
    acl = Acl(PATTERN, "devices")
    add_device_acl(acl, ONE, NARROWER)
    assert rendered(acl)[-3:-1] == [f"user {ONE}", "topic deny #"]
    assert list(acl.closed) == [ONE]
    assert "PORTAL_ACL_STYLE=per-device" in acl.closed[ONE]
    add_device_acl(acl, ONE, WIDER)
    assert not acl.closed


@pytest.mark.parametrize("style", list(AclStyle))
def test_stored_topics_that_are_not_allowed_any_more_close_the_device(style: AclStyle) -> None:
    acl = Acl(style, "plant")
    add_device_acl(acl, ONE, default_topics("devices"))
    assert list(acl.closed) == [ONE]
    assert "devices/" not in "\n".join(rendered(acl))


@pytest.mark.parametrize("style", list(AclStyle))
def test_an_application_may_do_nothing_by_an_acl_which_grants_every_subscribe(style: AclStyle) -> None:
    acl = Acl(style, "devices")
    acl.grant_application(ONE, [Topic("devices/+/telemetry", Access.READ)])
    assert list(acl.closed) == [ONE]
    assert "PORTAL_BROKER_CONTROL=guard" in acl.closed[ONE]
    assert "telemetry" not in "\n".join(rendered(acl))
    assert (f"user {ONE}" in rendered(acl)) is (style is PATTERN)  # else the pattern would grant it its own


def test_the_style_is_checked_where_topics_come_in() -> None:
    check_style(NARROWER, PER_DEVICE, "devices")
    check_style(None, PATTERN, "devices")
    check_style(WIDER, PATTERN, "devices")
    with pytest.raises(TopicRefused, match="narrower than the default need PORTAL_ACL_STYLE=per-device"):
        check_style(NARROWER, PATTERN, "devices")
    with pytest.raises(TopicRefused):
        check_style((Topic("devices/{id}/#", Access.READ),), PATTERN, "devices")


@pytest.mark.parametrize(
    "device_id",
    ["", "portal", ONE.upper(), f"{ONE}\ntopic readwrite #", f"{ONE}\n", "#", f" {ONE}", ONE.replace("-", "")],
)
def test_what_is_no_device_id_never_reaches_the_text(device_id: str) -> None:
    acl = Acl(PER_DEVICE, "devices")
    with pytest.raises(ValueError, match="UUID"):
        add_device_acl(acl, device_id, None)
    with pytest.raises(ValueError, match="UUID"):
        remove_device_acl(acl, device_id)
    assert len(acl) == 0


@given(st.text())
def test_no_filter_can_add_a_line(filter_: str) -> None:
    acl = Acl(PER_DEVICE, "devices")
    add_device_acl(acl, ONE, [Topic(filter_, Access.READ)])
    add_device_acl(acl, TWO, [Topic(f"devices/{{id}}/{filter_}", Access.READ)])
    lines = rendered(acl)
    assert len(lines) == 7 + 2 * len(acl)


@given(st.lists(st.tuples(st.uuids(), st.sampled_from([None, WIDER, NARROWER, "out"])), max_size=20))
def test_what_is_rendered_passes_the_checker(changes: list[tuple[uuid.UUID, tuple[Topic, ...] | str | None]]) -> None:
    for style in AclStyle:
        acl = Acl(style, "plant/devices")
        for id_, topics in changes:
            if isinstance(topics, str):
                remove_device_acl(acl, str(id_))
            else:
                add_device_acl(acl, str(id_), topics)
        content = acl.render(12)
        validate_acl(content, 12, style=style, prefix="plant/devices")
        validate_acl(content, 12)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# Written by", "# written by"),
        ("# generation 7", "# generation 8"),
        ("# style per-device", "# style pattern"),
        ("# style per-device", "# style other"),
        ("# end 7 2\n", ""),
        ("# end 7 2\n", "# end 7 2"),
        ("# end 7 2", "# end 8 2"),
        ("# end 7 2", "# end 7 3"),
        ("user portal\n", ""),
        ("portal/acl/7", "portal/acl/8"),
        ("topic write portal/acl/7", "topic write #"),
        ("user portal\n", "topic readwrite #\nuser portal\n"),
        ("user portal\n", "pattern readwrite devices/%u/#\nuser portal\n"),
        (f"user {ONE}\n", ""),
        (f"user {ONE}", f"user {ONE.upper()}"),
        (f"user {ONE}", f"user {TWO}"),
        (f"user {ONE}", "user portal"),
        (f"readwrite devices/{ONE}/#", f"readwrite devices/{TWO}/#"),
        (f"readwrite devices/{ONE}/#", f"readwrite devices/{TWO.upper()}/#"),
        (f"readwrite devices/{ONE}/#", "readwrite #"),
        (f"readwrite devices/{ONE}/#", "readwrite devices/#"),
        (f"readwrite devices/{ONE}/#", "readwrite devices/+/x"),
        (f"readwrite devices/{ONE}/#", "readwrite $SYS/#"),
        (f"readwrite devices/{ONE}/#", "readwrite devices/%u/#"),
        (f"readwrite devices/{ONE}/#", f"devices/{ONE}/#"),
        (f"readwrite devices/{ONE}/#", f"readwrite devices/{ONE}/#/x"),
        (f"devices/{ONE}/#\n", f"devices/{ONE}/#\n\n"),
        (f"devices/{ONE}/#\n", f"devices/{ONE}/#\r\n"),
        (f"devices/{ONE}/#\n", f"devices/{ONE}/#\ntopic deny #\n"),
        (f"topic readwrite devices/{ONE}/#\n", ""),
    ],
)
def test_an_altered_file_is_refused(old: str, new: str) -> None:
    content = per_device().render(7).decode()
    assert content.count(old) == 1
    with pytest.raises(ProjectionInvalid):
        validate_acl(content.replace(old, new).encode(), 7, style=PER_DEVICE, prefix="devices")


def test_a_file_cut_anywhere_is_refused() -> None:
    content = per_device().render(7)
    for length in range(len(content)):
        with pytest.raises(ProjectionInvalid):
            validate_acl(content[:length], 7)


def test_a_file_of_another_prefix_is_refused() -> None:
    with pytest.raises(ProjectionInvalid):
        validate_acl(per_device().render(7), 7, prefix="plant")


# --- What the broker must load ------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", list(AclStyle))
def test_who_is_revoked_suspended_or_resumed_gives_the_broker_nothing_to_load(style: AclStyle) -> None:
    acl, wide = Acl(style, "devices"), WIDER
    for device_id in (ONE, TWO):
        add_device_acl(acl, device_id, wide)
    installed = acl.render(7)
    acl.grant(ONE, wide)
    remove_device_acl(acl, TWO)
    assert not acl.must_be_loaded(installed)
    assert TWO not in acl.render(7).decode()


def test_under_the_pattern_style_a_device_with_the_default_topics_gives_the_broker_nothing_to_load() -> None:
    acl = Acl(PATTERN, "devices")
    installed = acl.render(7)
    add_device_acl(acl, ONE, None)
    remove_device_acl(acl, ONE)
    assert not acl.must_be_loaded(installed)


@pytest.mark.parametrize(
    ("style", "before", "after"),
    [
        (PER_DEVICE, "nothing", None),
        (PER_DEVICE, None, NARROWER),
        (PATTERN, "nothing", WIDER),
        (PATTERN, WIDER, None),
        (PATTERN, WIDER, NARROWER),  # denied everything, since the pattern cannot be narrowed
    ],
)
def test_other_topics_of_a_device_have_to_be_loaded(
    style: AclStyle, before: tuple[Topic, ...] | str | None, after: tuple[Topic, ...] | None
) -> None:
    acl = Acl(style, "devices")
    if not isinstance(before, str):
        add_device_acl(acl, ONE, before)
    installed = acl.render(7)
    acl.settle()
    add_device_acl(acl, ONE, after)
    assert acl.must_be_loaded(installed)


def test_who_is_out_since_the_last_installation_only_may_be_in_the_brokers_acl() -> None:
    acl = per_device()
    installed = acl.render(7)
    remove_device_acl(acl, ONE)
    acl.settle()
    assert acl.must_be_loaded(installed)


@pytest.mark.parametrize(
    "installed",
    [
        b"",
        Acl(PATTERN, "devices").render(7),
        Acl(PER_DEVICE, "plant").render(7).replace(b"# generation", b"# Generation"),
        Acl(PER_DEVICE, "plant").render(7).replace(b"topic read $SYS/broker/version\n", b""),
    ],
    ids=["none", "other style", "no number", "of a portal before this one"],
)
def test_an_acl_of_another_kind_has_to_be_replaced(installed: bytes) -> None:
    assert Acl(PER_DEVICE, "plant").must_be_loaded(installed)
