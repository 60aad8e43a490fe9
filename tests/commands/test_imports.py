"""The import of a file, batch by batch, against a small portal."""

from __future__ import annotations

import csv
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from commands import imports
from commands.import_files import FIELDS
from commands.imports import import_devices
from tests.support.cli_session import Session
from tests.support.pki import key_pem
from tests.support.portal_stub import PortalStub, Reply, problem, rows_reply

pytest_plugins = ("tests.support.cli_fixtures",)

BULK = ("POST", "/register/bulk")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "BATCH_ROWS", 3)
    monkeypatch.setattr(imports, "RETRY_PAUSES", (0.0, 0.0))


def write_fleet(folder: Path, count: int, own: str = "") -> str:
    rows = [{"name": f"pump-{n}", "type": "pump", "location": "hall 1", "firmware": "1"} for n in range(count)]
    own_ids: list[dict[str, str]] = [{"external_id": f"{own}{n}"} if own else {} for n in range(count)]
    path = folder / "fleet.ndjson"
    path.write_text("".join(json.dumps(row | own_id) + "\n" for row, own_id in zip(rows, own_ids, strict=True)))
    return str(path)


def run(session: Session, file: str) -> tuple[dict[str, Any], int]:
    result = session.run("import", file, "--out", "out", "--json")
    return json.loads(result.stdout or result.stderr), result.exit_code


def results(session: Session) -> list[dict[str, str]]:
    with (session.folder / "out" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def sent(stub: PortalStub) -> list[list[str]]:
    """The names in each batch that was sent."""
    return [[row["name"] for row in request.body] for request in stub.calls(*BULK)]


def names(first: int, end: int) -> list[str]:
    return [f"pump-{n}" for n in range(first, end)]


def test_rows_are_sent_in_batches_in_their_order(session: Session, stub: PortalStub) -> None:
    summary, status = run(session, write_fleet(session.folder, 7))
    assert (status, summary["registered"], summary["failed"]) == (0, 7, 0)
    assert sent(stub) == [names(0, 3), names(3, 6), names(6, 7)]
    assert [row["name"] for row in results(session)] == names(0, 7)
    ids = {row["external_id"] for row in results(session)}
    assert len(ids) == 7  # rows without an id of their own are given one
    assert ids == {device["external_id"] for device in stub.devices.values()}


def test_a_row_that_begins_like_a_formula_runs_nothing_in_the_spreadsheet_of_the_results_and_is_sent_once(
    session: Session, stub: PortalStub
) -> None:
    file = write_fleet(session.folder, 3, own="=1+")
    refused = [{"row": n, "code": "refused", "detail": "@SUM(A1)"} for n in (2, 3)]
    stub.replies[BULK] = rows_reply([{"row": 1, "device_id": stub.add_device(external_id="=1+0")}, *refused])
    run(session, file)
    assert [row["detail"] for row in results(session)] == ["", "'@SUM(A1)", "'@SUM(A1)"]
    stub.replies.pop(BULK)
    run(session, file)
    shown = results(session)
    assert [row["external_id"] for row in shown] == ["'=1+0", "'=1+1", "'=1+2"]
    assert sum("pump-0" in batch for batch in sent(stub)) == 1
    assert not [cell for row in shown for cell in row.values() if cell.startswith(("=", "+", "@"))]


def test_a_batch_has_a_maximum_length(session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "BATCH_BYTES", 250)
    assert run(session, write_fleet(session.folder, 4))[1] == 0
    assert sent(stub) == [names(0, 2), names(2, 4)]


def test_the_results_of_a_batch_are_durable_before_the_next_is_sent(
    session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []
    register = stub.answer

    def answer(request: Any) -> Reply:
        if (request.method, request.path) == BULK:
            there.append(len(results(session)))
        return register(request)

    monkeypatch.setattr(stub, "answer", answer)
    run(session, write_fleet(session.folder, 7))
    assert there == [0, 3, 6]


def test_only_rows_without_an_answer_are_sent_again(session: Session, stub: PortalStub) -> None:
    answer = {"row": 1, "device_id": "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"}
    stub.replies[BULK] = [rows_reply([answer]), rows_reply([{"row": 1, "stopped": True}])]
    summary, status = run(session, write_fleet(session.folder, 3))
    assert (status, summary["registered"]) == (0, 3)
    assert sent(stub) == [names(0, 3), names(1, 3), names(1, 3)]
    assert [row["name"] for row in results(session)] == names(0, 3)


def test_a_busy_portal_is_asked_again_after_the_time_that_it_says(
    session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    here, sleep = threading.current_thread(), time.sleep  # a thread of another test may wait meanwhile
    monkeypatch.setattr("time.sleep", lambda s: waited.append(s) if threading.current_thread() is here else sleep(s))
    busy = problem(503, "uploads_busy", "As many uploads as are allowed.", headers={"Retry-After": "7"})
    stub.replies[BULK] = [busy, busy]
    assert run(session, write_fleet(session.folder, 3))[0]["registered"] == 3
    assert waited == [7, 7]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(breaks_off=True, body=b""), 3),
        (rows_reply([{"row": 1, "stopped": True, "detail": "The portal is being stopped."}]), 3),
        (rows_reply([{"row": 2, "device_id": "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"}]), 1),
        (rows_reply([{"row": n, "code": "invalid"} for n in (1, 2, 3, 4)]), 1),
        (Reply(200, b"Welcome to the proxy\n"), 3),
        (problem(503, "unavailable", "The database is away."), 1),
        (problem(403, "forbidden", "This token may not register devices."), 1),
    ],
)
def test_an_import_that_stops_says_how_to_continue(
    session: Session, stub: PortalStub, reply: Reply, expected: int
) -> None:
    stub.replies[BULK] = reply
    file = write_fleet(session.folder, 3)
    error, status = run(session, file)
    assert status == expected
    assert imports.AGAIN in error["error"]["hints"]
    del stub.replies[BULK]
    summary, status = run(session, file)
    assert (status, summary["rows"], summary["failed"]) == (0, 3, 0)
    assert len(results(session)) == 3


