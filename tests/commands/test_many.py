"""Many devices are suspended, resumed or revoked by one command, asked about once, in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands import many
from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply
from tests.support.terminal import terminal

pytest_plugins = ("tests.support.cli_fixtures",)
CALL = ("POST", "/devices/actions")


def recorded(path: str) -> dict[str, dict[str, Any]]:
    return {row["device_id"]: row for row in map(json.loads, Path(path).read_text().splitlines())}


def test_several_names_are_one_call(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device(f"pump-{number}", external_id=f"line-4/{number}") for number in range(3)]
    result = session.run("revoke", "pump-0", "line-4/1", ids[2], "--yes", "--reason", "key_compromise")
    assert result.exit_code == 0, result.output
    [call] = stub.calls(*CALL)
    assert call.body == {"action": "revoke", "ids": ids, "reason": "key_compromise"}
    assert [line.split("\t")[0::2] for line in result.stdout.splitlines()] == [[one, "revoked"] for one in ids]
    assert "Revoked 3 of 3 devices" in result.stderr


def test_names_come_from_standard_input(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device(f"pump-{number}") for number in range(3)]
    result = session.run("suspend", "-", "pump-2", "--yes", stdin="pump-0\n\npump-1\npump-0\n")
    assert (result.exit_code, stub.calls(*CALL)[0].body["ids"]) == (0, ids)


def test_a_filter_is_the_portal_s_and_what_it_found_is_what_is_done(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device(f"pump-{number}") for number in range(500)]
    result = session.run("revoke", "--location", "hall 2", "--metadata", "site=north", "--expiring", "30d", "--yes")
    assert result.exit_code == 0, result.output
    assert {"location": "hall 2", "metadata": "site=north"}.items() <= stub.requests[0].query.items()
    assert [call.body["ids"] for call in stub.calls(*CALL)] == [ids]  # one call, one pass of the broker


def test_people_are_asked_once_with_what_is_meant(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device(f"pump-{number}") for number in range(12)]
    for typed, status in (("n", "active"), ("y", "revoked")):
        with terminal(session, "revoke", "--type", "pump", NO_COLOR="1", TERM="dumb") as seen:
            seen.expect("Revoke 12 devices? This cannot be undone. [y/N]: ")
            assert f"{ids[0]}  pump-0  Hall 2  active\n" in seen.seen
            assert "… and 2 more\n" in seen.seen
            seen.type(typed + "\n")
            assert seen.end() == (typed == "n")
        assert {device["status"] for device in stub.devices.values()} == {status}


def test_without_a_terminal_many_need_yes(session: Session, stub: PortalStub) -> None:
    stub.add_device()
    assert session.run("suspend", "--type", "pump").exit_code == 2
    assert stub.calls(*CALL) == []


def test_those_that_were_so_before_are_counted_apart(session: Session, stub: PortalStub) -> None:
    for status in ("active", "active", "revoked"):
        stub.add_device("pump", type="pump", status=status)
    with terminal(session, "revoke", "--type", "pump", NO_COLOR="1", TERM="dumb") as seen:
        seen.expect("1 device is revoked already.")
        seen.expect("Revoke 2 devices? This cannot be undone. [y/N]: ")
        seen.type("y\n")
        seen.expect("Revoked 2 of 3 devices; 1 device had been revoked before")
        assert seen.end() == 0


@pytest.mark.parametrize("words", [(), ("pump", "--type", "pump"), ("--yes",)])
def test_what_names_no_devices_or_both_is_refused(session: Session, stub: PortalStub, words: tuple[str, ...]) -> None:
    assert (session.run("resume", *words).exit_code, stub.requests) == (2, [])


def test_a_name_that_nobody_has_changes_nothing(session: Session, stub: PortalStub) -> None:
    stub.add_device("pump-0")
    result = session.run("revoke", "pump-0", "pump-1", "--yes")
    assert (result.exit_code, "pump-1: No device has this name" in result.stderr) == (1, True)
    assert stub.calls(*CALL) == []


def test_what_is_refused_and_what_is_pending_is_told(session: Session, stub: PortalStub) -> None:
    stub.broker = "pending"
    active, revoked = stub.add_device("a"), stub.add_device("b", status="revoked")
    result = session.run("suspend", active, revoked, "--yes", "--results", "results")
    assert result.exit_code == 1
    assert "1 of 2 devices were refused" in result.stderr
    assert "DOES NOT ENFORCE THIS YET for 1 of them" in result.stderr
    assert {one: row.get("code") for one, row in recorded("results").items()} == {
        active: None,
        revoked: "state_conflict",
    }
    assert not any(row["done"] for row in recorded("results").values())


def test_the_file_of_results_is_right_after_a_connection_that_broke(
    session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "AT_ONCE", 3)
    ids = [stub.add_device(f"pump-{number}") for number in range(7)]
    done = [{"device_id": one, "status": "revoked", "broker": "enforced"} for one in ids[:3]]
    first = Reply(200, "".join(json.dumps(one) + "\n" for one in done).encode())
    broken = Reply(200, b"{", breaks_off=True)
    stub.replies[CALL] = [first, broken, broken, broken]
    assert session.run("revoke", "--type", "pump", "--results", "results", "--yes").exit_code == 3
    assert [row["done"] for row in recorded("results").values()] == [True] * 3 + [False] * 4
    assert Path("results").stat().st_mode & 0o777 == 0o600
    before = len(stub.calls(*CALL))
    # The filter may find them no more: what the file has is done, and nothing twice.
    assert session.run("revoke", "--results", "results", "--yes").exit_code == 0
    assert [call.body["ids"] for call in stub.calls(*CALL)[before:]] == [ids[3:6], ids[6:]]
    assert all(row["done"] for row in recorded("results").values())
    assert list(recorded("results")) == ids
    again = session.run("revoke", "--results", "results", "--yes")
    assert "Everything in the file of results is done." in again.stderr


@pytest.mark.parametrize("content", ["mine", '{"device_id": "x", "action": "revoke", "done": false}', "[]", "{}"])
def test_another_file_is_not_taken_for_results(session: Session, stub: PortalStub, content: str) -> None:
    Path("results").write_text(content)
    assert session.run("revoke", "--type", "pump", "--results", "results", "--yes").exit_code == 2
    assert (Path("results").read_text(), stub.requests) == (content, [])


def test_programs_get_every_device(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device() for _ in range(2)]
    shown = session.json("suspend", *ids, "--yes")
    assert [(one["device_id"], one["status"], one["done"]) for one in shown["devices"]] == [
        (one, "suspended", True) for one in ids
    ]


# --- Renew and update -------------------------------------------------------------------------------------------------


def test_links_and_passwords_of_many_renewals_are_in_the_file_alone(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device(f"pump-{number}") for number in range(3)]
    stub.add_device("old", status="revoked")
    options = ("--days", "9", "--overlap", "0", "--results", "renewed", "--yes")
    result = session.run("renew", "--location", "Hall 2", "--expiring", "30d", *options)
    assert result.exit_code == 0, result.output
    [call] = stub.calls(*CALL)
    assert call.body == {"action": "renew", "ids": ids, "renewal": {"validity_days": 9, "overlap_hours": 0}}
    assert "secret of" not in result.output
    assert "Renewed 3 of 3 devices" in result.stderr
    assert "The links and bundle passwords are in renewed." in result.stderr
    assert all(row["bundle_password"].startswith(f"secret of {one}") for one, row in recorded("renewed").items())
    assert Path("renewed").stat().st_mode & 0o777 == 0o600


def test_renewals_that_were_cut_off_are_repeated_with_their_keys(
    session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "AT_ONCE", 2)
    ids = [stub.add_device(f"pump-{number}") for number in range(5)]
    broken = Reply(200, b"{", breaks_off=True)
    stub.replies[CALL] = [broken, broken, broken]
    assert session.run("renew", *ids[:4], "--results", "renewed", "--yes").exit_code == 3
    asked = {call.headers["Idempotency-Key"] for call in stub.calls(*CALL)}
    assert asked == {row["idempotency_key"] for row in recorded("renewed").values()}
    assert len(asked) == 1
    assert session.run("renew", ids[4], "--results", "renewed", "--yes").exit_code == 0
    keys = {one: row["bundle_password"].rpartition(" by ")[2] for one, row in recorded("renewed").items()}
    assert {keys[one] for one in ids[:4]} == asked
    assert keys[ids[4]] not in asked


@pytest.mark.parametrize(
    "words",
    [
        ("--yes",),
        ("--results", "r", "--csr", "x"),
        ("--results", "r", "--out", "x"),
        ("--results", "r", "--password-out", "x"),
    ],
)
def test_renewals_of_many_need_a_file_and_have_no_option_of_one(
    session: Session, stub: PortalStub, words: tuple[str, ...]
) -> None:
    stub.add_device("pump-0")
    assert (session.run("renew", "--type", "pump", *words).exit_code, stub.calls(*CALL)) == (2, [])


def test_programs_get_the_passwords_of_many_renewals(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device() for _ in range(2)]
    shown = session.json("renew", *ids, "--yes")
    assert all(one["bundle_password"].startswith("secret of") for one in shown["devices"])


def test_devices_are_changed_where_they_fit(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device(f"pump-{number}") for number in range(2)]
    where = ("--where", "location=Hall 2", "--where", "metadata=site=north", "--group", "pilots")
    to = ("--location", "Hall 3", "--metadata", "moved=2027", "--remove-metadata", "old", "--add-to-group", "hall-3")
    result = session.run("update", *where, *to, "--yes")
    assert result.exit_code == 0, result.output
    query = {"location": "Hall 2", "metadata": "site=north", "group": "pilots"}
    assert query.items() <= stub.requests[0].query.items()
    changes = {"location": "Hall 3", "metadata_changes": {"old": None, "moved": "2027"}, "add_to_group": "hall-3"}
    assert stub.calls(*CALL)[0].body == {"action": "update", "ids": ids, "changes": changes}
    assert "Changed 2 of 2 devices" in result.stderr


def test_people_are_told_what_will_be_changed(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device(f"pump-{number}") for number in range(2)]
    with terminal(session, "update", *ids, "--location", "x", "--metadata", "a=b", NO_COLOR="1", TERM="dumb") as seen:
        seen.expect("Change location, metadata of 2 devices? [y/N]: ")
        seen.type("n\n")
        assert seen.end() == 1
    assert stub.calls(*CALL) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--where", "colour=red", "--location", "x"),
        ("--where", "type=pump"),
        ("--where", "type=pump", "--name", "x"),
        ("--where", "type=pump", "--external-id", "x"),
        ("--where", "type=pump", "--no-metadata"),
        ("pump", "--where", "type=pump", "--location", "x"),
        ("--location", "x"),
    ],
)
def test_what_cannot_be_changed_of_many_is_refused(session: Session, stub: PortalStub, words: tuple[str, ...]) -> None:
    assert (session.run("update", *words, "--yes").exit_code, stub.requests) == (2, [])


def test_one_device_is_put_into_a_group_without_a_question(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device("pump-0")
    assert session.run("update", "pump-0", "--add-to-group", "pilots").exit_code == 0
    assert stub.calls(*CALL)[0].body["ids"] == [device_id]


def test_people_get_what_became_of_each_device_as_a_table(session: Session, stub: PortalStub) -> None:
    ids = [stub.add_device(name) for name in ("pump-1", "a-pump-with-a-longer-name")]
    done = [{"device_id": one, "status": "suspended", "broker": "enforced", "repeated": False} for one in ids]
    stub.replies[CALL] = Reply(body="".join(json.dumps(one) + "\n" for one in done).encode())
    with terminal(session, "suspend", *ids, "--yes", NO_COLOR="1") as seen:
        assert seen.end() == 0, seen.seen
    table = [line.split() for line in seen.seen.splitlines()][:3]
    assert table[0] == ["ID", "NAME", "STATUS", "BROKER"]
    assert [line[2:] for line in table[1:]] == [["suspended", "enforced"]] * 2
