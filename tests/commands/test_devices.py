"""The commands that list, show and change devices."""

from __future__ import annotations

import csv
import io
import json
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from cli import cli
from commands import client
from commands.output import Cell, status_of, text
from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply, problem
from tests.support.terminal import terminal

UNKNOWN = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
pytest_plugins = ("tests.support.cli_fixtures",)


def test_a_device_named_like_a_formula_runs_nothing_in_the_spreadsheet_of_an_export(
    session: Session, stub: PortalStub
) -> None:
    names = ["=cmd|'/c calc'!A0", "+1+1", "-2", "@SUM(A1)", "\t=1", "'=1", "plain = 1"]
    for name in names:
        stub.add_device(name)
    rows = csv.DictReader(io.StringIO(session.run("export").stdout, newline=""))
    assert [row["name"] for row in rows] == [f"'{name}" for name in names[:-1]] + [names[-1]]


def test_all_pages_are_written_as_csv(session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_PAGE", 2)
    ids = [stub.add_device(f"sensor, {index}") for index in range(5)]
    result = session.run("export")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["device_id"] for row in rows] == ids
    assert [row["name"] for row in rows] == [f"sensor, {index}" for index in range(5)]
    assert rows[0]["revoked_at"] == ""


@pytest.mark.parametrize("format_", ["csv", "json"])
def test_an_export_that_cannot_be_had_does_not_look_like_an_empty_fleet(
    session: Session, stub: PortalStub, format_: str
) -> None:
    stub.replies["GET", "/devices"] = problem(503, "unavailable", "Not now.")
    result = session.run("export", "--format", format_)
    assert (result.exit_code, result.stdout) == (1, "")


def test_a_file_is_private_and_its_name_says_the_format(session: Session, stub: PortalStub, tmp_path: Path) -> None:
    device_id = stub.add_device()
    file = tmp_path / "fleet.ndjson"
    assert session.json("export", "--out", str(file)) == {"devices": 1, "file": str(file)}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["device_id"] == device_id


def test_an_export_that_is_named_json_is_json(session: Session, stub: PortalStub, tmp_path: Path) -> None:
    ids = [stub.add_device(f"sensor-{index}") for index in range(3)]
    file = tmp_path / "fleet.json"
    session.json("export", "--out", str(file))
    assert [device["device_id"] for device in json.loads(file.read_text())["devices"]] == ids
    stub.devices.clear()
    assert json.loads(session.run("export", "--format", "json").stdout) == {"devices": []}
    assert session.run("export", "--format", "ndjson").stdout == ""


def test_a_name_that_says_no_format_is_asked_about(session: Session, stub: PortalStub, tmp_path: Path) -> None:
    file = tmp_path / "fleet.xlsx"
    result = session.run("export", "--out", str(file))
    assert (result.exit_code, stub.requests, file.exists()) == (2, [], False)
    assert "add --format" in result.stderr
    assert session.run("export", "--out", str(file), "--format", "csv").exit_code == 0


def test_an_existing_file_is_kept_without_force(session: Session, stub: PortalStub, tmp_path: Path) -> None:
    file = tmp_path / "fleet.csv"
    file.write_text("mine")
    assert session.run("export", "--out", str(file)).exit_code == 1
    assert (file.read_text(), stub.requests) == ("mine", [])
    assert session.run("export", "--out", str(file), "--force").exit_code == 0
    assert file.read_text().startswith("device_id,")


def test_an_interrupted_export_leaves_no_file(session: Session, stub: PortalStub, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--columns", "name,foo,bar"), "'foo' is not a column; there are: device_id"),
        (("--columns", "name,id,device_id"), "'device_id' is there twice"),
        (("--limit", "0"), "use a whole number of at least 1."),
        (("--limit", "x"), "use a whole number of at least 1."),
    ],
)
def test_a_wrong_value_is_named_with_what_is_right(session: Session, given: tuple[str, ...], said: str) -> None:
    result = session.run("list", *given)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_number_has_limits_in_words_in_all_commands() -> None:
    def numbers(command: click.Command) -> Iterator[click.Parameter]:
        yield from (one for one in command.params if isinstance(one.type, click.types.IntParamType))
        for inner in getattr(command, "commands", {}).values():
            yield from numbers(inner)

    assert list(numbers(cli)) == []