def test_an_import_continues_where_it_stopped(session: Session, stub: PortalStub) -> None:
    file = write_fleet(session.folder, 7, own="unit-")
    stub.replies[BULK] = [
        rows_reply({"row": n, "device_id": stub.add_device(external_id=f"unit-{n - 1}")} for n in (1, 2, 3)),
        *[Reply(breaks_off=True, body=b"")] * 3,
    ]
    error, status = run(session, file)
    assert (status, imports.AGAIN in error["error"]["hints"]) == (3, True)
    assert [row["name"] for row in results(session)] == names(0, 3)
    summary, status = run(session, file)
    assert (status, summary["there_before"], summary["registered"]) == (0, 3, 4)
    assert sent(stub)[-2:] == [names(3, 6), names(6, 7)]
    assert len(stub.devices) == 7


def test_rows_that_were_registered_before_are_called_so_and_counted_once(session: Session, stub: PortalStub) -> None:
    file = write_fleet(session.folder, 3, own="unit-")
    answers = [{"row": n, "device_id": stub.add_device(), "repeated": n == 1} for n in (1, 2, 3)]
    stub.replies[BULK] = [rows_reply(answers)]
    first = session.run("import", file, "--out", "fleet")
    assert "2 registered, 1 registered before, 0 failed." in first.stderr
    again = session.run("import", file, "--out", "fleet")
    counts = dict(line.split("\t") for line in again.stdout.splitlines())
    assert [counts[name] for name in ("rows", "registered", "registered_before", "failed")] == ["3", "0", "3", "0"]
    assert session.json("import", file, "--out", "fleet")["registered_before"] == 3


def test_a_batch_that_is_too_long_for_a_proxy_is_sent_in_halves(session: Session, stub: PortalStub) -> None:
    stub.replies[BULK] = [Reply(413, b"<html>413 Request Entity Too Large</html>")]
    summary, status = run(session, write_fleet(session.folder, 3))
    assert (status, summary["registered"]) == (0, 3)
    assert sent(stub) == [names(0, 3), names(0, 1), names(1, 2), names(2, 3)]


def test_a_row_that_is_too_long_for_a_proxy_is_said_with_what_to_change(session: Session, stub: PortalStub) -> None:
    stub.replies[BULK] = Reply(413, b"<html>413 Request Entity Too Large</html>")
    error, status = run(session, write_fleet(session.folder, 3))
    assert status == 1
    assert imports.TOO_LARGE in error["error"]["hints"]
    assert "client_max_body_size" in imports.TOO_LARGE
    assert sent(stub) == [names(0, 3), names(0, 1)]


def corrected(folder: Path, change: dict[int, str]) -> None:
    """Give rows of the file another firmware."""
    path = folder / "fleet.ndjson"
    lines = path.read_text().splitlines()
    for index, firmware in change.items():
        lines[index] = json.dumps(json.loads(lines[index]) | {"firmware": firmware})
    path.write_text("".join(line + "\n" for line in lines))


