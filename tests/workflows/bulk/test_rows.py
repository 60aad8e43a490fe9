from __future__ import annotations

import csv
import io
import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import InputInvalid
from workflows.bulk.rows import MAX_ROW_BYTES, CsvRows, NdjsonRows, Row, Rows

COLUMNS = frozenset({"name", "type", "note"})
REQUIRED = frozenset({"name"})
HEADER = b"name,type,note\n"

cut_lists = st.lists(st.integers(0, 10_000), max_size=12)
# What cells are made of in the world, and what could deceive a reader of them.
texts = st.text(st.sampled_from(['"', ",", "\n", "\r", " ", "a", "é", "\ufeff", "{", "\0", ";", "'"]), max_size=8)
fragments = st.sampled_from(
    [
        b'"',
        b'""',
        b",",
        b"\n",
        b"\r\n",
        b"\r",
        b"a",
        b"name",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\0",
        b" ",
        b"{",
        b"x" * MAX_ROW_BYTES,
    ]
)


def csv_rows() -> CsvRows:
    return CsvRows(COLUMNS, REQUIRED)


def rows_of(rows: Rows, stream: bytes, cuts: list[int] | None = None) -> list[Row]:
    places = sorted(cut % (len(stream) + 1) for cut in cuts or [])
    found: list[Row] = []
    for start, end in pairwise([0, *places, len(stream)]):
        found += rows.feed(stream[start:end])
    found += rows.end()
    assert [row.number for row in found] == list(range(1, len(found) + 1))
    return found


def codes(rows: list[Row]) -> list[str | None]:
    return [None if row.problem is None else row.problem.code for row in rows]


@given(st.lists(st.dictionaries(texts, texts, max_size=3), max_size=6), cut_lists, st.sampled_from(["\n", "\r\n"]))
def test_lines_of_json_come_out_as_they_went_in(values: list[dict[str, str]], cuts: list[int], ending: str) -> None:
    lines = [json.dumps(value) for value in values]
    found = rows_of(NdjsonRows(), ("\ufeff" + "".join(line + ending for line in lines)).encode(), cuts)
    assert [row.content for row in found] == [line.encode() for line in lines]


@example([('";', ";", "x")], [27], "\r\n", True)  # cut within a doubled quote, in the piece with the byte order mark
@given(st.lists(st.tuples(texts, texts, texts), max_size=6), cut_lists, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_cells_come_out_as_csv_of_the_standard_library_wrote_them(
    cells: list[tuple[str, str, str]], cuts: list[int], ending: str, marked: bool
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerows([("name", "type", "note"), *cells])
    found = rows_of(csv_rows(), b"\xef\xbb\xbf" * marked + text.getvalue().encode(), cuts)
    expected = [{name: cell for name, cell in zip(("name", "type", "note"), row, strict=True) if cell} for row in cells]
    assert [row.content for row in found] == [row for row in expected if row]


@given(st.lists(fragments, max_size=30), cut_lists)
def test_what_is_found_does_not_depend_on_the_pieces(parts: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(parts)
    for make, start in ((NdjsonRows, b""), (csv_rows, HEADER)):
        whole, cut = rows_of(make(), start + stream), rows_of(make(), start + stream, cuts)
        assert [row.content for row in whole] == [row.content for row in cut]
        assert codes(whole) == codes(cut)


@given(st.lists(fragments, max_size=30))
def test_no_more_is_kept_than_a_row_may_have(parts: list[bytes]) -> None:
    for rows in (NdjsonRows(), csv_rows()):
        rows.feed(HEADER)
        for part in parts:
            rows.feed(part)
            assert len(rows._buffer) <= MAX_ROW_BYTES


@pytest.mark.parametrize("rows", [NdjsonRows(), csv_rows()])
def test_a_row_that_is_too_long_hurts_no_other(rows: Rows) -> None:
    stream = HEADER + b"a,b,c\n" + b"x" * (3 * MAX_ROW_BYTES) + b"\nd,e,f\n" + b"y" * (MAX_ROW_BYTES + 1)
    found = codes(rows_of(rows, stream, [MAX_ROW_BYTES, 2 * MAX_ROW_BYTES]))
    assert found[-4:] == [None, "row_too_long", None, "row_too_long"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"only one", "1 cells"),
        (b"a,b,c,d", "4 cells"),
        (b'"a"b,c,d', "RFC 4180"),
        (b"a\rb,c,d", "RFC 4180"),
        (b"\xff,b,c", "UTF-8"),
    ],
)
def test_a_row_that_is_no_csv_hurts_no_other(line: bytes, said: str) -> None:
    first, bad, last = rows_of(csv_rows(), HEADER + b"a,b,c\n" + line + b"\nd,e,f")
    assert (first.content, last.content) == (
        {"name": "a", "type": "b", "note": "c"},
        {"name": "d", "type": "e", "note": "f"},
    )
    assert bad.problem is not None
    assert bad.problem.code == "malformed_row"
    assert said in bad.problem.detail


def test_a_quote_in_the_middle_of_a_cell_is_only_a_quote() -> None:
    assert [row.content for row in rows_of(csv_rows(), HEADER + b'5" pipe,b,c\nd,e,f\n')] == [
        {"name": '5" pipe', "type": "b", "note": "c"},
        {"name": "d", "type": "e", "note": "f"},
    ]


def test_lines_of_white_space_are_no_rows() -> None:
    assert rows_of(NdjsonRows(), b"\n \r\n\t\n") == []
    assert rows_of(csv_rows(), b"\r\n" + HEADER + b"\n\r\n") == []


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"name,colour\n", "colour"),
        (b"type,note\n", "column name is missing"),
        (b"name,name\n", "twice"),
        (b"{}\n", "'{}'"),
        (b"\xff\n", "UTF-8"),
        (b'"name\n', "RFC 4180"),
    ],
)
def test_a_first_row_that_names_other_columns_is_refused(header: bytes, said: str) -> None:
    with pytest.raises(InputInvalid, match=said) as refused:
        rows_of(csv_rows(), header)
    assert refused.value.errors[0].field == "columns"
    message = refused.value.errors[0].message  # begins a phrase where the sentence begins one
    assert refused.value.detail.endswith(f"{message[:1].upper()}{message[1:]}.")


def test_empty_cells_and_the_case_of_columns_are_as_spreadsheets_write_them() -> None:
    found = rows_of(csv_rows(), b"Name,TYPE,note,,\r\na,b,c,,\r\n,,,,\r\n,,\r\nd,e,f\r\ng,h,i,,x\r\n")
    assert [row.content for row in found[:2]] == [
        {"name": "a", "type": "b", "note": "c"},
        {"name": "d", "type": "e", "note": "f"},
    ]
    assert codes(found) == [None, None, "malformed_row"]


def test_carriage_returns_alone_are_refused_in_words() -> None:
    with pytest.raises(InputInvalid, match="carriage returns alone end no rows"):
        rows_of(csv_rows(), b"name,type,note\ra,b,c\rd,e,f\r")
