"""The tables of the server's commands."""

from __future__ import annotations

import sys

import pytest

from operations.command_base import print_table

TITLES = ("name", "CRL until", "below")
ROWS = [("issuing-1", "2026-12-07 11:05 UTC", ""), ("root", "", "")]


def test_a_table_has_titles_and_no_empty_column(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(TITLES, ROWS)
    assert capsys.readouterr().out == "NAME       CRL UNTIL\nissuing-1  2026-12-07 11:05 UTC\nroot\n"


@pytest.mark.parametrize("columns", [20, 31, 80])
def test_no_line_is_broken_by_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(TITLES, ROWS)
    out = capsys.readouterr().out
    if columns < 31:
        assert out == "Name       issuing-1\nCRL until  2026-12-07 11:05 UTC\n\nName       root\n"
    else:
        assert out.startswith("NAME       CRL UNTIL\n")


def test_no_rows_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(TITLES, [])
    assert capsys.readouterr() == ("", "There are none.\n")
