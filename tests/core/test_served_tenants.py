"""Processes tell each other whom they serve, in memory that they share since one was forked from the other."""

from __future__ import annotations

import os

import pytest

from core import served_tenants
from core.served_tenants import ServedTenants

NOBODY = ("", 0.0)


def in_another_process(act: object) -> None:
    child = os.fork()
    if not child:
        try:
            act()  # type: ignore[operator]  # a function without arguments
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def test_what_a_forked_process_tells_is_read_by_the_others() -> None:
    served = ServedTenants()
    own, theirs = served.place(), served.place()
    own.serves(("one", 10.0), NOBODY)
    assert not own.serve_others("one", 0.0)
    in_another_process(lambda: theirs.serves(("other", 20.0), ("one", 10.0)))
    assert own.serve_others("one", 20.0)
    assert not own.serve_others("one", 20.1)
    assert not own.serve_others("other", 11.0)


def test_a_tenant_is_first_before_others_alone_and_for_the_time_told() -> None:
    served = ServedTenants()
    own, theirs = served.place(), served.place()
    in_another_process(lambda: theirs.puts_first("other", 5.0))
    assert own.put_another_first("one", 4.9)
    assert not own.put_another_first("one", 5.0)
    assert not own.put_another_first("other", 4.9)


def test_that_a_process_works_beside_others_is_read_by_all_and_for_the_time_told() -> None:
    served = ServedTenants()
    own, theirs = served.place(), served.place()
    in_another_process(lambda: theirs.works_beside(5.0))
    assert own.work_beside(4.9)
    assert not own.work_beside(5.0)
    own.puts_first("one", 9.0)
    own.works_beside(7.0)
    assert own.work_beside(6.9)
    own.works_beside(0.0)
    assert not own.work_beside(5.0)
    assert theirs.put_another_first("other", 8.9)


def test_the_place_of_a_process_that_has_ended_is_taken_by_another() -> None:
    served = ServedTenants()
    ended, own = served.place(), served.place()
    in_another_process(lambda: ended.serves(("other", 20.0), NOBODY))
    own.serves(("one", 20.0), NOBODY)
    assert not own.serve_others("one", 0.0)


def test_two_processes_that_have_taken_one_place_part_again(monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedTenants()
    own, theirs = served.place(), served.place()
    with monkeypatch.context() as patch:
        patch.setattr(served_tenants, "_is_there", lambda _process: False)
        own.serves(("one", 20.0), NOBODY)
        theirs.serves(("other", 20.0), NOBODY)
    own.serves(("one", 20.0), NOBODY)
    assert own.serve_others("one", 0.0)
    assert theirs.serve_others("other", 0.0)


def test_more_processes_than_there_are_places_for_share_by_themselves() -> None:
    served = ServedTenants()
    for _ in range(300):
        served.place().serves(("one", 20.0), NOBODY)
    late = served.place()
    late.serves(("other", 20.0), NOBODY)
    late.puts_first("other", 20.0)
    assert not late.serve_others("one", 0.0)
