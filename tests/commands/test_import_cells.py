"""Files as spreadsheets write them, and what is refused because it could only be guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands.errors import Misused
from commands.import_files import ExternalIds, FileRow, Reading, format_of, read_rows
from tests.support.harness import ON_SQLITE, Api
from web.api.routing import NDJSON

HEADER = "name,type,location,firmware"
METER = {"name": "meter 1", "type": "meter", "location": "A", "firmware": "1.0"}


def read(folder: Path, content: str | bytes, encoding: str | None = None, **how: Any) -> list[FileRow]:
    path = folder / "fleet.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(path, Reading("csv", encoding, **how)))


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}\r\nmeter 1,meter,A,1.0\r\n",
        "name;type;location;firmware\r\nmeter 1;meter;A;1.0\r\n",
        "name\ttype\tlocation\tfirmware\r\nmeter 1\tmeter\tA\t1.0\r\n",
        f"sep=,\r\n{HEADER}\r\nmeter 1,meter,A,1.0\r\n",
        "SEP=;\r\nname;type;location;firmware\r\nmeter 1;meter;A;1.0\r\n",
        "Name,Type,LOCATION, Firmware \r\nmeter 1,meter,A,1.0\r\n",
        f"{HEADER},,\r\nmeter 1,meter,A,1.0,,\r\n,,,,,\r\n,,,\r\n",
        f"\r\n{HEADER}\rmeter 1,meter,A,1.0\r",
    ],
    ids=["commas", "semicolons", "tabs", "sep", "sep semicolon", "case", "trailing", "carriage returns"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_spreadsheets_write_is_read(tmp_path: Path, content: str, encoding: str) -> None:
    (row,) = read(tmp_path, content.encode(encoding))
    assert (row.values, row.problem) == (METER, None)


def test_a_row_is_named_by_its_line_whatever_stands_before(tmp_path: Path) -> None:
    rows = read(tmp_path, f'sep=,\n\n{HEADER}\nmeter 1,meter,A,1.0\n,,,\n"two\nlines",x,y,1\n,meter,A,1\n')
    assert [(row.line, row.problem) for row in rows] == [(4, None), (6, None), (8, "name is missing")]


def test_cp1252_is_read_where_it_is_named_and_else_refused_with_line_and_option(tmp_path: Path) -> None:
    content = f"{HEADER}\r\nok,valve,Bonn,1.0\r\nVentil Süd,valve,Köln,1.0\r\n".encode("cp1252")
    with pytest.raises(Misused, match="not UTF-8 text from line 3 on") as refused:
        read(tmp_path, content)
    assert any("--encoding cp1252" in hint for hint in refused.value.hints)
    assert read(tmp_path, content, "cp1252")[1].values["name"] == "Ventil Süd"


def test_other_columns_are_refused_or_kept_as_metadata(tmp_path: Path) -> None:
    content = f'{HEADER},Serial_Number,mac,metadata\nmeter 1,meter,A,1.0,000451,AA:BB,"{{""a"": 1}}"\n'
    with pytest.raises(Misused, match="'Serial_Number' is unknown") as refused:
        read(tmp_path, content)
    assert any("--metadata-columns" in hint for hint in refused.value.hints)
    (row,) = read(tmp_path, content, to_metadata=True)
    assert row.values == METER | {"metadata": {"a": 1, "Serial_Number": "000451", "mac": "AA:BB"}}
    (row,) = read(tmp_path, content.replace('""a""', '""mac""'), to_metadata=True)
    assert "a key that is a column" in str(row.problem)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"sep=|\n{HEADER}\n", "sep= names"),
        ("name,Name,type,location,firmware\n", "'name' is repeated"),
        ("name;type,location;firmware\n", "is unknown"),
        (f"# the fleet\n{HEADER}\n", "is unknown"),
        (f'{HEADER}\n"open\n', "not valid CSV"),
        (b"PK\x03\x04 a workbook", "is a workbook"),
        (b"\xff\xfen", "not UTF-16"),
        ("\r\n", "is empty"),
    ],
)
def test_what_could_only_be_guessed_is_refused(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(Misused, match=said):
        read(tmp_path, content)


def test_cells_that_are_missing_or_too_many_are_said(tmp_path: Path) -> None:
    rows = read(tmp_path, f"{HEADER}\nmeter 1,meter,A\nmeter 1,meter,A,1,5\n")
    assert [str(row.problem)[:11] for row in rows] == ["has 3 cells", "has 5 cells"]


def test_a_workbook_is_refused_with_what_to_do() -> None:
    with pytest.raises(Misused, match="save the sheet as CSV UTF-8"):
        format_of(Path("fleet.xlsx"), None)


@ON_SQLITE
def test_a_row_that_the_portal_takes_for_another_device_has_another_external_id_of_its_own(api: Api) -> None:
    row = METER | {"metadata": {"a": 1}, "topics": [{"filter": "devices/{id}/#", "access": "readwrite"}]}
    own = ExternalIds("lot 7").of(FileRow(2, row))
    api.call("POST", "/register/bulk", data=json.dumps(row | {"external_id": own}).encode(), content_type=NDJSON)
    others: dict[str, Any] = {
        "metadata": {"a": 2},
        "topics": [*row["topics"], {"filter": "devices/hall/x", "access": "read"}],
    }
    others |= {"profile": "server", "key_type": "ed25519", "validity_days": 9, "bundle_format": "pem"}
    assert api.post("/profiles", {"name": "server", "organization": "Example"}).status_code == 201
    refused = set()
    for name in (*METER, *others):
        changed = row | {name: others.get(name, "another")}
        line = json.dumps(changed | {"external_id": own}).encode()
        answer = api.call("POST", "/register/bulk?dry_run=true", data=line, content_type=NDJSON)
        if json.loads(answer.data).get("code") == "external_id_taken":
            refused.add(name)
            assert ExternalIds("lot 7").of(FileRow(2, changed)) != own, name
    assert refused == {*METER, "metadata", "topics", "profile"}