def test_a_list_is_plain_when_piped(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    result = session.run("list")
    assert result.stdout == f"{device_id}\tsensor-7\tthermometer\tHall 2\tactive\t2036-01-01T00:00:00Z\tnow\tdefault\n"
    assert result.stderr == ""


def test_a_device_that_the_settings_close_is_said_to_be_closed(session: Session, stub: PortalStub) -> None:
    why = "topics[0] must begin with things. So the broker denies it everything: change its topics, or the settings."
    device_id = stub.add_device(broker="closed", broker_problem=why)
    assert {"broker\tclosed", f"broker_problem\t{why}"} <= set(session.run("show", device_id).stdout.splitlines())
    assert status_of(stub.devices[device_id]) == Cell("active", "active, closed", "red")


def test_all_pages_are_read_when_asked(session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_PAGE", 2)
    for index in range(5):
        stub.add_device(f"sensor-{index}")
    everything = session.json("list", "--all")
    assert [device["name"] for device in everything["devices"]] == [f"sensor-{index}" for index in range(5)]
    assert everything["next_cursor"] is None
    some = session.json("list", "--limit", "3")
    assert len(some["devices"]) == 3
    rest = session.json("list", "--cursor", some["next_cursor"])
    assert [device["name"] for device in rest["devices"]] == ["sensor-3", "sensor-4"]


def test_a_cursor_that_repeats_ends_the_list(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/devices"] = Reply(body={"devices": [{"device_id": UNKNOWN}], "next_cursor": "again"})
    assert session.run("list", "--all").exit_code == 0
    assert len(stub.requests) == 2


def test_filters_reach_the_portal(session: Session, stub: PortalStub) -> None:
    session.run(
        "list", "--status", "active", "--type", "t", "--location", "l", "--q", "x", "--expires-before", "2027-01-31",
        "--external-id", "SN-1", "--profile", "p",
    )  # fmt: skip
    assert stub.requests[0].query == {
        "status": "active",
        "type": "t",
        "location": "l",
        "q": "x",
        "expires_before": "2027-01-31T00:00:00Z",
        "external_id": "SN-1",
        "profile": "p",
        "limit": "50",
    }
    session.run("list", "--expires-before", "30d")
    before = datetime.fromisoformat(stub.requests[-1].query["expires_before"])
    assert abs(before - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("options", "query"),
    [
        (("--connected",), {"connected": "true"}),
        (("--offline", "--sort", "longest-unseen"), {"connected": "false", "sort": "last_seen"}),
        (("--never-seen",), {"connected": "never"}),
        (("--sort", "last-seen"), {"sort": "-last_seen"}),
        (("--attested", "outdated"), {"attested": "outdated"}),
    ],
    ids=lambda given: " ".join(given),
)
def test_devices_are_listed_by_their_connection(
    session: Session, stub: PortalStub, options: tuple[str, ...], query: dict[str, str]
) -> None:
    session.run("list", *options)
    assert stub.requests[0].query == {"limit": "50", **query}


def test_what_came_of_evidence_is_shown(session: Session, stub: PortalStub) -> None:
    known = {"verdict": "failed", "type": "psa", "problems": ["One.", "Two."], "claims": {"a": 1}}
    device_id = stub.add_device(attestation=known, attested="failed")
    shown = dict(line.split("\t") for line in session.run("show", device_id).stdout.splitlines())
    assert (shown["attested"], shown["attestation.type"]) == ("failed", "psa")
    assert shown["attestation.problems"] == "One.; Two."
    assert "attestation.claims" not in shown


CONNECTIONS: dict[str, tuple[Any, list[str], str]] = {
    "connected": (
        {"connected": True, "since": "2026-01-02T00:00:00Z", "last_seen": "2026-01-03T00:00:00Z"},
        ["yes", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"],
        "now",
    ),
    "offline": (
        {"connected": False, "since": "2026-01-02T00:00:00Z", "last_seen": "2026-01-02T00:00:00Z"},
        ["no", "", "2026-01-02T00:00:00Z"],
        "2026-01-02T00:00:00Z",
    ),
    "never seen": (None, ["never", "", ""], "never"),
    "not known": ({"connected": None, "since": None, "last_seen": None}, ["unknown", "", ""], ""),
    "of another form": ([True], ["unknown", "", ""], ""),
    "of other values": ({"connected": [1], "since": 7}, ["unknown", "", ""], ""),
}


@pytest.mark.parametrize(("groups", "shown"), [([], ""), (["pilots", "meters"], "pilots meters")])
def test_groups_are_shown_as_they_are_listed(session: Session, stub: PortalStub, groups: list[str], shown: str) -> None:
    device_id = stub.add_device(groups=groups)
    assert f"groups\t{shown}" in session.run("show", device_id).stdout.splitlines()


@pytest.mark.parametrize(("connection", "words", "cell"), CONNECTIONS.values(), ids=CONNECTIONS)
def test_a_connection_is_shown_in_words(
    session: Session, stub: PortalStub, connection: Any, words: list[str], cell: str
) -> None:
    device_id = stub.add_device(connection=connection)
    shown = dict(line.split("\t") for line in session.run("show", device_id).stdout.splitlines())
    assert [shown[name] for name in ("connected", "connected_since", "last_seen")] == words
    header, line = session.run("export").stdout.splitlines()
    assert header.split(",")[-6:-3] == ["connected", "connected_since", "last_seen"]
    assert line.split(",")[-6:-3] == words
    assert session.run("list").stdout.rstrip("\n").split("\t")[-2] == cell


@pytest.mark.parametrize("command", ["list", "export"])
def test_only_one_state_of_a_connection_is_asked_for(session: Session, stub: PortalStub, command: str) -> None:
    for flags in (("--connected", "--offline"), ("--never-seen", "--connected"), ("--offline", "--never-seen")):
        result = session.run(command, *flags)
        assert (result.exit_code, stub.requests) == (2, [])
        assert "only one of --connected, --offline and --never-seen" in result.stderr


def test_a_device_is_shown_field_by_field(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device(metadata={"owner": "ops"})
    lines = session.run("show", device_id.upper()).stdout.splitlines()
    assert f"device_id\t{device_id}" in lines
    assert {"metadata.owner\tops", "topics.0\tdevices/{id}/#:readwrite", "broker\tenforced"} <= set(lines)
    assert session.json("show", device_id) == stub.devices[device_id]


def test_a_device_is_changed(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    assert session.run("update", device_id, "--name", "new", "--topic", "devices/news:read").exit_code == 0
    assert session.run("update", device_id, "--default-topics", "--no-metadata").exit_code == 0
    bodies = [request.body for request in stub.calls("PATCH", f"/devices/{device_id}")]
    assert bodies == [
        {"name": "new", "topics": [{"filter": "devices/news", "access": "read"}]},
        {"metadata": {}, "topics": None},
    ]


@pytest.mark.parametrize("broker", ["enforced", "pending"])
def test_who_gives_a_device_topics_is_told_that_the_broker_does_not_have_them_yet(
    session: Session, stub: PortalStub, broker: str
) -> None:
    device_id = stub.add_device(broker=broker)
    topic = ("--topic", "devices/news:read")
    assert ("not have these topics yet" in session.run("update", device_id, *topic).stderr) is (broker == "pending")
    assert "not have these topics yet" not in session.run("update", device_id, "--name", "new").stderr
    stub.registered = {"broker": broker} if broker == "pending" else {}
    words = ("register", "x", "--type", "t", "--location", "l", "--firmware", "1", "--out", f"x-{broker}")
    assert ("not have these topics yet" in session.run(*words).stderr) is (broker == "pending")


def test_a_change_of_nothing_is_a_usage_error(session: Session) -> None:
    assert session.run("update", UNKNOWN).exit_code == 2


def test_the_certificate_that_expires_first_is_listed_first(session: Session, stub: PortalStub) -> None:
    def device(name: str, end: str) -> dict[str, Any]:
        return {"device_id": stub.add_device(), "name": name, "location": "hall 1"} | {
            "expires_at": end,
            "renewable_from": "2035-01-01T00:00:00Z",
        }

    page = [device("later", "2036-02-01T00:00:00Z"), device("sooner", "2036-01-01T00:00:00Z")]
    stub.replies[("GET", "/devices")] = Reply(body={"devices": page, "next_cursor": None})
    lines = session.run("expiring", "--within", "2036-03-01").stdout.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["sooner", "later"]
    assert [line.split("\t")[4] for line in lines] == ["2035-01-01T00:00:00Z"] * 2
    assert stub.requests[-1].query["expires_before"] == "2036-03-01T00:00:00Z"
    assert stub.requests[-1].query["status"] == "active"
    stub.replies[("GET", "/devices")] = Reply(body={"devices": [], "next_cursor": None})
    assert "that expires before 20" in session.run("expiring").stderr


def test_columns_and_formats_of_a_list_are_chosen(session: Session, stub: PortalStub) -> None:
    stub.add_device("pump", external_id="line-4/1", metadata={"owner": "ops", "site": {"hall": 2}})
    chosen = "name,external_id,metadata.owner,metadata.site,topics,last_seen"
    cells = ["pump", "line-4/1", "ops", '{"hall": 2}', "devices/{id}/#:readwrite", "2026-01-03T00:00:00Z"]
    assert session.run("list", "--columns", chosen).stdout == "\t".join(cells) + "\n"
    rows = list(csv.reader(io.StringIO(session.run("list", "--columns", chosen, "-o", "csv").stdout, newline="")))
    assert rows == [chosen.split(","), cells]
    assert json.loads(session.run("list", "-o", "ndjson").stdout)["metadata"] == {"owner": "ops", "site": {"hall": 2}}
    assert json.loads(session.run("list", "-o", "json").stdout) == session.json("list")
    exported = next(csv.DictReader(io.StringIO(session.run("export").stdout, newline="")))
    assert (exported["topics"], json.loads(exported["metadata"])["owner"]) == ("devices/{id}/#:readwrite", "ops")


def test_columns_have_whole_times_at_a_terminal_and_the_names_that_the_table_gives_them(
    session: Session, stub: PortalStub
) -> None:
    stub.add_device("pump")
    with terminal(session, "list", "--columns", "name,SEEN", NO_COLOR="1", TERM="dumb") as seen:
        assert seen.end() == 0
        assert "2026-01-03 00:00:00 UTC" in seen.seen
    assert session.run("list", "--columns", "id").stdout == session.run("list", "--columns", "device_id").stdout


@pytest.mark.parametrize("columns", ["", "name,name", "seen,last_seen", "secret", "metadata.", "name,"])
def test_a_column_that_no_device_has_is_refused(session: Session, stub: PortalStub, columns: str) -> None:
    assert (session.run("list", "--columns", columns).exit_code, stub.requests) == (2, [])


def test_what_is_searched_and_sorted_is_the_portal_s_work(session: Session, stub: PortalStub) -> None:
    session.run("list", "--search", "north", "--name", "pump", "--metadata", "owner=ops", "--sort", "name")
    wanted = {"q": "north", "name": "pump", "metadata": "owner=ops", "sort": "name"}
    assert wanted.items() <= stub.requests[-1].query.items()
    session.run("list", "--q", "north", "--sort", "newest")
    assert ("sort" in stub.requests[-1].query, stub.requests[-1].query["q"]) == (False, "north")


def test_metadata_is_changed_key_by_key(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    session.run("update", device_id, "--metadata", "owner=ops", "--remove-metadata", "rack", "--external-id", "SN-1")
    assert stub.requests[-1].body == {"metadata_changes": {"rack": None, "owner": "ops"}, "external_id": "SN-1"}
    session.run("update", device_id, "--no-metadata", "--metadata", "a=b")
    assert stub.requests[-1].body == {"metadata": {"a": "b"}}
    assert session.run("update", device_id, "--no-metadata", "--remove-metadata", "a").exit_code == 2


def test_a_list_of_names_is_words_for_people_and_json_for_programs() -> None:
    assert text(["meters", "pilots"]) == Cell('["meters", "pilots"]', "meters, pilots")
    assert (text([]).plain, text([]).shown) == ("[]", "-")


def test_an_empty_list_of_a_profile_that_does_not_exist_says_so(session: Session, stub: PortalStub) -> None:
    said = "There is no certificate profile nosuch; list them with GET /profiles."
    stub.replies["GET", "/profiles/nosuch"] = problem(404, "not_found", said)
    stub.replies["GET", "/devices"] = Reply(body={"devices": [], "next_cursor": None})
    result = session.run("list", "--profile", "nosuch")
    assert result.exit_code == 1
    assert "There is no certificate profile nosuch; list them with portal profile list." in result.stderr
