"""Pages of changes for agents: what is in one, and that nothing is taken for a page that is not whole."""

from __future__ import annotations

import hashlib
import uuid

import pytest

from broker.guard import feed
from broker.guard.feed import (
    MAX_LINE,
    FeedDraft,
    Lines,
    Mark,
    Page,
    PageReader,
    ReadPage,
    Sessions,
    TrustNames,
    none_line,
    split_lines,
)
from core.errors import ProjectionInvalid
from core.tenants import TenantOnBroker
from core.topics import Access, Topic

NAMES = TrustNames("a" * 64, "b" * 64)
ONE, TWO = (str(uuid.UUID(int=number)) for number in (1, 2))
ACME = TenantOnBroker("acme", "sites/acme plant", suspended=True)


def page_of(*, since: int = 3, generation: int = 7, newest: int = 7) -> Page:
    """A page with a line of each kind."""
    lines = Lines()
    draft = FeedDraft(("devices",), since, lines)
    draft.grant(ONE, None)
    draft.grant(TWO, [Topic("devices/{device_id}/a b", Access.READ)], ACME)
    draft.deny(TWO, ACME)
    draft.forget(ONE)
    draft.revoke_certificate(b"issuer", "2a", None, is_probe=False)
    draft.end_session(ONE)
    draft.end_session(TWO, "devices")
    draft.narrow("narrowed")
    return lines.page(since, generation, newest)


def read(content: bytes) -> tuple[ReadPage | None, list[str]]:
    reader = PageReader()
    texts = [text for line in split_lines([content]) if (text := reader.read(line)) is not None]
    return reader.page, texts


def test_a_page_is_read_as_it_was_written() -> None:
    written = page_of()
    page, texts = read(written.content + written.end(NAMES))
    assert page == ReadPage(3, Mark(7, written.digest), 7, is_last=True, names=NAMES, has_changes=True)
    issuer = hashlib.sha256(b"issuer").hexdigest()
    assert texts == [
        f"allow {ONE}",
        "tenant acme sites/acme%20plant",
        "suspend acme",
        f"deny {TWO} in:acme",  # its topics are not below those of its tenant
        f"deny {TWO} in:acme",
        f"forget {ONE}",
        f"serial {issuer} 2a unknown",
        f"cut {ONE}",
        f"clear {TWO} devices",
        "narrow narrowed",
    ]


def test_a_long_page_is_kept_in_a_file_and_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_IN_MEMORY", 100)
    written = page_of()
    assert written.content == b""
    assert written.file is not None
    for _ in range(2):
        content = b"".join(written.blocks())
        assert len(content) == written.size
        page, texts = read(content + written.end(NAMES))
        assert page is not None
        assert len(texts) == 10
    written.close()


def test_a_page_that_is_not_the_last_says_so() -> None:
    written = page_of(newest=9)
    page, _ = read(written.content + written.end(NAMES))
    assert page is not None
    assert (page.is_last, page.mark.generation, page.newest) == (False, 7, 9)


def test_nothing_to_give_is_no_page_with_changes() -> None:
    page, texts = read(none_line(7, NAMES))
    assert page is not None
    assert (page.has_changes, page.names, texts) == (False, NAMES, [])


def test_a_page_that_is_cut_anywhere_is_not_whole() -> None:
    written = page_of()
    content = written.content + written.end(NAMES)
    for end in range(len(content)):
        try:
            page, _ = read(content[:end])
        except ProjectionInvalid:
            continue
        assert page is None, content[:end]


def test_a_page_without_one_of_its_lines_is_not_whole() -> None:
    written = page_of()
    lines = [*split_lines([written.content + written.end(NAMES)])]
    for left_out in range(len(lines)):
        shorter = b"".join(lines[:left_out] + lines[left_out + 1 :])
        try:
            page, _ = read(shorter)
        except ProjectionInvalid:
            continue
        assert page is None, lines[left_out]


@pytest.mark.parametrize(
    "line",
    [
        b"portal 00\n",  # would admit somebody else as the portal
        b"prefix other\n",
        b"issuer " + b"a" * 64 + b"\n",
        b"unserial " + b"a" * 64 + b" 2a\n",
        b"generation 9\n",
        b"allow one two three\n",
        b"allow ../x\n",
        b"deny x\r\n",
        b"deny " + b"x" * 65 + b"\n",
        b"tenant UPPER x\n",
        b"\n",
        b"allow x r:" + b"a" * MAX_LINE + b"\n",
        b"allow \xff\n",
    ],
)
def test_a_line_that_no_page_has_is_refused(line: bytes) -> None:
    reader = PageReader()
    reader.read(b"changes 0 " + b"0" * 32 + b"\n")
    with pytest.raises(ProjectionInvalid):
        reader.read(line)


def test_lines_after_the_last_one_are_refused() -> None:
    written = page_of()
    with pytest.raises(ProjectionInvalid):
        read(written.content + written.end(NAMES) + b"deny x\n")


def test_a_page_that_goes_back_is_refused() -> None:
    written = page_of(since=8, generation=7)
    with pytest.raises(ProjectionInvalid):
        read(written.content + written.end(NAMES))


def test_lines_are_put_together_from_blocks_of_any_size() -> None:
    written = page_of()
    content = written.content + written.end(NAMES)
    whole = [*split_lines([content])]
    for size in (1, 2, 7, 64):
        assert [*split_lines(content[at : at + size] for at in range(0, len(content), size))] == whole


def test_a_line_that_does_not_end_is_not_kept() -> None:
    endless = (b"x" * 4096 for _ in range(1000))
    with pytest.raises(ProjectionInvalid):
        list(split_lines(endless))


def test_who_is_cut_is_not_only_narrowed() -> None:
    sessions, others = Sessions(), Sessions()
    for text in (f"narrow {ONE}", f"cut {ONE}", f"narrow {TWO}"):
        assert sessions.take(text)
    assert others.take(f"clear {TWO} sites/acme%20plant")
    assert not sessions.take(f"deny {ONE}")
    sessions.add(others)
    changes = sessions.first(10).changes(9, in_doubt=False)
    assert changes.disconnected == [ONE, TWO]
    assert (changes.revoked, changes.narrowed) == ({TWO: "sites/acme plant"}, [])
    sessions.close()


@pytest.mark.parametrize("in_memory", [feed.MAX_IN_MEMORY, 50])
def test_sessions_are_ended_some_at_a_time_while_more_are_added(
    monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(feed, "MAX_IN_MEMORY", in_memory)
    sessions, names = Sessions(), [str(uuid.UUID(int=number)) for number in range(7)]
    for name in names[:5]:
        sessions.take(f"cut {name}")
    seen: list[str] = []
    while sessions.left:
        those = sessions.first(2)
        assert sessions.first(2).disconnected == those.disconnected  # until they have ended
        seen += those.disconnected
        sessions.ended(those)
        if len(seen) == 2:
            more = Sessions()
            more.take(f"cut {names[5]}")
            more.take(f"cut {names[6]}")
            sessions.add(more)
    assert seen == names
    assert sessions.first(2).disconnected == {}
    sessions.close()
