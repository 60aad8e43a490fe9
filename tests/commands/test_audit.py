"""The commands about the audit record, against a small portal; tests/workflows/test_audit.py verifies real exports."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.checkpoints import KEY, NOTE
from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)


@pytest.fixture(autouse=True)
def answers(stub: PortalStub) -> None:
    stub.replies["GET", "/audit/checkpoint"] = Reply(body=NOTE.encode())
    stub.replies["GET", "/audit/key"] = Reply(body=f"{KEY.verifier}\n".encode())
    stub.replies["GET", "/audit/export"] = Reply(body=b"")


def test_without_a_command_the_record_is_listed(session: Session, stub: PortalStub) -> None:
    assert session.run("audit").stdout == session.run("audit", "list").stdout
    assert session.run("audit", "--limit", "3").exit_code == 0
    assert stub.requests[-1].query["limit"] == "3"
    assert "export" in session.run("audit", "--help").stdout


def test_export_checkpoint_and_key_are_saved_and_verify_without_the_portal(session: Session, stub: PortalStub) -> None:
    assert session.run("audit", "export", "audit.ndjson").exit_code == 0
    assert session.run("audit", "checkpoint", "--out", "today").exit_code == 0
    Path("key").write_text(session.run("audit", "key").stdout)
    asked = len(stub.requests)
    result = session.run("audit", "verify", "audit.ndjson", "--key", "key", "--checkpoint", "today")
    assert result.exit_code == 0, result.output
    assert session.json("audit", "verify", "audit.ndjson", "--key", "key", "--checkpoint", "today")["entries"] == 0
    assert len(stub.requests) == asked


def test_an_export_that_breaks_off_leaves_no_file(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/audit/export"] = Reply(body=b"{}\n" * 100, breaks_off=True)
    assert session.run("audit", "export", "audit.ndjson").exit_code == 3
    assert not Path("audit.ndjson").exists()


def test_what_exists_is_replaced_by_force_only(session: Session) -> None:
    Path("audit.ndjson").write_text("of last year")
    assert session.run("audit", "export", "audit.ndjson").exit_code == 1
    assert Path("audit.ndjson").read_text() == "of last year"
    assert session.run("audit", "export", "audit.ndjson", "--force").exit_code == 0


@pytest.mark.parametrize("note", [b"", b"<html>\x1b[2J</html>", b"\xff\n\n\n\n", b"a\n0\n"])
def test_an_answer_that_is_no_checkpoint_is_not_saved(session: Session, stub: PortalStub, note: bytes) -> None:
    stub.replies["GET", "/audit/checkpoint"] = Reply(body=note)
    assert session.run("audit", "checkpoint", "--out", "today").exit_code == 1
    assert not Path("today").exists()


@pytest.mark.parametrize(
    "key",
    ["nothing.key", "name+00000000+AAAA", str(KEY.verifier).replace("audit/1", "audit/2")],
    ids=["no file", "short", "of another name"],
)
def test_what_is_no_key_is_refused(session: Session, key: str) -> None:
    Path("today").write_text(NOTE)
    Path("audit.ndjson").touch()
    result = session.run("audit", "verify", "audit.ndjson", "--key", key, "--checkpoint", "today")
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize(
    "note",
    [NOTE.replace("\n0\n", "\n1\n"), NOTE.rpartition("\n\n")[0] + "\n", "a\n\n", "", NOTE[:-1]],
    ids=["another size", "no signature", "no checkpoint", "empty", "cut"],
)
def test_a_checkpoint_without_the_keys_signature_is_refused(session: Session, note: str) -> None:
    Path("today").write_text(note)
    Path("audit.ndjson").touch()
    key = str(KEY.verifier)
    assert session.run("audit", "verify", "audit.ndjson", "--key", key, "--checkpoint", "today").exit_code == 1


def test_the_record_is_filtered_by_device_actor_and_time(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    session.run("audit", "--device", device_id, "--actor", "factory", "--since", "2027-01-01", "--until", "12h")
    query = stub.requests[-1].query
    assert (query["object"], query["actor"], query["since"]) == (
        f"device:{device_id}",
        "factory",
        "2027-01-01T00:00:00Z",
    )
    assert datetime.fromisoformat(query["until"]) < datetime.now(UTC) - timedelta(hours=11)
    assert session.run("audit", "--device", device_id, "--object", "x").exit_code == 2