def fail_one(stub: PortalStub, position: int) -> None:
    ids = {n: stub.add_device(f"pump-{n}") for n in range(3) if n != position}
    refused = {"row": position + 1, "code": "invalid_input", "detail": "firmware is no good."}
    stub.replies[BULK] = [
        rows_reply(refused if n == position else {"row": n + 1, "device_id": ids[n]} for n in range(3))
    ]


def test_after_one_row_is_corrected_that_one_alone_is_registered(session: Session, stub: PortalStub) -> None:
    file = write_fleet(session.folder, 3)
    fail_one(stub, 1)
    assert run(session, file)[1] == 1
    corrected(session.folder, {1: "2"})
    summary, status = run(session, file)
    assert (status, summary["there_before"], summary["registered"], summary["failed"]) == (0, 2, 1, 0)
    assert sent(stub) == [names(0, 3), names(1, 2)]
    assert [row["name"] for row in results(session)] == ["pump-0", "pump-2", "pump-1"]


@pytest.mark.parametrize("lost", ["the results", "half of them", "the folder"])
def test_an_import_whose_results_are_lost_registers_no_device_twice(
    session: Session, stub: PortalStub, lost: str
) -> None:
    file = write_fleet(session.folder, 3)
    run(session, file)
    assert len(stub.devices) == 3
    path = session.folder / "out" / "results.csv"
    if lost == "half of them":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    if lost == "the folder":
        path.parent.rmdir()
    corrected(session.folder, {1: "2"})
    assert run(session, file)[1] == 0
    assert [device["name"] for device in stub.devices.values()] == [*names(0, 3), "pump-1"]


def test_rows_that_are_the_same_are_as_many_devices_and_in_another_batch_further_ones(
    session: Session, stub: PortalStub
) -> None:
    file = session.folder / "fleet.csv"
    file.write_text("name,type,location,firmware\n" + "pump,pump,hall,1\n" * 4)
    for arguments, devices in (["--out", "a"], 4), (["--out", "b"], 4), (["--out", "c", "--batch", "June"], 8):
        assert session.run("import", str(file), *arguments).exit_code == 0
        assert len(stub.devices) == devices


def test_a_bundle_password_is_not_in_what_identifies_a_row(session: Session, stub: PortalStub) -> None:
    file = session.folder / "fleet.csv"
    for password in ("correct horse battery", "another password"):
        file.write_text(f"name,type,location,firmware,bundle_password\npump,pump,hall,1,{password}\n")
        assert session.run("import", str(file), "--out", password).exit_code == 0
    assert len(stub.devices) == 1


def test_a_folder_of_another_file_or_of_something_else_is_left_alone(session: Session, stub: PortalStub) -> None:
    run(session, write_fleet(session.folder, 2))
    path = session.folder / "out" / "results.csv"
    before = path.read_bytes()
    error, status = run(session, write_fleet(session.folder, 2, own="other-"))
    assert (status, "another file" in str(error["error"])) == (2, True)
    assert path.read_bytes() == before
    path.write_text("score,team\n1,x\n")
    assert run(session, write_fleet(session.folder, 2))[1] == 1
    assert path.read_text() == "score,team\n1,x\n"
    assert len(stub.devices) == 2


@pytest.mark.parametrize("option", ["--dry-run", "--out=fleet"])
def test_a_private_key_in_a_row_is_not_sent(option: str, session: Session, stub: PortalStub) -> None:
    key = key_pem(ec.generate_private_key(ec.SECP256R1())).decode()
    rows = [{"name": "pump", "type": "pump", "location": "h", "firmware": "1"} | more for more in ({}, {"csr": key})]
    path = session.folder / "fleet.ndjson"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = session.run("import", str(path), option)
    assert result.exit_code == 1
    assert "line 2: csr holds a private key" in result.output
    assert not [request for request in stub.requests if "PRIVATE KEY" in str(request.body)]


def test_a_dry_run_lists_what_the_portal_would_refuse_and_registers_nothing(session: Session, stub: PortalStub) -> None:
    file = write_fleet(session.folder, 3)
    refused = {"row": 2, "dry_run": True, "code": "invalid_input", "detail": "The name has a control character."}
    checked = rows_reply([{"row": 1, "dry_run": True}, refused, {"row": 3, "dry_run": True}])
    stub.replies[BULK] = [rows_reply([{"row": 1, "dry_run": True, "code": "invalid_input"}]), checked]
    result = session.run("import", file, "--dry-run")
    assert result.exit_code == 1
    assert "line 2: The name has a control character." in result.stderr
    assert "1 of 3 rows have problems; nothing was registered." in result.stderr
    assert session.run("import", file, "--dry-run").exit_code == 0
    assert all(call.query == {"dry_run": "true"} for call in stub.calls(*BULK))
    assert stub.devices == {}


