from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http import errors, get_parser
from hypothesis import given
from hypothesis import strategies as st

from web.serving_framing import BegunRequest, RequestScanner, WholeRequest
from web.serving_refusals import RequestRefused

LIMIT = 2000
HEAD = b"POST /%d HTTP/1.1\r\nHost: localhost\r\n"


def taken(stream: bytes, cuts: list[int]) -> list[WholeRequest | int]:
    """What a scanner makes of a stream that arrives cut at these places; a refusal, as its status, ends it."""
    scanner, buffer, found = RequestScanner(LIMIT), bytearray(), list[WholeRequest | int]()
    for start, end in pairwise([0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]):
        buffer += stream[start:end]
        try:
            while request := scanner.take(buffer):
                assert isinstance(request, WholeRequest)
                found.append(request)
        except RequestRefused as refusal:
            return [*found, refusal.status.value]
    return found


def with_length(number: int, body: bytes) -> bytes:
    return HEAD % number + b"Content-Length: %d\r\n\r\n" % len(body) + body


def with_chunks(number: int, chunks: list[bytes]) -> bytes:
    text = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return HEAD % number + b"Transfer-Encoding: chunked\r\n\r\n" + text + b"0\r\n\r\n"


bodies = st.binary(max_size=60)
chunk_lists = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
cut_lists = st.lists(st.integers(0, 10_000), max_size=12)


@given(st.lists(bodies | chunk_lists, min_size=1, max_size=4), cut_lists)
def test_requests_are_found_however_they_are_cut(sent: list[bytes | list[bytes]], cuts: list[int]) -> None:
    stream = b"".join(
        with_length(number, body) if isinstance(body, bytes) else with_chunks(number, body)
        for number, body in enumerate(sent)
    )
    expected = [body if isinstance(body, bytes) else b"".join(body) for body in sent]
    found = taken(stream, cuts)
    assert [request.body for request in found if isinstance(request, WholeRequest)] == expected
    assert len(found) == len(sent)


@given(bodies | chunk_lists, cut_lists)
def test_a_streamed_body_is_whole_however_it_is_cut(sent: bytes | list[bytes], cuts: list[int]) -> None:
    stream = with_length(1, sent) if isinstance(sent, bytes) else with_chunks(1, sent)
    scanner, buffer, body = RequestScanner(0, {b"POST /1": LIMIT}), bytearray(), b""
    begun: WholeRequest | BegunRequest | None = None
    for start, end in pairwise([0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]):
        buffer += stream[start:end]
        begun = begun or scanner.take(buffer)
        if begun is not None:
            assert isinstance(begun, BegunRequest)
            begun.coming.take(buffer)
            body += begun.coming.data
            begun.coming.data.clear()
    assert isinstance(begun, BegunRequest)
    assert begun.coming.whole
    assert body == (sent if isinstance(sent, bytes) else b"".join(sent))
    assert not buffer


fragments = st.sampled_from(
    [
        *(b"Content-Length: 3\r\n", b"content-length:0\r\n", b"Content-Length: 3, 3\r\n", b"Content-Length : 3\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked, identity\r\n", b"Transfer-Encoding:\r\n"),
        *(b"Host: a\r\n", b"X: y\r\n", b" folded\r\n", b"\r\n", b"\n", b"\r", b"\0", b"\x0b", b"\xa0", b"\xc2\xb2"),
        *(b"GET / HTTP/1.1\r\n", b"POST /a HTTP/1.0\r\n", b"3\r\nabc\r\n0\r\n\r\n", b"abc", b"0\r\n\r\n", b"1;x\r\n"),
    ]
)
streams = st.lists(fragments, max_size=14).map(b"".join) | st.lists(fragments, max_size=10).map(
    lambda parts: b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(parts)
)


@given(streams, cut_lists)
def test_what_is_found_does_not_depend_on_where_the_stream_is_cut(stream: bytes, cuts: list[int]) -> None:
    assert taken(stream, cuts) == taken(stream, [])


@given(streams)
def test_the_parser_never_frames_an_accepted_request_otherwise(stream: bytes) -> None:
    position = 0
    for request in taken(stream, []):
        if not isinstance(request, WholeRequest):
            return
        try:
            parsed: Any = next(get_parser(Config(), [stream[position:]], ("127.0.0.1", 1)))
            body = parsed.body.read()
        except (errors.ParseException, errors.NoMoreData):
            return  # stricter than the scanner: the connection is closed
        assert body == request.body
        rest = parsed.unreader.take_buffered()
        position = len(stream) - len(rest)


@pytest.mark.parametrize("size", [0, 1, 50_000])
def test_a_head_that_does_not_end_is_refused(size: int) -> None:
    stream = HEAD % 1 + b"X: " + b"x" * size
    assert taken(stream, list(range(0, size, 1000))) == ([431] if size > 16_000 else [])


def test_a_body_of_small_chunks_does_not_grow_without_end() -> None:
    assert taken(with_chunks(1, [b"x"] * 1990), []) != [413]
    assert taken(with_chunks(1, [b"x"] * 2001), []) == [413]
