"""Whose sessions need not be ended again by the next pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.guard import journal
from broker.guard.ended import EndedSessions
from tests.broker.rabbitmq.test_answers import OTHER, OWN, append, begin

HASH = "ab" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    begin(tmp_path / "journal", journal.deny_line(OWN), journal.deny_line(OTHER))
    return tmp_path / "journal"


@pytest.fixture
def ended(path: Path) -> EndedSessions:
    """One of the two is done."""
    made = EndedSessions(path)
    assert made.left([OWN, OTHER]) == [OWN, OTHER]
    made.add(OWN)
    return made


def test_a_pass_goes_on_where_the_one_before_ended(ended: EndedSessions, path: Path) -> None:
    assert ended.left([OWN, OTHER]) == [OTHER]
    append(path, journal.allow_line("0189c0de-0000-7000-8000-000000000003"))
    assert ended.left([OWN, OTHER]) == [OTHER]


@pytest.mark.parametrize(
    "line", [journal.allow_line(OWN), journal.deny_line(OWN), journal.serial_line(HASH, "1a", OWN)]
)
def test_a_client_of_which_the_journal_says_something_is_done_again(
    ended: EndedSessions, path: Path, line: str
) -> None:
    append(path, line)
    append(path, journal.deny_line(OTHER))
    assert ended.left([OWN, OTHER]) == [OWN, OTHER]


def test_with_another_journal_all_are_done_again(ended: EndedSessions, path: Path) -> None:
    begin(path, journal.deny_line(OWN), epoch=2)
    assert ended.left([OWN]) == [OWN]


def test_without_a_journal_all_are_done_again(ended: EndedSessions, path: Path) -> None:
    path.rename(path.with_name("away"))
    assert ended.left([OWN]) == [OWN]


def test_who_is_not_asked_about_is_forgotten(ended: EndedSessions) -> None:
    assert ended.left([OTHER]) == [OTHER]
    assert ended.left([OWN]) == [OWN]
