"""The commands that list, show and change devices."""

from __future__ import annotations

import csv
import io
import json
import stat
from pathlib import Path

import pytest

from commands import client
from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)


def test_all_pages_are_written_as_csv(session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_PAGE", 2)
    ids = [stub.add_device(f"sensor, {index}") for index in range(5)]
    result = session.run("export")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["device_id"] for row in rows] == ids
    assert [row["name"] for row in rows] == [f"sensor, {index}" for index in range(5)]
    assert rows[0]["revoked_at"] == ""


def test_a_file_is_private_and_its_name_says_the_format(session: Session, stub: PortalStub, tmp_path: Path) -> None:
    device_id = stub.add_device()
    file = tmp_path / "fleet.ndjson"
    assert session.json("export", "--out", str(file)) == {"devices": 1, "file": str(file)}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["device_id"] == device_id


def test_a_file_that_is_there_is_kept_unless_forced(session: Session, stub: PortalStub, tmp_path: Path) -> None:
    file = tmp_path / "fleet.csv"
    file.write_text("mine")
    assert session.run("export", "--out", str(file)).exit_code == 1
    assert (file.read_text(), stub.requests) == ("mine", [])
    assert session.run("export", "--out", str(file), "--force").exit_code == 0
    assert file.read_text().startswith("device_id,")


def test_an_export_that_broke_off_leaves_no_file(session: Session, stub: PortalStub, tmp_path: Path) -> None:
    stub.replies["GET", "/devices"] = Reply(403, {"title": "Forbidden", "status": 403, "detail": "No.", "code": "no"})
    assert session.run("export", "--out", str(tmp_path / "fleet.csv")).exit_code == 1
    assert list(tmp_path.glob("*fleet*")) == []


def test_filters_go_to_the_portal(session: Session, stub: PortalStub) -> None:
    session.run("export", "--status", "active", "--type", "pump", "--location", "hall", "--q", "x")
    query = stub.requests[-1].query
    assert {name: query[name] for name in ("status", "type", "location", "q")} == {
        "status": "active",
        "type": "pump",
        "location": "hall",
        "q": "x",
    }
