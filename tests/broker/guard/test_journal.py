"""The guard's journal: what its lines are, what an interrupted writer leaves, what a reader takes for damage."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.guard import journal
from broker.guard.journal import JournalAppend, NewJournal, Position, read_access, read_position
from core.errors import BrokerUnavailable, ProjectionInvalid
from core.topics import Access

ONE, TWO = "3f2b8c1e-9d4a-4e6b-8a57-1c0d2e3f4a5b", "7a1b8c1e-9d4a-4e6b-8a57-1c0d2e3f4a5b"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guard.journal"


def begin(path: Path, *lines: str, epoch: int = 7, generation: int = 1) -> Position:
    new = NewJournal(path, epoch, mode=0o640, group=None)
    for line in lines:
        new.add(line)
    return new.commit(generation)


def append(path: Path, position: Position, *lines: str, generation: int) -> Position:
    more = JournalAppend(path, position)
    for line in lines:
        more.add(line)
    return more.commit(generation)


# --- The format -----------------------------------------------------------------------------------------------------


def test_a_journal_is_what_its_documentation_says(path: Path) -> None:
    begin(path, journal.prefix_line("devices"), journal.allow_line(ONE), epoch=1764424800000, generation=3)
    lines = [b"portal-guard 1 1764424800000 0", b"1 prefix devices", b"2 allow " + ONE.encode(), b"3 generation 3"]
    checksum, expected = 0, b""
    for line in lines:
        checksum = zlib.crc32(line, checksum)
        expected += line + b" %08x\n" % checksum
    assert path.read_bytes() == expected
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (journal.portal_line("ab" * 32), "portal " + "ab" * 32),
        (journal.issuer_line("cd" * 32), "issuer " + "cd" * 32),
        (journal.deny_line(ONE), f"deny {ONE}"),
        (journal.forget_line(ONE), f"forget {ONE}"),
        (journal.serial_line("cd" * 32, "1f", ONE), f"serial {'cd' * 32} 1f {ONE}"),
        (
            journal.allow_line(
                ONE, [("devices/x/a b%", Access.READ), ("d/ü/#", Access.WRITE), ("d/+/e", Access.READWRITE)]
            ),
            f"allow {ONE} r:devices/x/a%20b%25 w:d/%C3%BC/# rw:d/+/e",
        ),
    ],
)
def test_a_line_says(line: str, text: str) -> None:
    assert line == text


@pytest.mark.parametrize("filters", [[], [("x", Access.READ)] * 65, [("x" * 600, Access.READ)] * 64])
def test_topics_that_fit_into_no_line_are_refused(filters: list[tuple[str, Access]]) -> None:
    with pytest.raises(ProjectionInvalid, match=ONE):
        journal.allow_line(ONE, filters)


LINES = st.lists(
    st.one_of(
        st.uuids().map(lambda one: journal.allow_line(str(one))),
        st.uuids().map(lambda one: journal.deny_line(str(one))),
        st.lists(st.tuples(st.text(min_size=1, max_size=200), st.sampled_from(Access)), min_size=1, max_size=40).map(
            lambda filters: journal.allow_line(ONE, filters)
        ),
    ),
    max_size=8,
)


@settings(deadline=None)  # each example syncs files
@given(st.lists(LINES, min_size=1, max_size=8))
def test_appends_in_any_number_make_one_chain_that_reads_back(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "property.journal"
    position = begin(path, *batches[0], generation=0)
    for generation, lines in enumerate(batches[1:], 1):
        position = append(path, position, *lines, generation=generation)
    assert read_position(path) == read_position(path, whole=True) == position
    assert position.generation == len(batches) - 1
    assert position.seq == sum(map(len, batches)) + len(batches)
    assert max(map(len, path.read_bytes().splitlines(keepends=True))) <= journal.MAX_LINE_BYTES


def test_the_end_of_a_long_journal_is_read_without_the_rest(path: Path) -> None:
    position = begin(path, *[journal.allow_line(ONE)] * 10_000)
    assert read_position(path) == position
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert read_position(path).size == position.size
    with pytest.raises(ProjectionInvalid, match="is damaged"):
        read_position(path, whole=True)


def test_a_generation_far_before_the_end_is_found(path: Path) -> None:
    begin(path, generation=5)
    content = path.read_bytes()
    checksum = int(content.rsplit(b" ", 1)[1], 16)
    for number in range(2, 6000):  # a writer that died within a long append
        line = f"{number} allow {ONE}".encode()
        checksum = zlib.crc32(line, checksum)
        content += line + b" %08x\n" % checksum
    path.write_bytes(content)
    assert (read_position(path).generation, read_position(path).seq) == (5, 5999)


# --- Damage ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # each example syncs files
@given(st.data())
def test_a_flipped_bit_anywhere_is_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.journal"
    position = begin(path, journal.prefix_line("devices"), journal.allow_line(ONE), journal.deny_line(TWO))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = read_position(path, whole=True)
    except ProjectionInvalid:
        return
    assert found.size < position.size  # the last LF became another byte, so the last line is still being written


def _swap(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([lines[0], lines[2], lines[1], *lines[3:]])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "a header alone": lambda content: content.splitlines(keepends=True)[0],
    "no header": lambda content: content.partition(b"\n")[2],
    "another version": lambda content: content.replace(b"guard 1", b"guard 2", 1),
    "a line lost": lambda content: b"".join(
        line for number, line in enumerate(content.splitlines(keepends=True)) if number != 2
    ),
    "lines swapped": _swap,
    "the end of another journal": lambda content: content.replace(ONE.encode(), TWO.encode()),
    "a line without an end": lambda content: content + b"x" * 40_000 + b"\n",
    "no text at all": lambda content: b"\0" * 100,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_with_the_path(path: Path, kind: str) -> None:
    begin(path, journal.prefix_line("devices"), journal.allow_line(ONE), journal.deny_line(TWO))
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    for whole in (False, True):
        with pytest.raises(ProjectionInvalid, match=str(path)):
            read_position(path, whole=whole)


def test_a_missing_journal_is_damage(path: Path) -> None:
    with pytest.raises(ProjectionInvalid, match="cannot be read"):
        read_position(path)


# --- Interrupted writers --------------------------------------------------------------------------------------------


@settings(deadline=None)  # each example syncs files
@given(st.integers(0, 200))
def test_whatever_a_dead_writer_left_the_next_append_continues_the_chain(
    tmp_path_factory: pytest.TempPathFactory, kept: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.journal"
    before = begin(path, journal.prefix_line("devices"))
    append(path, before, journal.deny_line(ONE), journal.deny_line(TWO), generation=2)
    os.truncate(path, min(before.size + kept, path.stat().st_size))
    found = read_position(path)
    assert found.seq >= before.seq
    position = append(path, found, journal.deny_line(ONE), journal.deny_line(TWO), generation=3)
    assert read_position(path, whole=True) == position
    assert path.read_bytes().endswith(b"generation 3 %08x\n" % position.checksum)


def test_an_append_that_finds_the_disk_full_leaves_complete_lines_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    position = begin(path, journal.prefix_line("devices"))
    before, write = path.read_bytes(), os.pwrite

    def full_after(room: int) -> Callable[[int, bytes, int], int]:
        def pwrite(descriptor: int, data: bytes, offset: int) -> int:
            if offset >= position.size + room:
                raise OSError(28, "No space left on device")
            return write(descriptor, data[: position.size + room - offset], offset)

        return pwrite

    for room, lines in ((0, 0), (20, 0), (70, 1), (110, 2)):
        monkeypatch.setattr("broker.guard.journal.os.pwrite", full_after(room))
        with pytest.raises(BrokerUnavailable, match="No space left on device"):
            append(path, position, journal.deny_line(ONE), journal.deny_line(TWO), generation=2)
        content = path.read_bytes()
        assert content.startswith(before)
        assert content.count(b"\n") == before.count(b"\n") + lines
        assert content.endswith(b"\n")
        assert read_position(path, whole=True).generation == 1
        os.truncate(path, len(before))
    monkeypatch.undo()
    assert read_position(path) == position
    append(path, position, journal.deny_line(ONE), generation=2)


def test_an_append_to_a_journal_that_was_replaced_or_changed_is_refused(path: Path) -> None:
    position = begin(path, journal.prefix_line("devices"))
    more = JournalAppend(path, position)
    append(path, position, journal.deny_line(ONE), generation=2)  # another process, without the lock
    with pytest.raises(BrokerUnavailable, match="changed by somebody else"):
        more.commit(3)
    begin(path, journal.prefix_line("devices"), epoch=8)
    with pytest.raises(BrokerUnavailable, match="changed by somebody else"):
        append(path, position, generation=4)
    path.unlink()
    with pytest.raises(BrokerUnavailable, match="cannot be written"):
        append(path, position, generation=4)


def test_a_new_epoch_replaces_the_journal_only_when_it_is_complete(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(path, journal.prefix_line("devices"), epoch=7)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    new = NewJournal(path, 8, mode=0o640, group=None)
    new.add(journal.prefix_line("devices"))
    monkeypatch.setattr("broker.guard.journal.os.fsync", full)
    with pytest.raises(BrokerUnavailable, match="No space left on device"):
        new.commit(2)
    monkeypatch.undo()
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before
    with NewJournal(path, 8, mode=0o640, group=None) as dropped:
        dropped.add(journal.prefix_line("devices"))
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert begin(path, epoch=8).epoch == read_position(path).epoch == 8


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match="cannot be written"):
        NewJournal(tmp_path / "none" / "guard.journal", 1, mode=0o640, group=None)


@pytest.mark.parametrize("fails", ["fchown", "fchmod"])
def test_a_journal_whose_owner_or_mode_cannot_be_set_leaves_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def refused(*_arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, fails, refused)
    with pytest.raises(BrokerUnavailable, match="not permitted"):
        NewJournal(path, 1, mode=0o640, group=os.getgid())
    assert [*path.parent.iterdir()] == []


def test_very_many_lines_are_appended_as_few_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_MAX_IN_MEMORY", 200)
    monkeypatch.setattr(journal, "_BLOCK_BYTES", 64)
    begun = begin(path)
    few, many = JournalAppend(path, begun), JournalAppend(path, begun)
    names = [f"{number:08}-0000-4000-8000-000000000000" for number in range(50)]
    for name in names:
        many.add(journal.deny_line(name))
        assert sum(map(len, many._lines)) < 200
    assert [*path.parent.iterdir()] == [path]
    end = many.commit(7)
    assert read_position(path, whole=True) == end
    assert [*read_access(path)][-50:] == names
    with pytest.raises(BrokerUnavailable, match="changed by somebody else"):
        few.commit(7)


def test_a_disk_that_is_full_in_the_middle_of_very_many_lines_leaves_whole_ones(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_MAX_IN_MEMORY", 200)
    monkeypatch.setattr(journal, "_BLOCK_BYTES", 64)
    begun = begin(path)
    many, left, write = JournalAppend(path, begun), [20], os.pwrite

    def full(descriptor: int, content: bytes, at: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:50], at)

    for number in range(50):
        many.add(journal.deny_line(f"{number:08}-0000-4000-8000-000000000000"))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BrokerUnavailable, match="No space"):
        many.commit(7)
    monkeypatch.undo()
    after = read_position(path, whole=True)
    assert begun.size < after.size == path.stat().st_size <= begun.size + 20 * 50
    assert after.generation == begun.generation
