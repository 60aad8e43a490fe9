"""How the console writes values."""

from __future__ import annotations

import csv
import io

import pytest

from web.console.formats import csv_line, duration


def test_times_of_steps_have_three_digits() -> None:
    for seconds, text in (
        (0.0, "0 ms"), (0.00421, "4.21 ms"), (0.1314, "131 ms"), (1.2391, "1.24 s"), (42.0, "42 s"), (600, "10 min"),
        (86400, "24 h"), (864000, "10 d"),
    ):  # fmt: skip
        assert duration(seconds) == text


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1+1", "\r=1+1", "\n=1+1"])
def test_no_cell_of_csv_begins_as_a_formula_does_or_with_what_a_spreadsheet_leaves_out_before_one(cell: str) -> None:
    [[read, other]] = csv.reader(io.StringIO(csv_line([cell, "a=1"]).decode(), newline=""))
    assert (read, other) == (f"'{cell}", "a=1")