def test_a_dry_run_sends_no_row_whose_problem_is_known(session: Session, stub: PortalStub) -> None:
    file = session.folder / "fleet.csv"
    file.write_text("name,type,location,firmware,external_id\na,b,c,1,x\nd,b,c,1,x\n,b,c,1,\n")
    result = session.run("import", str(file), "--dry-run")
    assert "2 of 3 rows have problems" in result.stderr
    assert [[row.get("name") for row in request.body] for request in stub.calls(*BULK)] == [[None], ["a"]]


def test_who_imports_a_file_with_problems_is_told_that_the_portal_may_see_more(session: Session) -> None:
    file = session.folder / "fleet.csv"
    file.write_text("name,type,location,firmware\n,b,c,1\n")
    assert imports.SEE_ALL in session.run("import", str(file), "--out", "out").stderr
    assert "--dry-run" not in session.run("import", str(file), "--dry-run").stderr


@pytest.mark.parametrize("content", ["name,type,location,firmware\n", "name,type,location,firmware\n,,,\n"])
@pytest.mark.parametrize("where", [("--out", "out"), ("--dry-run",)])
def test_a_file_without_rows_is_called_so_and_makes_no_folder(
    session: Session, stub: PortalStub, content: str, where: tuple[str, ...]
) -> None:
    (session.folder / "fleet.csv").write_text(content)
    result = session.run("import", "fleet.csv", *where)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "Warning: fleet.csv has no rows; nothing was registered.\n"
    assert session.json("import", "fleet.csv", *where)["rows"] == 0
    assert not (session.folder / "out").exists()
    assert stub.calls(*BULK) == []


def test_devices_whose_credentials_are_no_longer_to_be_had_are_counted_with_what_to_do(
    session: Session, stub: PortalStub
) -> None:
    first, second = stub.add_device(external_id="unit-0"), stub.add_device(external_id="unit-1")
    answers = [{"row": 1, "device_id": first, "repeated": True}, {"row": 2, "device_id": second, "repeated": True}]
    file = write_fleet(session.folder, 2, own="unit-")
    for options in ((), ("--download",)):
        stub.replies[BULK] = [rows_reply(answers)]
        said = session.run("import", file, "--out", f"out{len(options)}", *options).stderr
        assert "2 devices have no link here" in said
        assert "portal renew DEVICE --overlap 0" in said
        assert "results.csv contains" not in said
        assert not (session.folder / "out0" / "bundles").exists()
    own_key = [{"row": 1, "device_id": first, "certificate": "c", "chain": "c"}, answers[1] | {"download_url": "link"}]
    stub.replies[BULK] = [rows_reply(own_key)]
    said = session.run("import", file, "--out", "another").stderr
    assert "no link here" not in said
    assert "results.csv contains links: delete it" in said


def test_the_help_names_each_column() -> None:
    assert import_devices.help is not None
    named = re.findall(r"[a-z_]+", import_devices.help.partition("names the columns: ")[2].partition(".\n")[0])
    assert {*named} - {"and", "optionally"} == {*FIELDS}


def test_a_portal_that_knows_no_dry_run_is_given_no_rows(session: Session, stub: PortalStub) -> None:
    stub.replies[BULK] = rows_reply([{"row": 1, "code": "invalid_input", "detail": "type is missing."}])
    result = session.run("import", write_fleet(session.folder, 3), "--dry-run")
    assert (result.exit_code, "too old" in result.stderr) == (1, True)
    assert [request.body for request in stub.calls(*BULK)] == [[{}]]


def test_the_end_of_an_import_says_what_whoever_gets_a_link_does_with_it(session: Session, stub: PortalStub) -> None:
    row = {"row": 1, "device_id": stub.add_device(external_id="unit-0"), "bundle_password": "bundle-password-1"}
    stub.replies[BULK] = rows_reply([row | {"download_url": stub.add_link(b"PK")}])
    result = session.run("import", write_fleet(session.folder, 1, own="unit-"), "--out", "out")
    assert (
        "The recipient of a link opens it in a browser, or fetches the bundle with: portal download LINK\n"
        in result.stderr
    )
    assert "bundle-password-1" not in result.output
