"""Whatever comes from outside is read or refused in the portal's own words, and never breaks what reads it."""

from __future__ import annotations

import base64
import contextlib
import json
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from commands.bundle import open_bundle
from commands.errors import CheckFailed
from commands.vocabulary import NAMES
from core.errors import InputInvalid
from core.states import PresenceState
from store.devices import DeviceFilter
from tests.support.portal_stub import BUNDLE_PASSWORD, build_bundle
from web.api.audit import AuditQuery
from web.api.devices import DeviceQuery, PatchRequest, RegisterRequest
from web.api.lifecycle import RevokeRequest
from web.api.tokens import TokenRequest
from workflows.devices import _read_cursor

BODIES: tuple[type[BaseModel], ...] = (RegisterRequest, PatchRequest, RevokeRequest, TokenRequest)
QUERIES: tuple[type[BaseModel], ...] = (DeviceQuery, AuditQuery)
FILES = {name: b"content of " + name.encode() for name in NAMES}

fields = st.sampled_from([*RegisterRequest.model_fields, *TokenRequest.model_fields, "reason", "__class__"])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
bodies = (
    st.binary()
    | values.map(json.dumps).map(str.encode)
    | st.dictionaries(fields, values).map(json.dumps).map(str.encode)
)
pieces = values | st.tuples(st.datetimes().map(str), st.uuids().map(str)).map(list)


@given(bodies, st.sampled_from(BODIES))
def test_a_body_fits_or_is_refused(body: bytes, model: type[BaseModel]) -> None:
    with contextlib.suppress(ValidationError):
        read = model.model_validate_json(body)
        assert json.loads(body).keys() <= set(model.model_fields)
        read.model_dump_json().encode()


@given(st.dictionaries(st.sampled_from([*DeviceQuery.model_fields, *AuditQuery.model_fields]), st.text()))
def test_a_query_fits_or_is_refused(query: dict[str, str]) -> None:
    for model in QUERIES:
        with contextlib.suppress(ValidationError):
            assert model.model_validate(query).model_fields_set <= set(query)


@given(
    st.text() | pieces.map(json.dumps).map(lambda text: base64.urlsafe_b64encode(text.encode()).decode()),
    st.sampled_from(
        [
            DeviceFilter(),
            DeviceFilter(sort="name"),
            DeviceFilter(sort="last_seen"),
            DeviceFilter(connected=PresenceState.OFFLINE),
        ]
    ),
)
def test_a_cursor_leads_to_a_place_or_is_refused(cursor: str, wanted: DeviceFilter) -> None:
    with contextlib.suppress(InputInvalid):
        *states, at, device_id = _read_cursor(cursor, "default", wanted, wanted)
        assert len(states) == (wanted.sort is not None)
        assert at.tzinfo is UTC
        assert at <= datetime.max.replace(tzinfo=UTC)
        assert len(device_id) == 36


names = st.text(min_size=1, max_size=40).filter(lambda name: "\0" not in name) | st.sampled_from(
    [
        f"{before}{name}{after}"
        for name in NAMES
        for before in ("", "/", "../", "./", "C:\\")
        for after in ("", "/", " ")
    ]
)


@given(st.dictionaries(names, st.binary(max_size=20), max_size=4))
def test_only_the_names_of_a_bundle_come_out_of_a_bundle(more: dict[str, bytes]) -> None:
    try:
        opened = open_bundle(build_bundle(FILES | more), BUNDLE_PASSWORD)
    except CheckFailed:
        return
    assert set(opened.files) <= set(NAMES)
    for name in ("device.key", "ca.pem", "device.pem", "chain.pem"):
        assert opened.files[name] == (FILES | more)[name]
    for note in opened.notes:
        assert note.isprintable()


@given(st.binary(max_size=400))
def test_what_is_no_zip_is_one_sentence(content: bytes) -> None:
    whole = build_bundle({name: FILES[name] for name in ("device.key", "ca.pem", "device.pem", "chain.pem")})
    for bundle in (content, whole[: len(content)] + content, content + whole[len(content) :]):
        with contextlib.suppress(CheckFailed):
            assert set(open_bundle(bundle, BUNDLE_PASSWORD).files) <= set(NAMES)
